"""Running a model's decoder layers one by one, on hidden states of one's own.

How the model calls a layer (masks, rotary tables) is taken down from the model's own forward pass, and it is tried out
before anything relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

_HIDDEN = "hidden_states"
_CLOSE = 1e-3
"""Relative difference below which a layer that is called again counts as giving the same."""


@dataclass(frozen=True)
class Layer:
    """A decoder layer, and how the model calls it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """The hidden states are left out of both; they come first, or by their name."""
    named: bool
    once: tuple[str, ...]
    """Of the modules asked for, those inside that see every token once, in the order in which they run."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """`(batch, seq, hidden)` to the same; the batch is as large as the one the call was taken down from."""
        hidden = hidden.clone()  # layers may write into what they are given
        if self.named:
            return hidden_out(self.module(*self.args, **self.kwargs, **{_HIDDEN: hidden}))
        return hidden_out(self.module(hidden, *self.args, **self.kwargs))


@dataclass
class _Seen:
    """One call of a layer in the model's own pass."""

    index: int
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool
    output: Tensor | None = None


def steppable(model: nn.Module, layers_path: str, paths: Sequence[str], inputs: Sequence[Tensor]) -> list[Layer] | None:
    """The layers, ready to be called; None where they need more than each other's output.

    Args:
        model: in evaluation mode.
        layers_path: of the list of decoder layers.
        paths: modules to watch; those that see every token once are named by their layer.
        inputs: one or two batches of token ids, `(batch, seq)`: what else a layer is given has to be the same for both.
    """
    modules = list(model.get_submodule(layers_path).children())
    order: list[tuple[str, int]] = []
    with watched(model, paths, lambda path, features, _: order.append((path, features.flatten(0, -2).shape[0]))):
        seen = _calls(model, modules, inputs[0])
    if seen is None or [call.index for call in seen] != list(range(len(modules))):
        return None
    if not all(_close(before.output, call.hidden) for before, call in pairwise(seen)):
        return None
    again = _calls(model, modules, inputs[-1])
    if again is None or not _same([(c.args, c.kwargs) for c in seen], [(c.args, c.kwargs) for c in again]):
        return None
    counts = {path: [rows for name, rows in order if name == path] for path in paths}
    runs = list(dict.fromkeys(path for path, _ in order))
    layers = []
    for call, module in zip(seen, modules, strict=True):
        own = f"{layers_path}.{call.index}."
        once = tuple(path for path in runs if path.startswith(own) and counts[path] == [inputs[0].numel()])
        layer = Layer(module, call.args, call.kwargs, call.named, once)
        if not _close(layer(call.hidden), call.output):
            return None
        layers.append(layer)
    return layers


def reached(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What `module` is given first when `run` is called, which ends there."""
    found: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = hidden_in(args, kwargs)
        assert given is not None
        found.append(given.clone())
        raise _Reached

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]


class _Reached(Exception):  # noqa: N818 -- not an error: it ends a pass early
    pass


@contextmanager
def watched(model: nn.Module, paths: Sequence[str], seen: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, `seen` is called with path, input and output whenever one of these modules runs."""

    def look(path: str) -> Callable[..., None]:
        return lambda _module, args, output: seen(path, args[0], output.clone())  # layers may add to it in place

    with ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_hook(look(path)).remove)
        yield


def _calls(model: nn.Module, modules: Sequence[nn.Module], input_ids: Tensor) -> list[_Seen] | None:
    """Every call of a layer in one pass, in order; None where one is not given hidden states."""
    seen: list[_Seen] = []
    strange: list[int] = []

    def before(index: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, named = hidden_in(args, kwargs), _HIDDEN in kwargs
        if hidden is None:
            strange.append(index)
            return
        rest = {name: value for name, value in kwargs.items() if name != _HIDDEN}
        seen.append(_Seen(index, hidden.clone(), args if named else args[1:], rest, named))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        if not strange:
            seen[-1].output = hidden_out(output).clone()

    with ExitStack() as stack:
        for index, module in enumerate(modules):
            stack.callback(module.register_forward_pre_hook(partial(before, index), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        model(input_ids=input_ids, use_cache=False)
    return None if strange else seen


def hidden_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden states that a layer is given: by their name, or first; None where that is no tensor."""
    found = kwargs[_HIDDEN] if _HIDDEN in kwargs else (args or (None,))[0]
    return found if isinstance(found, Tensor) else None


def hidden_out(output: Any) -> Tensor:
    """The hidden states of what a layer returns: alone, or first in a tuple."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def _close(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return False
    return bool((one.float() - other.float()).norm() <= _CLOSE * other.float().norm())


def _same(one: Any, other: Any) -> bool:
    """Whether two batches' calls are given the same, tensors by their values."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or bool(one == other)
