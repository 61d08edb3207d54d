"""Records one run of a model as a list of ATen operators, without reading a weight.

Parameters are replaced by stand-ins on the *meta* device (shape only) for the time of the run. Whatever does not depend
on them (token ids, positions, masks) stays on the CPU and is computed for real, so that code which looks at such
values (`.item()`, boolean indexing) takes the path of a real run. A value that does depend on weights is made up.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lorashear.graph.base import base_model

LARGEST_VALUE = 1 << 16
"""Elements up to which an integer tensor's values are kept."""

LARGEST_MADE_UP = 1 << 26
"""Parameters up to which a model that does not run on shapes alone is run on made-up weights."""

LARGEST_CONSTANT = 1 << 22
"""Elements up to which a factory call runs on the CPU; larger ones would cost memory and hold nothing worth knowing."""


RESHAPES_IN_PLACE = frozenset(
    f"aten::{name}_" for name in ("squeeze", "unsqueeze", "transpose", "t", "swapaxes", "swapdims")
)


class Ref(NamedTuple):
    """Stands for a tensor in recorded arguments."""

    number: int


@dataclass(slots=True)
class Node:
    """One operator call."""

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[int, ...]
    module: str
    """Path of the innermost module that was running."""
    _inputs: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The operator without namespace, overload or in-place mark: `add` for `aten::add_.Tensor`."""
        return self.op._schema.name.split("::")[1].rstrip("_")

    @property
    def where(self) -> str:
        """Operator and module, for messages."""
        return f"{self.op._schema.name.split('::')[1]} in {self.module or 'the model'}"

    def inputs(self) -> tuple[int, ...]:
        """Numbers of the tensors among the arguments."""
        if self._inputs is None:
            leaves = pytree.tree_leaves((self.args, self.kwargs), is_leaf=lambda x: isinstance(x, Ref))
            self._inputs = tuple(leaf.number for leaf in leaves if isinstance(leaf, Ref))
        return self._inputs

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name, as ATen leaves defaults out."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)


@dataclass(slots=True)
class Call:
    """One call of a module that was given a tensor."""

    input: int
    """Number of the first tensor among the arguments."""
    start: int
    """Index of the first node inside."""
    end: int = 0
    """Index after the last node inside."""
    output: int | None = None
    """Number of the first tensor it returned."""


@dataclass
class Trace:
    """What one run did: operators in order, and which tensors are what."""

    nodes: list[Node] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    """Shape of every tensor, by number."""
    dtypes: list[torch.dtype] = field(default_factory=list)
    """Element type of every tensor, by number."""
    parameters: dict[int, str] = field(default_factory=dict)
    buffers: dict[int, str] = field(default_factory=dict)
    inputs: dict[int, str] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)
    literals: dict[int, Tensor] = field(default_factory=dict)
    """Tensors that the run took from nowhere (inputs, literals of the code), with their values."""
    learnt: set[int] = field(default_factory=set)
    """Tensors that depend on weights."""
    constants: dict[int, Tensor] = field(default_factory=dict)
    """Other tensors, where they meet one that depends on weights: masks, positions, buffers, with their values."""
    values: dict[int, Tensor] = field(default_factory=dict)
    """Values of small integer tensors that do not depend on weights: the indices of `x[..., [-2], :]` are known."""
    made_up_weights: bool = False
    """Whether it ran on made-up weights, so that its path (which experts were chosen) is one of many."""
    made_up: list[str] = field(default_factory=list)
    """Operators whose value depends on weights and went into Python, so that it was made up."""
    calls: dict[str, list[Call]] = field(default_factory=dict)
    """Module path -> its calls, in order."""

    @property
    def given(self) -> dict[str, Tensor]:
        """The inputs of the run, by name."""
        return {name: self.literals[number] for number, name in self.inputs.items()}


class _KeepConstants(TorchFunctionMode):
    """Literals on the meta device lose their values below the dispatcher; keep them on the CPU.

    They come as `torch.tensor(values, device="meta")`, and as the list of `x[..., [-2], :]` on a meta tensor.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "meta":
            kwargs["device"] = "cpu"
        if func is Tensor.__getitem__ and args[0].is_meta:
            args = (args[0], _without_lists(args[1]))
        return func(*args, **kwargs)


