"""Naive gradient tuning of the output: the concept's prompt is to be answered as a neutral one.

min over theta   E_t,z   || eps_theta(z_t, t, c) - eps(z_t, t, c*) ||^2,   z_t on the base's trajectories towards c
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from erasebench.methods.esd import TRAINED
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from erasebench.contracts import Brief, Sampler
from erasebench.model import Model
from erasebench.trajectory import walked


@dataclass(frozen=True)
class OutputTuning:
    """variant x trains the cross-attention, u everything else, as in ESD; c* is the concept's surrogate."""

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
        with model.training(model.names(TRAINED[self.variant])) as weights:
            optimiser = torch.optim.Adam(weights.values(), lr=self.lr)
            rows = torch.randint(len(seen.t), (self.steps, self.batch), generator=generator)
            for row in tqdm(rows, "output_tuning", disable=None, delay=2):
                z, t, c = (part[row] for part in seen)
                with model.teacher():
                    target = model.eps(z, t, neutral.select(c))
                loss = (model.eps(z, t, concepts.select(c)) - target).square().mean()
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
            save_file({n: w.data.contiguous().cpu() for n, w in weights.items()}, out / "weights.safetensors")

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return model.changed(weights=load_file(artifact / "weights.safetensors"))
