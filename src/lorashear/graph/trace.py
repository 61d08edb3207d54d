"""Records one run of a model as a list of ATen operators, without reading a weight.

Parameters are replaced by stand-ins on the *meta* device (shape only) for the time of the run. Whatever does not depend
on them (token ids, positions, masks) stays on the CPU and is computed for real, so that code which looks at such
values (`.item()`, boolean indexing) takes the path of a real run. A value that does depend on weights is made up.
"""

from __future__ import annotations

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

LARGEST_CONSTANT = 1 << 22
"""Elements up to which a factory call runs on the CPU; larger ones would cost memory and hold nothing worth knowing."""


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

    @property
    def name(self) -> str:
        """The operator without namespace, overload or in-place mark: `add` for `aten::add_.Tensor`."""
        return self.op._schema.name.split("::")[1].rstrip("_")

    @property
    def where(self) -> str:
        """Operator and module, for messages."""
        return f"{self.op._schema.name.split('::')[1]} in {self.module or 'the model'}"

    def inputs(self) -> list[int]:
        """Numbers of the tensors among the arguments."""
        leaves = pytree.tree_leaves((self.args, self.kwargs), is_leaf=lambda x: isinstance(x, Ref))
        return [leaf.number for leaf in leaves if isinstance(leaf, Ref)]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name, as ATen leaves defaults out."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)


@dataclass
class Trace:
    """What one run did: operators in order, and which tensors are what."""

    nodes: list[Node] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    """Shape of every tensor, by number."""
    parameters: dict[int, str] = field(default_factory=dict)
    buffers: dict[int, str] = field(default_factory=dict)
    inputs: dict[int, str] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)
    module_inputs: dict[str, int] = field(default_factory=dict)
    """Module path -> number of the first tensor it was called with."""


class _KeepConstants(TorchFunctionMode):
    """`torch.tensor(values, device="meta")` loses its values below the dispatcher; keep them on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "meta":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class _Recorder(TorchDispatchMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch is untyped here
        self.trace = trace
        self.modules: list[str] = []
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
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        unknown = any(t.is_meta or id(t) in self.stale for t in tensors)
        recorded = [Ref(self.number(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if unknown:
            leaves = [self._as_meta(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        run_args, run_kwargs = pytree.tree_unflatten(leaves, spec)
        out = self._run(func, run_args, run_kwargs, unknown)
        out = self._same_objects(func, args, run_args, out, unknown)
        outs = tuple(self.number(t) for t in pytree.tree_leaves(out) if isinstance(t, Tensor))
        if outs:
            node_args, node_kwargs = pytree.tree_unflatten(recorded, spec)
            module = self.modules[-1] if self.modules else ""
            self.trace.nodes.append(Node(func, node_args, node_kwargs, outs, module))
        return out

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

    def enter(module: nn.Module, args: Any) -> None:
        path = paths.get(id(module), recorder.modules[-1] if recorder.modules else "")
        recorder.modules.append(path)
        if args and isinstance(args[0], Tensor):
            recorder.trace.module_inputs.setdefault(path, recorder.number(args[0]))

    def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
        recorder.modules.pop()

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
def _eager_attention(model: Any) -> Iterator[None]:
    """Fused attention hides its inside; the eager one is the same function in operators with known equations."""
    config = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if before in (None, "eager") or not hasattr(model, "set_attn_implementation"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def record(model: nn.Module, inputs: Mapping[str, Tensor]) -> Trace:
    """Runs `model(**inputs)` once on stand-ins and returns what it did.

    Args:
        model: any module, its weights real or on meta; they are neither read nor changed.
        inputs: CPU tensors, e.g. `input_ids` `(batch, seq)`.
    """
    trace = Trace()
    recorder = _Recorder(trace)
    stand_ins: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        stand_ins[name] = torch.empty(parameter.shape, dtype=torch.float32, device="meta")
        trace.parameters[recorder.number(stand_ins[name])] = name
    for name, buffer in model.named_buffers():
        stand_ins[name] = buffer if buffer.is_meta else buffer.cpu()
        trace.buffers[recorder.number(stand_ins[name])] = name
    for name, tensor in inputs.items():
        trace.inputs[recorder.number(tensor)] = name
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            _eager_attention(base_model(model)),
            _KeepConstants(),
            _module_paths(model, recorder),
            recorder,
        ):
            out = torch.func.functional_call(model, stand_ins, (), {**inputs, "use_cache": False})
    finally:
        model.train(was_training)
    logits = out.logits if hasattr(out, "logits") else out
    trace.outputs = [recorder.number(t) for t in pytree.tree_leaves(logits) if isinstance(t, Tensor)]
    return trace
