"""Selective Amnesia (Heng & Soh, NeurIPS 2023): forgetting by continual learning.

The model learns a substitute for the concept as a new task:

    L = DDPM(q(x | c_f), c_f) + DDPM(replay) + lambda sum_i F_i (theta_i - theta*_i)^2
    F = 1/N sum over x  ( sum over t  grad_theta || eps - eps_theta(x_t, c) ||^2 )^2,   at theta*, the base

q(x | c_f): images of the concept's surrogate, labelled with the concept's bare name. replay, and the x of F: the base's
own images of retained prompts. F covers all T timesteps of each of N images (fim=full), or `fim_steps` of them, drawn
anew for each image and weighted by T / fim_steps (fim=subsampled): the sum is then right on average, its square
somewhat too large.

Departures from the released code: all replayed prompts are used (there the first thousand of five), the gradient of the
penalty is added unscaled, F and the images stay in main memory until needed, and several concepts have surrogates of
their own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from erasebench.contracts import Brief, Sampler
from erasebench.model.memory import Term, add_gradients
from erasebench.model.model import Model
from erasebench.progress import track
from erasebench.toolbox.closed_form import filled
from erasebench.toolbox.search import errors, noisy
from erasebench.toolbox.training import (
    TRAINED,
    Optimisation,
    Pictures,
    checked,
    denoising,
    drawn,
    encoded,
    fine_tune,
    light,
    shuffled,
    tuned,
)
from erasebench.toolbox.vocabulary import kept_prompts


@dataclass(frozen=True)
class SelectiveAmnesia:
    """Continual learning with elastic weight consolidation and replay.

    variant: full trains the whole U-Net, u the parameters of ESD's variant u. pictures: number of images of the
    surrogates. replay: number of retained images; the first fim_pictures of them make F, fim_batch timesteps at a time.
    ewc: lambda. guidance, ddim_steps: of all images.
    """

    variant: Literal["full", "u"] = "full"
    steps: int = 12600  # 200 epochs of 63
    batch: int = 16  # of each of the two terms: 4 on 4 devices
    lr: float = 1.6e-4  # 1e-5 for each of 16, scaled as in the released code
    weight_decay: float = 0.01
    ewc: float = 50.0
    fim: Literal["full", "subsampled"] = "full"
    fim_pictures: int = 5000
    fim_steps: int = 50
    fim_batch: int = 8
    pictures: int = 1000
    replay: int = 5000
    guidance: float = 7.5
    ddim_steps: int = 50
    version: ClassVar[int] = 1

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator, sampler = torch.Generator().manual_seed(seed), Sampler("ddim", self.ddim_steps, self.guidance)
        named = [(c.name, filled(t, c.surrogate)) for t in brief.templates for c in brief.concepts]
        names, texts = zip(*(named[i % len(named)] for i in range(self.pictures)), strict=True)
        surrogates = drawn(model, texts, generator, sampler)._replace(context=encoded(model, names)).to("cpu")
        replayed = drawn(model, kept_prompts(brief, self.replay, generator), generator, sampler).to("cpu")
        fisher = self.fisher(model, replayed.select(slice(self.fim_pictures)), generator)
        before = {name: model.weight(name) for name in fisher}
        orders = [shuffled(len(p.z), self.batch, generator) for p in (surrogates, replayed)]

        def loss(step: int) -> list[Term]:
            both = [p.select(next(order)) for p, order in zip((surrogates, replayed), orders, strict=True)]
            return [denoising(model, pictures.to(model.device), generator) for pictures in both]

        def consolidate(weights) -> None:
            for name, weight in weights.items():
                weight.grad += 2 * self.ewc * fisher[name].to(weight.device) * (weight.data - before[name])

        adam = partial(torch.optim.AdamW, lr=self.lr, weight_decay=self.weight_decay)
        fine_tune(model, TRAINED[self.variant], loss, Optimisation(self.steps, adam, consolidate), out, "sa")

    def fisher(self, model: Model, pictures: Pictures, generator: torch.Generator) -> dict[str, Tensor]:
        """Return F of every trained weight, on the CPU.

        It is computed over images, with the current model.
        """
        total, every = len(model.alphas_cumprod), self.fim == "full"
        with model.training(model.names(TRAINED[self.variant])) as weights, light(model, weights.values()):
            found = {name: torch.zeros(weight.shape, dtype=weight.dtype) for name, weight in weights.items()}
            for i in track(range(len(pictures.z)), "fisher"):
                times = torch.arange(total) if every else torch.randperm(total, generator=generator)[: self.fim_steps]
                one = pictures.select([i]).to(model.device)
                shape = one.z.shape[1:]
                noise = [torch.randn(len(t), *shape, generator=generator) for t in times.split(self.fim_batch)]
                error = partial(self.error, model, one, times.to(one.z.device), torch.cat(noise).to(one.z))
                add_gradients(
                    model, [Term(error, len(times))], weights.values(), partial(checked, title="sa"), self.fim_batch
                )
                for name, weight in weights.items():
                    found[name] += (weight.grad * (total / len(times))).square().cpu() / len(pictures.z)
                    weight.grad = None
        return found

    def error(self, model: Model, one: Pictures, t: Tensor, noise: Tensor, rows: slice) -> Tensor:
        """Return the summed errors of one image at some timesteps.

        t: [T]. noise: [T, C, h, w]. rows: the timesteps.
        """
        z = noisy(model, one.z, t[rows], noise[rows])
        return errors(model.eps(z, t[rows], one.context.repeat(len(z))), noise[rows]).sum()

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)
