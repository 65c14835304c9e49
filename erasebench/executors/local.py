"""Map work over shards: in this process. `cluster.Ray` takes the same call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from ..run.session import Session

A, B = TypeVar("A"), TypeVar("B")
Work = Callable[["Session", A, int], B]


class Executor(Protocol):
    """Where work is done.

    `map` gives work(session, item, beside) of every item, in their order. `session` is the run's as the worker holds it,
    with the worker's own store: work holds neither a model nor a store, so that it can be sent away. `beside` items are
    worked on at once by the same process; one where they must be `alone`. What work raises is raised here.
    """

    def workers(self, device: str) -> int:
        """How many share the items that are worked on alone."""

    def map(
        self, session: Session, work: Work[A, B], items: Sequence[A], label: str, alone: bool = False
    ) -> list[B]: ...


@dataclass(frozen=True)
class Local:
    """This process. On the CPU items are worked on side by side; on a GPU one after the other, but while the next is sampled
    up to `ahead` are stored and judged."""

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
    """Results in the order of items; a progress bar after two seconds if there is a terminal.

    Several workers are threads with one thread of torch each, unless told otherwise: small operations are not worth
    splitting over cores, and a shard's images do not depend on how many are made beside it.
    """
    bar = lambda results: tqdm(results, label, len(items), disable=None, delay=2, leave=False)
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
            torch.set_num_threads(before)  # part of it is the process's, not the thread's
