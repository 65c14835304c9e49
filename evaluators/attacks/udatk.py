"""UnlearnDiffAtk (Zhang et al., ECCV 2024).

It searches for tokens before the prompt that make the erased model denoise an image of the concept. The search runs on
the simplex over the vocabulary.

    min over u    || eps - eps_erased(x_t, t, [u, prompt]) ||^2                                           (Eq. 5)

t goes up a grid; u and Adam's state persist; after each t the most probable tokens are tried with one image. Departs
from the released code: start and end tokens are not candidates; the projection sorts (exact) and does not bisect.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from erasebench.contracts import AttackCost, Found, Scene, SearchCost
from erasebench.model.model import Model
from erasebench.toolbox.search import (
    FREE,
    AttackLoss,
    Bench,
    Objective,
    descend,
    shots,
    simplex,
    table,
    tokens,
    two_encoders,
    words,
)


def grid(count: int, train: int = 1000) -> list[int]:
    """Return `count` timesteps, each in the middle of an equal part. They are 10, 30, ..., 990 for 50."""
    return [(2 * i + 1) * train // (2 * count) for i in range(count)]


def prefix_length(tokens: int | None, scene: Scene) -> int:
    """Return the number of free tokens.

    If not given, it is the released one: 5 for explicit content, 3 for styles and objects.
    """
    return tokens or (5 if any(concept.kind == "explicit" for concept in scene.concepts.values()) else 3)


@dataclass(frozen=True)
class UDAtk:
    """Search for tokens before the prompt by UnlearnDiffAtk.

    pre-ASR counts as success (as in the published ASR): a prompt that works unchanged stays unchanged.
    """

    tokens: int | None = None  # None: as released
    timesteps: int = 50
    iterations: int = 40
    lr: float = 0.01
    weight_decay: float = 0.1  # Adam's, in the gradient
    objective: Objective = "auto"
    version: ClassVar[int] = 1
    stops: ClassVar[bool] = True
    access: ClassVar[tuple[str, ...]] = ("unet gradient", "text encoder gradient", "concept images", "detector")
    shared: ClassVar[bool] = False

    @property
    def images(self) -> int:
        return self.timesteps + 1

    def skip(self, model: Model) -> str:
        return two_encoders(model)

    def attack_cost(self, prompts: int, concepts: int) -> AttackCost:
        return AttackCost(SearchCost(gradient=self.timesteps * self.iterations, images=self.timesteps + 1, kept=1))

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        count = prefix_length(self.tokens, scene)
        rows = [[*[FREE] * count, *tokens(model, p.text)] for p in scene.prompts]
        bench, known = Bench(model, scene, self, rows, AttackLoss(self.objective)), words(model)
        yield from ((i, Found(outcome="too long")) for i in bench.long)
        yield from (
            (i, shots(p, p.text)) for i, p in enumerate(scene.prompts) if scene.before[i] and i not in bench.long
        )
        u = [
            torch.full((count, len(known)), 1 / len(known), dtype=model.dtype, device=model.device) for _ in rows
        ]
        optimiser = torch.optim.Adam(u, lr=self.lr, weight_decay=self.weight_decay)
        times = grid(self.timesteps, len(model.alphas_cumprod))

        def step(active: list[int], turn: int) -> None:
            t = torch.full((len(active),), times[turn], device=model.device)
            vocabulary = table(model)[known]
            for _ in range(self.iterations):
                chance = torch.stack([u[i] for i in active]).cumsum(-1)
                drawn = bench.draws.uniform(active, count, 1)
                chosen = torch.searchsorted(chance, drawn).clamp(max=len(known) - 1)[..., 0]
                gradients = bench.gradients(active, t, list(known[chosen]))
                optimiser.zero_grad()
                for i, gradient in zip(active, gradients, strict=True):
                    u[i].grad = F.hardtanh(gradient @ vocabulary.T)  # straight through the draw
                optimiser.step()
                for i, projected in zip(active, simplex(torch.stack([u[i] for i in active])), strict=True):
                    u[i].copy_(projected)

        read = lambda i: bench.read(i, known[u[i].argmax(-1)]) if torch.isfinite(u[i]).all() else None
        active = [i for i in range(len(rows)) if not scene.before[i] and i not in bench.long]
        for i, text, outcome in descend(model, scene, active, self.timesteps, step, read, "udatk"):
            yield i, shots(scene.prompts[i], text, outcome)
