"""Map a function over shards. In this process; other executors will take the same call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from tqdm import tqdm

A, B = TypeVar("A"), TypeVar("B")


def run_all(function: Callable[[A], B], items: Sequence[A], label: str, workers: int = 1) -> list[B]:
    """Results in the order of items; a progress bar after two seconds if there is a terminal.

    Several workers are threads with one thread of torch each: small operations are not worth
    splitting over cores, and a shard's images do not depend on how many are made beside it.
    """
    bar = lambda results: tqdm(results, label, len(items), disable=None, delay=2, leave=False)
    if workers == 1 or len(items) < 2:
        return [function(item) for item in bar(items)]
    before = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:
        try:
            return list(bar(pool.map(function, items)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(before)  # part of it is the process's, not the thread's
