"""Adversarial preservation (Bui et al., NeurIPS 2024): keep the words most hurt by erasing.

    min over theta, max over pi    L1 + lambda L2
    L1 = w_t || eps_theta(z, c_e) - [eps(z) - eta (eps(z, c_e) - eps(z))] ||^2
    L2 = w_t || eps_theta(z_a, c_a) - eps(z_a, c_a) ||^2,    c_a = G(pi) R

with eps the frozen base, R the encodings of words near the concept and G a Gumbel-softmax draw. In turn, pi climbs L2
and theta descends the sum. w_t = (1 - abar) / abar at the drawn t (the released code takes abar at the start of the
sampler's step). The base's predictions are constants, also for pi, as released.

Departures from the released code: words are encoded once in memory, a step of pi samples only the latents that it
needs, several draws share a step, and words of the erased concepts are not candidates.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from erasebench.contracts import Brief, FitCost, Sampler
from erasebench.model.context import Context, join
from erasebench.model.model import Model
from erasebench.prompt_files import lines
from erasebench.toolbox import vocabulary
from erasebench.toolbox.training import TRAINED, Optimisation, erased_noise_target, fine_tune, tuned
from erasebench.toolbox.trajectory import Along, count_evaluations

SEARCH_SECONDS = 300  # for the search of words next to the concept


class Play(NamedTuple):
    """State of the game between the weights and pi.

    Erased concepts, the choice of the word, and noisy latents towards each.
    """

    names: list[str]
    concepts: Context
    choice: vocabulary.Choice
    to_concept: Along
    to_word: Along
    generator: torch.Generator


@dataclass(frozen=True)
class Adversarial:
    """Common parameters and training loop of AP and AGE.

    vocabulary    `tokenizer`, `captions`, a list, or a file with one word a line (the paper: 3000 English words)
    nearest, centres   number of words next to a concept, and number of candidates among them (`R`)
    search        `gumbel`; controls: `random`, any of the candidates, and in AP `pgd`, an embedding of no word
    temperature, mixed   of the draw, and number of words that it mixes: 1 is hard
    searches      steps of pi for one step of theta
    space         w_t: `x0` is (1 - abar) / abar, the error of the predicted image (released); `eps` is 1 (as printed)
    trajectories  None: z is sampled from the model in training, in every step; a number: from so many trajectories
                  of the base, sampled once
    """

    steps: int = 1000
    batch: int = 1
    lr: float = 1e-5
    eta: float = 1.0
    preserve_scale: float = 1.0  # lambda
    vocabulary: str | tuple[str, ...] = "tokenizer"
    nearest: int = 1000
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

    def count_sampling(self, concepts: int) -> tuple[int, int]:
        """Count U-Net evaluations: of the base's trajectories, and of each sample.

        Without trajectories, each sample needs a walk to a random step. For several concepts the count is an upper
        bound: they may share nearby words, which count once.
        """
        once, each = count_evaluations(self.ddim_steps, self.trajectories)
        if not self.trajectories:
            return once, each
        return once + 2 * self.ddim_steps * max(self.trajectories, concepts * self.centres), each

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", named(self.vocabulary))

    def play(self, model: Model, brief: Brief, seed: int) -> Play:
        generator = torch.Generator().manual_seed(seed)
        names = [concept.name for concept in brief.concepts]
        known = vocabulary.words(model, brief, self.vocabulary)
        lists = [vocabulary.candidates(model, known, name, self.nearest, self.centres) for name in names]
        choice = self.choice(model, lists, generator)
        with torch.no_grad():
            concepts = model.encode(names)
        sampler = Sampler("ddim", self.ddim_steps, self.start_guidance)
        along = [Along(model, of, sampler, generator, self.trajectories) for of in (concepts, choice.contexts)]
        return Play(names, concepts, choice, *along, generator)

    def choice(self, model: Model, lists: list[list[str]], generator: torch.Generator) -> vocabulary.Choice:
        return vocabulary.Choice(model, lists, generator, self.temperature, self.mixed, self.search_lr)

    def descend(self, model: Model, play: Play, trained: str, loss: Callable[[Tensor], Tensor], out: Path) -> None:
        """Train the weights that match `trained` on a loss.

        loss: function of concepts' numbers [B]; it gives pi its turn.
        """
        drawn = lambda: torch.randint(len(play.names), (self.batch,), generator=play.generator)
        adam = partial(torch.optim.Adam, lr=self.lr)
        fine_tune(
            model, trained, lambda step: loss(drawn()), Optimisation(self.steps, adam), out, type(self).__name__.lower()
        )
        (out / "words.json").write_text(json.dumps(dict(zip(play.names, play.choice.found(), strict=True))))

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)


@dataclass(frozen=True)
class AP(Adversarial):
    """Erasing with an adversarially chosen word to preserve.

    As in ESD, variant x trains the cross-attention and u everything else. eta is L1's negative guidance.
    """

    variant: Literal["x", "u"] = "x"
    search: Literal["gumbel", "random", "pgd"] = "gumbel"

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        once, each = self.count_sampling(concepts)
        climbs = 0 if self.search == "random" else self.searches
        samples = self.steps * self.batch
        return FitCost(once + samples * (3 + climbs + (2 + climbs) * each), samples * (2 + climbs), SEARCH_SECONDS)

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        play = self.play(model, brief, seed)
        with torch.no_grad():
            empty = model.unconditional().repeat(self.batch)

        def loss(which: Tensor) -> Tensor:
            for _ in range(self.searches if self.search != "random" else 0):
                word, number = play.choice.draw(which)
                play.choice.climb(self.hurt(model, *play.to_word(word, number), word))
            with torch.no_grad():
                concept, (word, number) = play.concepts.select(which), play.choice.draw(which)
            (z, t), (z_a, t_a) = play.to_concept(concept, which), play.to_word(word, number)
            with model.teacher():
                free, text, before = model.eps(
                    torch.cat([z, z, z_a]), torch.cat([t, t, t_a]), join(empty, concept, word)
                ).chunk(3)
            erased, kept = model.eps(torch.cat([z, z_a]), torch.cat([t, t_a]), join(concept, word)).chunk(2)
            forget = distance(model, self.space, erased, erased_noise_target(free, text, self.eta), t)
            return forget + self.preserve_scale * distance(model, self.space, kept, before, t_a)

        self.descend(model, play, TRAINED[self.variant], loss, out)

    def choice(self, model: Model, lists: list[list[str]], generator: torch.Generator) -> vocabulary.Choice:
        if self.search == "pgd":
            return vocabulary.Free(model, lists, generator, self.search_lr)
        return super().choice(model, lists, generator)

    def hurt(self, model: Model, z: Tensor, t: Tensor, word) -> Tensor:
        """Return L2 of a word, with gradient to it."""
        with model.teacher():
            before = model.eps(z, t, word)
        return distance(model, self.space, model.eps(z, t, word), before, t)


def named(given: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Return a vocabulary in its hashed form.

    That is its name, or the words themselves, independent of their file.
    """
    if isinstance(given, str):
        return given if given in ("tokenizer", "captions") else lines(given, "method.vocabulary")
    return tuple(given)


def distance(model: Model, space: str, ours: Tensor, theirs: Tensor, t: Tensor) -> Tensor:
    """Return the weighted mean squared difference of noise predictions.

    ours, theirs: [B, C, h, w] at t [B]. The weight is w_t.
    """
    error = (ours - theirs).square().flatten(1).mean(1)
    if space == "x0":
        alpha = model.alphas_cumprod[t].to(error.dtype)
        error = error * (1 - alpha) / alpha
    return error.mean()
