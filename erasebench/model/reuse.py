"""Keys and values of the context, computed once in a trajectory.

The invariant: a remembered result is given again only for the very tensors that it was computed from, unwritten since,
and only as long as nobody has written into the result itself. So what is reused is bit-equal to what would be computed
anew, whatever processors, guidance or `Model.teacher` do within the trajectory. A tensor is known by its identity, its
address and torch's count of writes (`_version`); all that a key names is kept alive with it, so that no address is
used again. A trajectory's memory belongs to one thread and ends with it; where autograd records there is none.
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
    """The memory of the trajectory that this thread is in, if it is in one."""

    memory: dict | None = None


_trajectory = _Trajectory()


@contextmanager
def trajectory() -> Iterator[None]:
    """Within, `once` remembers: a new memory, even inside another trajectory."""
    before, _trajectory.memory = _trajectory.memory, {}
    try:
        yield
    finally:
        _trajectory.memory = before


def once(what: object, make: Callable[[], A], *inputs: Tensor) -> A:
    """make(), computed once in a trajectory as long as inputs and result are the same tensors, unwritten.

    Outside `trajectory`, and where autograd records, it is computed anew each time.
    """
    if (
        torch.compiler.is_compiling()
    ):  # it would have to trace addresses; a step more or less of keys costs a GPU nothing
        return make()
    memory = _trajectory.memory
    if memory is None or torch.is_grad_enabled():
        return make()
    versions = lambda made: [x._version for x in (made if isinstance(made, tuple) else (made,)) if x is not None]
    key = (what, *((id(x), x.data_ptr(), x._version) for x in inputs))
    if key not in memory or versions(memory[key][0]) != memory[key][1]:
        made = make()
        # inputs and their storage are kept, so that no address in the key is used again
        memory[key] = made, versions(made), inputs, [x.detach() for x in inputs]
    return memory[key][0]


class ContextLinear(torch.nn.Linear):
    """Keys or values of the context, which is the same in every step of a trajectory: projected in the first."""

    def forward(self, context: Tensor) -> Tensor:
        weights = (p for p in (self.weight, self.bias) if p is not None)
        return once(self, lambda: super(ContextLinear, self).forward(context), context, *weights)
