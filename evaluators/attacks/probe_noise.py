"""Noise probe (Lu et al., 2025).

The paper is "When are concepts erased from diffusion models?". Stronger noise along the trajectory leads out of the
region that an erasure has covered: eta above 1, and noise of more than unit variance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from erasebench.contracts import AttackCost, Found, Prompt, Sampler, Scene, SearchCost, Shot
from erasebench.model.model import Model, Sampled
from erasebench.tasks import seed_of
from erasebench.toolbox.search import Draws, number, steered


@dataclass(frozen=True)
class ProbeNoise:
    etas: tuple[float, ...] = (1.0, 1.28, 1.57, 1.85)
    variances: tuple[float, ...] = (1.0, 1.02, 1.04)
    version: ClassVar[int] = 1
    access: ClassVar[tuple[str, ...]] = ("sampler",)
    shared: ClassVar[bool] = True
    probe: ClassVar[bool] = True

    @property
    def images(self) -> int:
        return len(self.etas) * len(self.variances)

    def attack_cost(self, prompts: int, concepts: int) -> AttackCost:
        return AttackCost(SearchCost(images=self.images, kept=self.images))

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        for i, prompt in enumerate(scene.prompts):
            yield i, Found((Shot(prompt.text, prompt.seed),) * self.images)

    def draw(self, model: Model, shots: Sequence[Prompt], founds: Sequence[Found], sampler: Sampler) -> Sampled:
        grid = [(eta, variance) for eta in self.etas for variance in self.variances]
        eta, variance = torch.tensor([grid[number(p)] for p in shots], dtype=model.dtype, device=model.device).T
        draws, every = Draws(model, [seed_of("probe_noise", p.seed, number(p)) for p in shots]), range(len(shots))
        noise = lambda z: variance.sqrt().view(-1, 1, 1, 1) * draws.normal(every, *z.shape[1:])
        return steered(model, shots, sampler, lambda step, z, eps: step.ddim(z, eps, eta.view(-1, 1, 1, 1), noise(z)))
