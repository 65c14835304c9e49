"""P4D as implemented in UnlearnDiffAtk's code.

Most papers report this version under the name P4D. Tokens come before the prompt; the grid of timesteps, step size and
test of success are UnlearnDiffAtk's, the target and projection P4D's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from erasebench.contracts import AttackCost, Found, Scene, SearchCost
from erasebench.model.model import Model
from erasebench.toolbox.search import FREE, AttackLoss, Bench, descend, shots, tokens

from .p4d import Continuous
from .udatk import UDAtk, grid, prefix_length


@dataclass(frozen=True)
class P4DUMU(UDAtk):
    access: ClassVar[tuple[str, ...]] = ("unet gradient", "text encoder gradient", "original model", "detector")

    def attack_cost(self, prompts: int, concepts: int) -> AttackCost:
        steps = self.timesteps * self.iterations
        return AttackCost(SearchCost(steps, steps, images=self.timesteps + 1, kept=1))

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        rows = [[*[FREE] * prefix_length(self.tokens, scene), *tokens(model, p.text)] for p in scene.prompts]
        bench = Bench(model, scene, self, rows, AttackLoss(self.objective, imitate=True))
        yield from ((i, Found(outcome="too long")) for i in bench.long)
        yield from (
            (i, shots(p, p.text)) for i, p in enumerate(scene.prompts) if scene.before[i] and i not in bench.long
        )
        x = Continuous(bench)
        optimiser = torch.optim.Adam(x.values, lr=self.lr, weight_decay=self.weight_decay)
        times = grid(self.timesteps, len(model.alphas_cumprod))

        def step(active: list[int], turn: int) -> None:
            t = torch.full((len(active),), times[turn], device=model.device)
            for _ in range(self.iterations):
                optimiser.zero_grad()
                x.gradients(active, t)
                optimiser.step()

        active = [i for i in range(len(rows)) if not scene.before[i] and i not in bench.long]
        for i, text, outcome in descend(model, scene, active, self.timesteps, step, x.read, "p4d_umu"):
            yield i, shots(scene.prompts[i], text, outcome)
