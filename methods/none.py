"""The base model itself: the reference that every other row is read against."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from erasebench.contracts import Brief
from erasebench.model.model import Model


@dataclass(frozen=True)
class NoErasure:
    """Changes nothing; the one method that may."""

    version: ClassVar[int] = 1
    is_base: ClassVar[bool] = True

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        pass

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return nullcontext()
