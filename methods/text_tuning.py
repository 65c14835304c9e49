"""Naive gradient tuning of the text encoder.

The concept's prompt is encoded like its surrogate's:

min over theta   sum over templates, concepts   || E_theta(p(c)) - E(p(c*)) ||^2
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from erasebench.contracts import Brief
from erasebench.model.model import Model
from erasebench.toolbox.closed_form import filled
from erasebench.toolbox.training import Optimisation, fine_tune, tuned


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
        draws = torch.randint(len(pairs), (self.steps, self.batch), generator=generator).tolist()

        def loss(step: int) -> Tensor:
            with model.teacher():
                target = model.encode([pairs[i][1] for i in draws[step]]).hidden
            return (model.encode([pairs[i][0] for i in draws[step]]).hidden - target).square().mean()

        adam = partial(torch.optim.Adam, lr=self.lr)
        fine_tune(model, r"^text_encoder\.", loss, Optimisation(self.steps, adam), out, "text_tuning")

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)
