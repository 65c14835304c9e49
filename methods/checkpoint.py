"""A published erased model: its changed weights replace the base's.

They may belong to the U-Net and the text encoder.
"""

import json
import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file

from erasebench.contracts import Brief, ErasebenchError, FitCost
from erasebench.model.model import Model
from erasebench.toolbox import published_weights
from erasebench.toolbox.training import FILE, tuned

log = logging.getLogger("erasebench")


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a published erased model.

    path: a file or folder of weights (formats.py lists the formats), or a hub id. partial: a state dict may lack layers
    if layers of the same kind are there. scale: of a LoRA file's update. content: digest of the weights, which
    identifies them.
    """

    path: str | None = None
    partial: bool = False
    scale: float = 1.0
    content: str = ""
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "content", published_weights.content(published_weights.located(self.path)))

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        return FitCost()

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        if self.path is None:
            raise ErasebenchError(
                "method=checkpoint needs the erased model: give a file, a folder or a hub id with method.path="
            )
        remarks: dict[str, list[str]] = {}
        theirs = published_weights.weights_of(published_weights.located(self.path), model, self.partial, self.scale, remarks)
        theirs = {name: tensor.to(model.device, model.dtype).contiguous() for name, tensor in theirs.items()}
        changed = {name: w for name, w in theirs.items() if not torch.equal(w, model.weight(name))}
        if not changed:
            raise ErasebenchError(f"method.path={self.path}: holds the base's own weights; nothing was erased")
        by = {
            n: float((w - model.weight(n)).norm() / model.weight(n).norm().clamp(min=1e-12)) for n, w in changed.items()
        }
        most = sorted(by, key=by.get, reverse=True)[:5]
        parts = {part: sum(name.startswith(part) for name in changed) for part in ("unet", "text_encoder")}
        log.info(
            "checkpoint: %d of %d weights given, %d differ from the base (%s), by up to %.3g of their norm in %s",
            len(theirs),
            len(model.names("")),
            len(changed),
            ", ".join(f"{part} {n}" for part, n in parts.items()),
            by[most[0]],
            most[0],
        )
        for reason, keys in remarks.items():
            if keys:
                log.info("checkpoint: %s: %d keys or files, e.g. %s", reason, len(keys), keys[0])
        notes = {"changed": parts, "given": len(theirs), "most": {name: round(by[name], 6) for name in most}}
        notes["remarks"] = {reason: len(keys) for reason, keys in remarks.items() if keys}
        (out / "notes.json").write_text(json.dumps(notes))
        save_file({name: w.cpu() for name, w in changed.items()}, out / FILE)

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)
