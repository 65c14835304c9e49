"""Adaptive guided erasure (Bui et al., ICLR 2025): erase a concept towards the word that suffers most from it.

    min over theta, max over pi    L1 + lambda L2
    L1 = w_t || eps_theta(z, c_e) - [eps(z, c_t) - eta (eps(z, c_e) - eps(z, c_t))] ||^2
    L2 = w_t || eps_theta(z_t, c_t) - eps(z_t, c_t) ||^2,    c_t = G(pi) R

As in AP, but the drawn word is the target itself. In the paper pi climbs both terms; in the released code the target is
computed without a gradient, so that pi climbs L2 alone (variant=code).

mode=edit turns the concept into its surrogate: that is c_t, eta is 0, and pi seeks the word to preserve in L2 alone.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from erasebench.methods.ap import distance, named
from erasebench.methods.esd import TRAINED
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from erasebench import vocabulary
from erasebench.contracts import Brief, Sampler
from erasebench.model import Context, Model, join
from erasebench.trajectory import Along


@dataclass(frozen=True)
class AGE:
    """mode: erase, or edit. variant: what pi climbs, `paper` L1 + lambda L2, `code` lambda L2. trained: x the
    cross-attention, u everything else, as ESD's variant. The rest is AP's; search=random draws any of the candidates."""

    mode: Literal["erase", "edit"] = "erase"
    variant: Literal["paper", "code"] = "paper"
    trained: Literal["x", "u"] = "x"
    steps: int = 1000
    batch: int = 1
    lr: float = 1e-5
    eta: float = 1.0
    preserve_scale: float = 1.0  # lambda
    vocabulary: str | tuple[str, ...] = "tokenizer"
    nearest: int = 100
    centres: int = 100
    search: Literal["gumbel", "random"] = "gumbel"
    searches: int = 1
    search_lr: float = 1e-2
    temperature: float = 2.0
    mixed: int = 1
    space: Literal["x0", "eps"] = "x0"
    start_guidance: float = 3.0
    ddim_steps: int = 50
    trajectories: int | None = None
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", named(self.vocabulary))

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        names = [concept.name for concept in brief.concepts]
        known = vocabulary.words(model, brief, self.vocabulary)
        lists = [vocabulary.candidates(model, known, name, self.nearest, self.centres) for name in names]
        choice = vocabulary.Choice(model, lists, generator, self.temperature, self.mixed, self.search_lr)
        sampler = Sampler("ddim", self.ddim_steps, self.start_guidance)
        editing = self.mode == "edit"
        eta = 0.0 if editing else self.eta
        with torch.no_grad():
            concepts, surrogates = model.encode(names), model.encode([c.surrogate for c in brief.concepts])
        to_concept = Along(model, concepts, sampler, generator, self.trajectories)
        to_word = Along(model, choice.contexts, sampler, generator, self.trajectories)
        with model.training(model.names(TRAINED[self.trained])) as weights:
            optimiser = torch.optim.Adam(weights.values(), lr=self.lr)
            for _ in tqdm(range(self.steps), "age", disable=None, delay=2):
                which = torch.randint(len(names), (self.batch,), generator=generator)
                concept = concepts.select(which)
                for _ in range(self.searches if self.search == "gumbel" else 0):
                    word, number = choice.draw(which)
                    choice.climb(self.gain(model, to_concept(concept, which), to_word(word, number), concept, word))
                with torch.no_grad():
                    word, number = choice.draw(which)
                (z, t), (z_t, t_t) = to_concept(concept, which), to_word(word, number)
                with model.teacher():
                    target = surrogates.select(which) if editing else word
                    text, aim, before = model.eps(
                        torch.cat([z, z, z_t]), torch.cat([t, t, t_t]), join(concept, target, word)
                    ).chunk(3)
                erased, kept = model.eps(torch.cat([z, z_t]), torch.cat([t, t_t]), join(concept, word)).chunk(2)
                loss = distance(model, self.space, erased, aim - eta * (text - aim), t)
                loss = loss + self.preserve_scale * distance(model, self.space, kept, before, t_t)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
            save_file({n: w.data.contiguous().cpu() for n, w in weights.items()}, out / "weights.safetensors")
        (out / "words.json").write_text(json.dumps(dict(zip(names, choice.found(), strict=True))))

    def gain(
        self,
        model: Model,
        towards_concept: tuple[Tensor, Tensor],
        towards_word: tuple[Tensor, Tensor],
        concept: Context,
        word: Context,
    ) -> Tensor:
        """What pi climbs: a number with the gradient of L1 + lambda L2 (or of lambda L2) to the word."""
        (z, t), (z_t, t_t) = towards_concept, towards_word
        with model.teacher():
            before = model.eps(z_t, t_t, word)
        hurt = self.preserve_scale * distance(model, self.space, model.eps(z_t, t_t, word), before, t_t)
        if self.variant == "code" or self.mode == "edit":
            return hurt
        with torch.no_grad():
            erased = model.eps(z, t, concept)
        parts = [part for part in (word.hidden, word.pooled) if part is not None]
        # the target is the base's, and autograd must find the base's weights when it goes back through it
        with model.teacher(), torch.enable_grad():
            aim = model.eps(z, t, word)
            target = aim - self.eta * (model.eps(z, t, concept) - aim)
            slopes = torch.autograd.grad(distance(model, self.space, erased, target, t), parts)
        return hurt + sum((part * slope).sum() for part, slope in zip(parts, slopes, strict=True))

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return model.changed(weights=load_file(artifact / "weights.safetensors"))
