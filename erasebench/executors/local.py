"""Executor protocol, and the executor in this process. `ray.Ray` has the same interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from ..progress import track

if TYPE_CHECKING:
    from ..run.session import Session

A, B = TypeVar("A"), TypeVar("B")
Work = Callable[["Session", A, int], B]


class Executor(Protocol):
    """Executor of work items.

    `map` returns work(session, item, beside) for every item, in order. `session` is the worker's session of the run,
    with the worker's own store: work holds neither a model nor a store, so that it can be sent to other processes.
    `beside` is the number of items that the same process works on concurrently; one if they must run `alone`.
    Exceptions raised by work are raised here.
    """

    def workers(self, device: str) -> int:
        """Return the number of workers that share the items run `alone`."""

    def map(
        self, session: Session, work: Work[A, B], items: Sequence[A], label: str, alone: bool = False
    ) -> list[B]: ...


@dataclass(frozen=True)
class Local:
    """Executor in this process.

    On the CPU, items run concurrently. On a GPU, they are sampled one after the other, but up to `ahead` earlier ones
    are stored and scored meanwhile."""

    ahead: int = 2

    def workers(self, device: str) -> int:
        return 1

    def map(self, session: Session, work: Work[A, B], items: Sequence[A], label: str, alone: bool = False) -> list[B]:
        if alone or session.run.device != "cpu":
            return run_all(
                lambda item: work(session, item, 1), items, label, 1 if alone else 1 + self.ahead, threads=None
            )
        beside = max(1, min(torch.get_num_threads(), len(items)))
        return run_all(lambda item: work(session, item, beside), items, label, beside)


def run_all(
    function: Callable[[A], B], items: Sequence[A], label: str, workers: int = 1, threads: int | None = 1
) -> list[B]:
    """Return the results in the order of items.

    A progress bar appears after two seconds if there is a terminal. Several workers are threads with one torch thread
    each, unless `threads` says otherwise: small operations are not worth splitting over cores, and a shard's images do
    not depend on the number made concurrently.
    """
    bar = lambda results: track(results, label, len(items), "shard")
    if workers == 1 or len(items) < 2:
        return [function(item) for item in bar(items)]
    before = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(threads or before)) as pool:
        try:
            return list(bar(pool.map(function, items)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(before)  # part of this setting belongs to the process, not to the thread
