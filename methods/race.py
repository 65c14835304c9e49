"""RACE (Kim et al., ECCV 2024): make a finished erasure hold against embeddings near the concept's.

    min over theta, max over |d| <= radius    || eps_theta(x_t, c + d) - [eps(x_t) - eta (eps(x_t, c) - eps(x_t))] ||^2

theta starts as ESD leaves it (`first`), eps is the base, x_t comes from the model being trained, and d, which is added to
the text encoder's output, is found by projected gradient steps within the L-infinity ball, from a random start, at the
one t of x_t. The paper's attack draws the prediction towards the noise in x_t, which a sampled x_t does not tell; the released
code takes the noise x_T that its trajectory began with in its place, at any t (variant=released). Here d climbs the very
loss that theta descends. The released code's option for the number of steps has no effect; here it has. Its optional penalty
on the way from the first weights, whose norm is nowhere stated, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal

import torch
from erasebench.methods.esd import ESD
from torch import Tensor

from erasebench.contracts import Brief, Sampler
from erasebench.model.context import Context
from erasebench.model.model import Model
from erasebench.toolbox.search import errors
from erasebench.toolbox.training import TRAINED, Optimisation, erased_noise_target, fine_tune, tuned
from erasebench.toolbox.trajectory import midway


@dataclass(frozen=True)
class RACE:
    """first: whose erasure is made robust; the same weights are trained. attack_step: as a share of the radius."""

    first: ESD = ESD()
    variant: Literal["erasing", "released"] = "erasing"  # the attack climbs the loss; released: it aims at the noise that the latents began with
    steps: int = 1000
    batch: int = 1
    lr: float = 1e-5
    eta: float = 1.0
    radius: float = 0.1  # L-infinity, of the text encoder's output
    attack_step: float = 0.25
    attack_steps: int = 10
    start_guidance: float = 3.0
    ddim_steps: int = 50
    version: ClassVar[int] = 1

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            concepts = model.encode([concept.name for concept in brief.concepts])
            empty = model.unconditional().repeat(self.batch)
        sampler = Sampler("ddim", self.ddim_steps, self.start_guidance)

        def loss(step: int) -> Tensor:
            c = concepts.select(torch.randint(len(concepts.ids), (self.batch,), generator=generator))
            seeds = torch.randint(2**31, (self.batch,), generator=generator).tolist()
            z, t = midway(model, c, sampler, generator, seeds)
            with model.teacher():
                free, text = model.eps(z, t, empty), model.eps(z, t, c)
            target = erased_noise_target(free, text, self.eta)
            gain = lambda eps: errors(eps, target).sum()
            if self.variant == "released":
                start = model.noise(seeds)
                gain = lambda eps: -errors(eps, start).sum()
            attacked = self.attack(model, z, t, c, gain, generator)
            return (model.eps(z, t, attacked) - target).square().mean()

        adam = partial(torch.optim.Adam, lr=self.lr)
        with TemporaryDirectory() as folder:
            self.first.fit(model, brief, Path(folder), seed)
            with tuned(model, Path(folder)):
                fine_tune(model, TRAINED[self.first.variant], loss, Optimisation(self.steps, adam), out, "race")

    def attack(
        self,
        model: Model,
        z: Tensor,
        t: Tensor,
        context: Context,
        gain: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> Context:
        """The prompts within the radius, and within each one's own least and greatest number, that gain most."""
        c = context.hidden
        low, high = c.amin((1, 2), keepdim=True), c.amax((1, 2), keepdim=True)
        within = lambda x: x.maximum(c - self.radius).minimum(c + self.radius).maximum(low).minimum(high)
        hidden = within(c + self.radius * (2 * torch.rand(c.shape, generator=generator).to(c) - 1))
        for _ in range(self.attack_steps):
            hidden.requires_grad_(True)
            slope = torch.autograd.grad(gain(model.eps(z, t, context._replace(hidden=hidden))), hidden)[0]
            hidden = within(hidden.detach() + self.attack_step * self.radius * slope.sign())
        return context._replace(hidden=hidden)

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)
