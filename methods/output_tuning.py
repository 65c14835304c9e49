"""Naive gradient tuning of the output: the concept's prompt is answered like a neutral one.

min over theta   E_t,z   || eps_theta(z_t, t, c) - eps(z_t, t, c*) ||^2,   z_t on the base's trajectories towards c
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from erasebench.contracts import Brief, Sampler
from erasebench.model.model import Model
from erasebench.toolbox.training import TRAINED, Optimisation, fine_tune, tuned
from erasebench.toolbox.trajectory import walked


@dataclass(frozen=True)
class OutputTuning:
    """Fine-tuning of the U-Net towards the surrogate's noise prediction.

    As in ESD, variant x trains the cross-attention and u everything else. c* is the concept's surrogate.
    """

    variant: Literal["x", "u"] = "x"
    steps: int = 200
    batch: int = 4
    lr: float = 1e-5
    guidance: float = 3.0
    ddim_steps: int = 50
    trajectories: int = 100
    version: ClassVar[int] = 1

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            concepts = model.encode([concept.name for concept in brief.concepts])
            neutral = model.encode([concept.surrogate for concept in brief.concepts])
        seen = walked(model, concepts, self.trajectories, Sampler("ddim", self.ddim_steps, self.guidance), generator)
        rows = torch.randint(len(seen.t), (self.steps, self.batch), generator=generator)

        def loss(step: int) -> Tensor:
            z, t, c = (part[rows[step]] for part in seen)
            with model.teacher():
                target = model.eps(z, t, neutral.select(c))
            return (model.eps(z, t, concepts.select(c)) - target).square().mean()

        adam = partial(torch.optim.Adam, lr=self.lr)
        fine_tune(model, TRAINED[self.variant], loss, Optimisation(self.steps, adam), out, "output_tuning")

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)
