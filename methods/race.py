"""RACE (Kim et al., ECCV 2024): adversarial training against embeddings near the concept.

    min over theta, max over |d| <= radius    || eps_theta(x_t, c + d) - [eps(x_t) - eta (eps(x_t, c) - eps(x_t))] ||^2

theta starts from ESD's weights (`first`), eps is the base, and x_t is sampled with the model in training. The
perturbation d is added to the text encoder's output. Projected gradient steps from a random start within the L-infinity
ball find it, at the one timestep t of x_t.

The paper's attack draws the prediction towards the noise in x_t, which is unknown for a sampled x_t. The released code
uses the noise x_T from the start of the trajectory instead, at any t (variant=released). Here d climbs the same loss
that theta descends. The released code's option for the number of steps has no effect; here it has. Its optional penalty
on the distance from the first weights, whose norm is not stated, is omitted.
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
    """Adversarial training that makes an ESD erasure robust.

    first: the ESD erasure; RACE trains the same weights. attack_step: step size as a fraction of the radius.
    """

    first: ESD = ESD()
    variant: Literal["erasing", "released"] = "erasing"  # released: it aims at the initial noise
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
        """Return the prompts with the adversarial embeddings that maximise `gain`.

        They stay within the radius and within each prompt's own minimum and maximum.
        """
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
