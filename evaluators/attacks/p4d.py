"""Prompting4Debugging (Chin et al., ICML 2024).

It searches for a prompt for which the erased model predicts the noise that the original model predicts for the
concept's prompt.

    min over tokens    || eps_erased(x_t, t, tokens) - eps_original(x_t, t, prompt) ||^2                    (Eq. 4)

Embeddings are continuous, and their gradient is taken at their nearest tokens (PEZ). P4D-N: free tokens alone; P4D-K:
one before every three tokens of the prompt. Departs from the released code: the candidates tried every `every` steps
are judged by the task's detector, not by similarity to one image, and a prompt that works is finished; x_0 is the mean
of the VAE's posterior, there a sample; start, end and padding tokens are not candidates.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from erasebench.contracts import AttackCost, Found, Scene, SearchCost
from erasebench.model.model import Model
from erasebench.toolbox.search import (
    FREE,
    AttackLoss,
    Bench,
    Objective,
    descend,
    nearest,
    shots,
    table,
    tokens,
    two_encoders,
    words,
)


class Continuous:
    """Embeddings [k, D] of each prompt's free tokens.

    They start from random tokens and are read as the nearest tokens by cosine.
    """

    def __init__(self, bench: Bench):
        self.bench, self.known = bench, words(bench.model)
        self.among = table(bench.model)[self.known].detach()
        start = [bench.draws.integers([i], 0, len(self.known), k)[0] for i, k in enumerate(bench.counts)]
        self.values = [self.among[ids].clone() for ids in start]

    def ids(self, which: list[int]) -> list[Tensor]:
        among = nearest(torch.cat([self.values[i] for i in which]), self.among)
        return list(self.known[among].split([self.bench.counts[i] for i in which]))

    def gradients(self, which: list[int], t: Tensor) -> None:
        for i, gradient in zip(which, self.bench.gradients(which, t, self.ids(which)), strict=True):
            self.values[i].grad = gradient

    def read(self, i: int) -> str | None:
        return self.bench.read(i, self.ids([i])[0]) if torch.isfinite(self.values[i]).all() else None


def interleaved(row: list[int]) -> list[int]:
    """Insert a free token before each three tokens (P4D-K). There are len // 3 + 1 free tokens."""
    made = [token for j, own in enumerate(row) for token in ((FREE, own) if j % 3 == 0 else (own,))]
    return made if len(row) % 3 else [*made, FREE]


@dataclass(frozen=True)
class P4D:
    """P4D-N or P4D-K, judged by the task's detector.

    variant=released: images go into the VAE in [0, 1] and prompts are padded with token 0, as in the released code.
    """

    form: Literal["n", "k"] = "n"  # or k: a free token before every three of the prompt
    count: int = 16  # free tokens of P4D-N
    steps: int = 3000
    every: int = 50  # steps between two judged images
    lr: float = 0.1
    weight_decay: float = 0.1
    shown: int = 3
    objective: Objective = "auto"
    variant: Literal["fixed", "released"] = "fixed"
    version: ClassVar[int] = 1
    access: ClassVar[tuple[str, ...]] = ("unet gradient", "text encoder gradient", "original model", "detector")
    shared: ClassVar[bool] = False

    @property
    def images(self) -> int:
        return -(-self.steps // self.every) + self.shown

    def skip(self, model: Model) -> str:
        return two_encoders(model)

    def attack_cost(self, prompts: int, concepts: int) -> AttackCost:
        images = math.ceil(self.steps / self.every) + self.shown
        return AttackCost(SearchCost(self.steps, self.steps, images=images, kept=self.shown))

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        own = [tokens(model, p.text) for p in scene.prompts]
        rows = [interleaved(row) if self.form == "k" else [FREE] * self.count for row in own]
        latents, padding = None, None
        if self.variant == "released":
            latents, padding = model.encode_images(scene.pictures, (0.0,) * 3, (1.0,) * 3), 0
        bench = Bench(model, scene, self, rows, AttackLoss(self.objective, imitate=True, latents=latents), padding)
        yield from ((i, Found(outcome="too long")) for i in bench.long)
        x = Continuous(bench)
        optimiser = torch.optim.AdamW(x.values, lr=self.lr, weight_decay=self.weight_decay)

        def step(active: list[int], turn: int) -> None:
            for _ in range(min(self.every, self.steps - turn * self.every)):
                t = bench.draws.integers(active, 0, len(model.alphas_cumprod))
                optimiser.zero_grad()
                x.gradients(active, t)
                optimiser.step()

        active = [i for i in range(len(rows)) if i not in bench.long]
        for i, text, outcome in descend(model, scene, active, self.images - self.shown, step, x.read, "p4d"):
            yield i, shots(scene.prompts[i], text, outcome, self.shown)
