"""Map a function over shards. In this process; other executors will take the same call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tqdm import tqdm

A, B = TypeVar("A"), TypeVar("B")


def run_all(function: Callable[[A], B], items: Sequence[A], label: str) -> list[B]:
    """Results in the order of items; a progress bar after two seconds if there is a terminal."""
    return [function(item) for item in tqdm(items, label, disable=None, delay=2, leave=False)]
