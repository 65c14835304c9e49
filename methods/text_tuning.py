"""Naive gradient tuning of the text encoder: the concept's prompt is to be encoded as its surrogate's.

min over theta   sum over templates, concepts   || E_theta(p(c)) - E(p(c*)) ||^2
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from erasebench.closed_form import filled
from erasebench.contracts import Brief
from erasebench.model import Model


@dataclass(frozen=True)
class TextTuning:
    steps: int = 200
    batch: int = 8
    lr: float = 1e-5
    version: ClassVar[int] = 1

    def skip(self, model: Model) -> str:
        return "it trains one text encoder, and this model has two" if model.text_encoder_2 is not None else ""

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        pairs = [(filled(t, c.name), filled(t, c.surrogate)) for t in brief.templates for c in brief.concepts]
        with model.training(model.names(r"^text_encoder\.")) as weights:
            optimiser = torch.optim.Adam(weights.values(), lr=self.lr)
            draws = torch.randint(len(pairs), (self.steps, self.batch), generator=generator).tolist()
            for which in tqdm(draws, "text_tuning", disable=None, delay=2):
                with model.teacher():
                    target = model.encode([pairs[i][1] for i in which]).hidden
                loss = (model.encode([pairs[i][0] for i in which]).hidden - target).square().mean()
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
            save_file({n: w.data.contiguous().cpu() for n, w in weights.items()}, out / "weights.safetensors")

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return model.changed(weights=load_file(artifact / "weights.safetensors"))
