"""Adaptive guided erasure (Bui et al., ICLR 2025): adaptive target words.

A concept is erased towards the word that suffers most from it:

    min over theta, max over pi    L1 + lambda L2
    L1 = w_t || eps_theta(z, c_e) - [eps(z, c_t) - eta (eps(z, c_e) - eps(z, c_t))] ||^2
    L2 = w_t || eps_theta(z_t, c_t) - eps(z_t, c_t) ||^2,    c_t = G(pi) R

As in AP, but the drawn word is the target itself. In the paper pi climbs both terms. The released code computes the
target without a gradient, so pi climbs L2 alone (variant=code).

mode=edit turns the concept into its surrogate: c_t is the surrogate, eta is 0, and pi seeks the word to preserve in L2
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from erasebench.methods.ap import SEARCH_SECONDS, Adversarial, distance
from torch import Tensor

from erasebench.contracts import Brief, FitCost
from erasebench.model.context import Context, join
from erasebench.model.model import Model
from erasebench.toolbox.training import TRAINED, erased_noise_target


@dataclass(frozen=True)
class AGE(Adversarial):
    """Adversarial erasure towards a drawn word.

    mode: erase, or edit. variant: objective of pi; `paper` is L1 + lambda L2, `code` is lambda L2. trained: x is the
    cross-attention, u everything else, like ESD's variant. Other parameters are AP's; search=random draws any of the
    candidates.
    """

    mode: Literal["erase", "edit"] = "erase"
    variant: Literal["paper", "code"] = "paper"
    trained: Literal["x", "u"] = "x"
    nearest: int = 100

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        once, each = self.count_sampling(concepts)
        climbs = 0 if self.search == "random" else self.searches
        seen = self.variant == "paper" and self.mode == "erase"  # the search sees the target
        samples = self.steps * self.batch
        forward = once + samples * (3 + climbs * (1 + 2 * seen) + (2 + 2 * climbs) * each)
        return FitCost(forward, samples * (2 + climbs * (1 + seen)), SEARCH_SECONDS)

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        play, editing = self.play(model, brief, seed), self.mode == "edit"
        eta = 0.0 if editing else self.eta
        with torch.no_grad():
            surrogates = model.encode([concept.surrogate for concept in brief.concepts])

        def loss(which: Tensor) -> Tensor:
            concept = play.concepts.select(which)
            for _ in range(self.searches if self.search == "gumbel" else 0):
                word, number = play.choice.draw(which)
                climbed = self.gain(model, play.to_concept(concept, which), play.to_word(word, number), concept, word)
                play.choice.climb(climbed)
            with torch.no_grad():
                word, number = play.choice.draw(which)
            (z, t), (z_t, t_t) = play.to_concept(concept, which), play.to_word(word, number)
            with model.teacher():
                target = surrogates.select(which) if editing else word
                text, aim, before = model.eps(
                    torch.cat([z, z, z_t]), torch.cat([t, t, t_t]), join(concept, target, word)
                ).chunk(3)
            erased, kept = model.eps(torch.cat([z, z_t]), torch.cat([t, t_t]), join(concept, word)).chunk(2)
            forget = distance(model, self.space, erased, erased_noise_target(aim, text, eta), t)
            return forget + self.preserve_scale * distance(model, self.space, kept, before, t_t)

        self.descend(model, play, TRAINED[self.trained], loss, out)

    def gain(
        self,
        model: Model,
        towards_concept: tuple[Tensor, Tensor],
        towards_word: tuple[Tensor, Tensor],
        concept: Context,
        word: Context,
    ) -> Tensor:
        """Return the objective of pi, a scalar.

        Its gradient with respect to the word is that of L1 + lambda L2 (or of lambda L2).
        """
        (z, t), (z_t, t_t) = towards_concept, towards_word
        with model.teacher():
            before = model.eps(z_t, t_t, word)
        hurt = self.preserve_scale * distance(model, self.space, model.eps(z_t, t_t, word), before, t_t)
        if self.variant == "code" or self.mode == "edit":
            return hurt
        with torch.no_grad():
            erased = model.eps(z, t, concept)
        parts = [part for part in (word.hidden, word.pooled) if part is not None]
        # the backward pass of the target needs the base's weights in place
        with model.teacher(), torch.enable_grad():
            aim = model.eps(z, t, word)
            target = erased_noise_target(aim, model.eps(z, t, concept), self.eta)
            slopes = torch.autograd.grad(distance(model, self.space, erased, target, t), parts)
        return hurt + sum((part * slope).sum() for part, slope in zip(parts, slopes, strict=True))
