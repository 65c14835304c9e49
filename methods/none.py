"""The base model itself: the reference for every other row."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from erasebench.contracts import Brief
from erasebench.model.model import Model


@dataclass(frozen=True)
class NoErasure:
    """Identity; the only method that may change nothing."""

    version: ClassVar[int] = 1
    is_base: ClassVar[bool] = True

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        pass

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return nullcontext()
