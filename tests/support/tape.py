"""Records work as CUDA graphs do, on any device: operators on fixed tensors, and nothing of the Python between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKS_THE_HOST = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.bincount.default,
    torch.ops.aten.unique_consecutive.default,
    torch.ops.aten._unique2.default,
}

_Result = TypeVar("_Result")


class Tape(TorchDispatchMode):
    """What ran while it was on. Fails on operators that a graph could not hold."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in ASKS_THE_HOST, f"{func} asks the host"
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """The same operators on the same tensors, results where they went the first time."""
        for func, args, kwargs, result in self._calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    assert old.shape == new.shape, (func, old.shape, new.shape)
                    old.copy_(new)


def taped(works: Sequence[Callable[[], _Result]]) -> list[Callable[[], _Result]]:
    """A `Recorder`."""
    return [_tape(work) for work in works]


def _tape(work: Callable[[], _Result]) -> Callable[[], _Result]:
    with Tape() as tape:
        result = work()

    def replay() -> _Result:
        tape.replay()
        return result

    return replay
