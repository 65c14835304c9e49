"""Somebody else's erased model: a diffusers folder whose weights stand in for the base's."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file

from erasebench.contracts import Brief, ErasebenchError
from erasebench.model import Model, Source
from erasebench.training import FILE, tuned


@dataclass(frozen=True)
class Checkpoint:
    """path: a diffusers folder of the base's architecture. content: what is in it, which is what counts."""

    path: str | None = None
    content: str = ""
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "content", Source("other", Path(self.path)).identity()["content"])

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        if self.path is None:
            raise ErasebenchError("method=checkpoint needs the erased model: give a diffusers folder with method.path=")
        other = Model.load(Source("other", Path(self.path)))
        names = model.names("")
        if set(names) != set(other.names("")) or any(model.weight(n).shape != other.weight(n).shape for n in names):
            raise ErasebenchError(f"method.path={self.path}: not of the base's architecture, its weights do not fit")
        theirs = {name: other.weight(name).to(model.device, model.dtype) for name in names}
        changed = {name: w.contiguous().cpu() for name, w in theirs.items() if not torch.equal(w, model.weight(name))}
        save_file(changed, out / FILE)

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)
