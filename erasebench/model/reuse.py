"""Cache of cross-attention keys and values within a trajectory.

Invariant: a cached result is returned only for the very tensors that it was computed from, unwritten since, and only as
long as the result itself is unwritten. A reused result is therefore bit-equal to a fresh one, regardless of processors,
guidance or `Model.teacher` within the trajectory. A tensor is identified by its identity, its address and torch's count
of writes (`_version`); all tensors of a key are kept alive with it, so that no address is used again. A trajectory's
memory belongs to one thread and ends with the trajectory. Nothing is cached while autograd records.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

A = TypeVar("A", bound=Tensor | tuple[Tensor | None, ...])


class _Trajectory(threading.local):
    """Memory of this thread's trajectory; None outside of one."""

    memory: dict | None = None


_trajectory = _Trajectory()


@contextmanager
def trajectory() -> Iterator[None]:
    """Let `once` cache results inside the `with`.

    The memory is new, even inside another trajectory."""
    before, _trajectory.memory = _trajectory.memory, {}
    try:
        yield
    finally:
        _trajectory.memory = before


def once(what: object, make: Callable[[], A], *inputs: Tensor) -> A:
    """Return make(), computed once a trajectory.

    It is computed again if inputs are other tensors, or if inputs or result have been written to. Outside `trajectory`,
    and while autograd records, it is computed anew each time.
    """
    if (
        torch.compiler.is_compiling()
    ):  # a compiler would have to trace addresses; on a GPU these projections cost next to nothing
        return make()
    memory = _trajectory.memory
    if memory is None or torch.is_grad_enabled():
        return make()
    versions = lambda made: [x._version for x in (made if isinstance(made, tuple) else (made,)) if x is not None]
    key = (what, *((id(x), x.data_ptr(), x._version) for x in inputs))
    if key not in memory or versions(memory[key][0]) != memory[key][1]:
        made = make()
        # inputs and their storage are kept alive, so that no address in the key is used again
        memory[key] = made, versions(made), inputs, [x.detach() for x in inputs]
    return memory[key][0]


class ContextLinear(torch.nn.Linear):
    """Projection of the context to keys or values, cached within a trajectory.

    The context is the same in every step."""

    def forward(self, context: Tensor) -> Tensor:
        weights = (p for p in (self.weight, self.bias) if p is not None)
        return once(self, lambda: super(ContextLinear, self).forward(context), context, *weights)