def _without_lists(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_without_lists(each) for each in index)
    return torch.tensor(index) if isinstance(index, list) else index


class _Recorder(TorchDispatchMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch is untyped here
        self.trace = trace
        self.modules: list[str] = []
        self.known: set[int] = set()  # tensors that are a parameter, a buffer, an input or the output of a node
        self.alive: list[Tensor] = []  # ids stay unique only while tensors live
        self.numbers: dict[int, int] = {}
        self.stale: dict[int, Tensor] = {}  # CPU tensors overwritten by unknown values -> their meta stand-in

    def number(self, tensor: Tensor) -> int:
        found = self.numbers.get(id(tensor))
        if found is None:
            found = len(self.alive)
            self.numbers[id(tensor)] = found
            self.alive.append(tensor)
            self.trace.shapes.append(tuple(tensor.shape))
            self.trace.dtypes.append(tensor.dtype)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        unknown = any(t.is_meta or id(t) in self.stale for t in tensors)
        learnt = unknown or any(self.numbers.get(id(t)) in self.trace.learnt for t in tensors)
        recorded = [Ref(self.number(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if unknown:
            leaves = [self._as_meta(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        run_args, run_kwargs = pytree.tree_unflatten(leaves, spec)
        out = self._run(func, run_args, run_kwargs, unknown)
        out = self._same_objects(func, args, run_args, out, unknown)
        if func._schema.name in RESHAPES_IN_PLACE:
            self.numbers.pop(id(out), None)  # the same object from here on with other dimensions: a tensor of its own
        outs = tuple(self.number(t) for t in pytree.tree_leaves(out) if isinstance(t, Tensor))
        if outs:
            node_args, node_kwargs = pytree.tree_unflatten(recorded, spec)
            module = self.modules[-1] if self.modules else ""
            self.trace.nodes.append(Node(func, node_args, node_kwargs, outs, module))
            self._keep_values(tensors, outs, learnt=learnt)
        return out

    def _keep_values(self, tensors: list[Tensor], outs: tuple[int, ...], *, learnt: bool) -> None:
        for tensor in tensors:
            number = self.numbers[id(tensor)]
            if tensor.is_meta or id(tensor) in self.stale or number in self.trace.learnt:
                continue
            if number not in self.known:
                self.trace.literals[number] = tensor
            if learnt:
                self.trace.constants[number] = tensor
            if not tensor.is_floating_point() and tensor.numel() <= LARGEST_VALUE:
                self.trace.values[number] = tensor
        self.known.update(outs)
        if learnt:
            self.trace.learnt.update(outs)

    def _as_meta(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self.stale:
            return self.stale[id(tensor)]
        return (
            tensor
            if tensor.is_meta
            else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        )

    def _run(self, func: OpOverload, args: Any, kwargs: dict[str, Any], unknown: bool) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and unknown:
            self.trace.made_up.append(f"{func} in {self.modules[-1] if self.modules else 'the model'}")
            return True if args[0].dtype is torch.bool else 1
        if "device" in kwargs and kwargs["device"] is not None:
            small = not args or not isinstance(args[0], (list, tuple)) or _numel(args[0]) <= LARGEST_CONSTANT
            kwargs["device"] = torch.device("meta" if unknown or not small else "cpu")
        return func(*args, **kwargs)

    def _same_objects(self, func: OpOverload, args: Any, run_args: Any, out: Any, unknown: bool) -> Any:
        """An in-place operator has to hand back the very tensor it was given, even when its value is lost."""
        if not (unknown and args and isinstance(args[0], Tensor) and out is run_args[0] and out is not args[0]):
            return out
        self.stale[id(args[0])] = run_args[0]
        return args[0]


def _numel(shape: Any) -> int:
    total = 1
    for size in shape:
        total *= int(size)
    return total


@contextmanager
def _module_paths(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    paths = {id(module): name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}

    trace, open_calls = recorder.trace, []  # type: tuple[Trace, list[Call | None]]

    def enter(module: nn.Module, args: Any) -> None:
        path = paths.get(id(module), recorder.modules[-1] if recorder.modules else "")
        recorder.modules.append(path)
        given = next((tensor for tensor in args if isinstance(tensor, Tensor)), None)
        call = None if given is None else Call(recorder.number(given), len(trace.nodes))
        open_calls.append(call)
        if call is not None:
            trace.calls.setdefault(path, []).append(call)

    def leave(_module: nn.Module, _args: Any, out: Any) -> None:
        recorder.modules.pop()
        call = open_calls.pop()
        if call is not None:
            first = next((t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)), None)
            call.end, call.output = len(trace.nodes), None if first is None else recorder.number(first)

    handles = [
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _spelled_out(model: nn.Module) -> Iterator[None]:
    """Fused attention and grouped experts hide their inside; the plain ones are the same functions in operators."""
    configs = {id(config): config for module in model.modules() for config in _configs(module)}
    keys = ("_attn_implementation_internal", "_experts_implementation_internal")
    before = [(config, key, vars(config)[key]) for config in configs.values() for key in keys if key in vars(config)]
    try:
        for change, plain in (("set_attn_implementation", "eager"), ("set_experts_implementation", "batched_mm")):
            try:
                getattr(model, change, lambda _plain: None)(plain)
            except ValueError:  # this model has no choice to make
                continue
        yield
    finally:
        for config, key, value in before:
            setattr(config, key, value)


def _configs(module: nn.Module) -> Iterator[Any]:
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        yield config
        for name in getattr(config, "sub_configs", ()):
            if getattr(config, name, None) is not None:
                yield getattr(config, name)


@contextmanager
def _no_autocast_on_meta() -> Iterator[None]:
    """`torch.autocast("meta")` raises; there is nothing to cast there."""
    enter = torch.autocast.__init__

    def quiet(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        enter(self, "cpu" if device_type == "meta" else device_type, *args, **{**kwargs, "enabled": False})

    torch.autocast.__init__ = quiet  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = enter  # type: ignore[method-assign]


def record(model: nn.Module, inputs: Mapping[str, Tensor]) -> Trace:
    """Runs `model(**inputs)` once on stand-ins and returns what it did.

    A model whose code looks at values that depend on weights (`tolist()`, a loop over the experts that were chosen) does
    not run on shapes alone; if it is small it is run on made-up weights instead.

    Args:
        model: any module, its weights real or on meta; they are neither read nor changed.
        inputs: CPU tensors, e.g. `input_ids` `(batch, seq)`.
    """
    try:
        return _record(model, inputs, real=False)
    except (RuntimeError, NotImplementedError, ValueError, IndexError, TypeError):
        if sum(parameter.numel() for parameter in model.parameters()) > LARGEST_MADE_UP:
            raise
        return _record(model, inputs, real=True)


def _record(model: nn.Module, inputs: Mapping[str, Tensor], *, real: bool) -> Trace:
    trace = Trace(made_up_weights=real)
    recorder = _Recorder(trace)
    stand_ins: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if real:
            stand_ins[name] = torch.empty(parameter.shape).normal_(0.0, 0.1, generator=generator)
        else:
            stand_ins[name] = torch.empty(parameter.shape, dtype=torch.float32, device="meta")
        trace.parameters[recorder.number(stand_ins[name])] = name
    trace.learnt.update(trace.parameters)
    for name, buffer in model.named_buffers():
        stand_ins[name] = buffer if buffer.is_meta and not real else _values_of(buffer)
        trace.buffers[recorder.number(stand_ins[name])] = name
    for name, tensor in inputs.items():
        trace.inputs[recorder.number(tensor)] = name
        trace.literals[recorder.number(tensor)] = tensor
    recorder.known.update(recorder.numbers.values())
    options = {"use_cache": False} if "use_cache" in inspect.signature(base_model(model).forward).parameters else {}
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            _spelled_out(base_model(model)),
            _no_autocast_on_meta(),
            _KeepConstants(),
            _module_paths(model, recorder),
            recorder,
        ):
            out = torch.func.functional_call(model, stand_ins, (), {**inputs, **options})
    finally:
        model.train(was_training)
    trace.outputs = [recorder.number(tensor) for tensor in _outputs(out)]
    return trace


def _values_of(buffer: Tensor) -> Tensor:
    return torch.zeros(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer.detach().cpu()


def _outputs(out: Any) -> list[Tensor]:
    """The logits where a model has some, else all that it returns."""
    logits = getattr(out, "logits", None)
    return [t for t in pytree.tree_leaves(out if logits is None else logits) if isinstance(t, Tensor)]
