"""Progress of long work: a bar on a terminal, elsewhere a line of the log every ten seconds."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger("erasebench")
EVERY = 10.0  # seconds between lines
T = TypeVar("T")
_parts: ContextVar[tuple[str, ...]] = ContextVar("parts", default=())


@contextmanager
def part(text: str) -> Iterator[None]:
    """Name the enclosed part of the work in every line."""
    token = _parts.set((*_parts.get(), text))
    try:
        yield
    finally:
        _parts.reset(token)


class Progress:
    """Progress of one loop; `update` after each item."""

    def __init__(self, label: str, total: int | None = None, unit: str = "step"):
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self.last = time.monotonic()
        self.bar = tqdm(total=total, desc=label, delay=2, leave=False) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, count: int = 1) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() - self.last >= EVERY:
            self.last = time.monotonic()
            of = "" if self.total is None else f" of {self.total}"
            log.info("%s: %s", self.label, ", ".join([*_parts.get(), f"{self.unit} {self.done}{of}"]))


def track(items: Iterable[T], label: str, total: int | None = None, unit: str = "step") -> Iterator[T]:
    """Yield the items and show how many are done; `total` is their number if they have no length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(label, total, unit) as progress:
        for item in items:
            yield item
            progress.update()
