"""SalUn (Fan et al., ICLR 2024): relabel the concept by training its salient weights alone.

    m = 1( |grad_theta L_m| >= gamma ),   L_m = || eps - [eps_theta(x_t) + s (eps_theta(x_t, c) - eps_theta(x_t))] ||^2
    min over theta   || eps_theta(x_t, c) - eps_theta(x_t, c') ||^2 + alpha || eps - eps_theta(x_t, c_r) ||^2
    theta <- theta - lr m * Adam(...)

x_t: noisy images of c, or of the retain set, c_r. c': the same prompt with another thing in it, the concept's surrogate
(the paper uses another class of the task: `surrogate=dog`); its prediction is the current model's own, without a
gradient. gamma keeps the share `salient` of all weights; the gradient is summed over all images of c before its
absolute value is taken.

variant=released reproduces the data order of the public code until February 2026, the source of the papers' baselines:
every step uses the same first images of c, and for explicit content also the same first images of the retain set.
Departures from that code: the base draws its own images from training templates, in place of Imagenette's, and the
noise is added to the sampler's latents, so that both predictions of a pair see one x_t (there the image was encoded
twice, at random).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from erasebench.contracts import Brief, Sampler
from erasebench.model.context import Context
from erasebench.model.memory import Term, add_gradients
from erasebench.model.model import Model
from erasebench.progress import track
from erasebench.toolbox.closed_form import filled
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
    mean_square,
    noised,
    shuffled,
    tuned,
)
from erasebench.toolbox.vocabulary import kept_prompts


@dataclass(frozen=True)
class SalUn:
    """Unlearning of the salient weights.

    pictures: number of images of the concept. kept: number of retained images, from preserved names and captions or, as
    published for explicit content, from prompts with its surrogate. epochs: over the images of the concept. keep_scale:
    alpha. mask_guidance: s. guidance, ddim_steps: of the images.
    """

    variant: Literal["fixed", "released"] = "fixed"  # released: the same first images in every step
    pictures: int = 950  # of the concept; Imagenette has as many of a class
    kept: int = 8500  # of the retain set, likewise
    epochs: int = 5
    batch: int = 8  # of each of the two terms
    lr: float = 1e-5
    keep_scale: float = 0.5
    salient: float = 0.5  # share of the weights that is trained
    mask_guidance: float = 8.5  # of the prediction whose gradient gives the mask
    guidance: float = 7.5
    ddim_steps: int = 50
    version: ClassVar[int] = 2

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator, sampler = torch.Generator().manual_seed(seed), Sampler("ddim", self.ddim_steps, self.guidance)
        named = [(filled(t, c.name), filled(t, c.surrogate)) for t in brief.templates for c in brief.concepts]
        texts, others = zip(*(named[i % len(named)] for i in range(self.pictures)), strict=True)
        forget = drawn(model, texts, generator, sampler).to("cpu")
        explicit = all(concept.kind == "explicit" for concept in brief.concepts)
        shown = [others[i % len(others)] for i in range(self.kept)] if explicit else None
        retain = drawn(model, shown or kept_prompts(brief, self.kept, generator), generator, sampler).to("cpu")
        other = encoded(model, others).to("cpu")
        mask = saliency(self.gradient(model, forget, generator), self.salient)
        orders = [shuffled(len(p.z), self.batch, generator) for p in (forget, retain)]
        if self.variant == "released":
            orders[0] = repeat(torch.arange(min(self.batch, len(forget.z))))
            orders[1] = repeat(torch.arange(min(self.batch, len(retain.z)))) if explicit else orders[1]

        def loss(step: int) -> list[Term]:
            which, kept = (next(order) for order in orders)
            shown, instead, retained = (
                x.to(model.device) for x in (forget.select(which), other.select(which), retain.select(kept))
            )
            erased = unlearning(model, shown, instead, generator)
            return [erased, denoising(model, retained, generator).times(self.keep_scale)]

        def salient_only(weights) -> None:
            for name, weight in weights.items():
                weight.grad *= mask[name].to(weight.device)

        steps = self.epochs * -(-self.pictures // self.batch)
        adam = partial(torch.optim.Adam, lr=self.lr)
        fine_tune(model, TRAINED["full"], loss, Optimisation(steps, adam, salient_only), out, "salun")

    def gradient(self, model: Model, pictures: Pictures, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the gradient of L_m, summed over all images."""
        with model.training(model.names(TRAINED["full"])) as weights, light(model, weights.values()):
            found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
            for which in track(torch.arange(len(pictures.z)).split(self.batch), "saliency"):
                part = pictures.select(which).to(model.device)
                error = partial(self.guided_error, model, part.context, *noised(model, part.z, generator))
                term = mean_square(len(which), error)._replace(graphs=2)
                add_gradients(model, [term], weights.values(), partial(checked, title="salun"))
                for name, weight in weights.items():
                    found[name] += weight.grad
                    weight.grad = None
            return found

    def guided_error(
        self, model: Model, context: Context, z: Tensor, t: Tensor, noise: Tensor, rows: slice
    ) -> Tensor:
        """Return the error of the guided prediction: [B, C, h, w].

        rows: selected samples.
        """
        text = model.eps(z[rows], t[rows], context.select(rows))
        free = model.eps(z[rows], t[rows], model.unconditional().repeat(len(text)))
        return free + self.mask_guidance * (text - free) - noise[rows]

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)


def saliency(gradient: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return masks of the largest gradients: bool, on the CPU.

    Shapes are the gradient's. The masks select the `share` of all its entries with the largest absolute value.
    """
    sizes = torch.cat([g.abs().flatten().cpu() for g in gradient.values()])
    least = sizes.kthvalue(len(sizes) - max(1, round(share * len(sizes))) + 1).values
    return {name: (g.abs() >= least.to(g)).cpu() for name, g in gradient.items()}


def unlearning(model: Model, pictures: Pictures, other: Context, generator: torch.Generator) -> Term:
    """Return the loss between predictions for two prompts.

    The images' own prompts are trained towards the other prompts, whose prediction has no gradient.
    """
    z, t, _ = noised(model, pictures.z, generator)
    with torch.no_grad():
        target = model.eps(z, t, other)
    return mean_square(
        len(z), lambda rows: model.eps(z[rows], t[rows], pictures.context.select(rows)) - target[rows]
    )
