"""Null attack with other seeds for the same prompt. Its first image is the prompt's own, without any attack."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from erasebench.contracts import AttackCost, Found, Scene, SearchCost
from erasebench.model.model import Model
from erasebench.toolbox.search import shots


@dataclass(frozen=True)
class SeedSearch:
    images: int = 51  # as many as UnlearnDiffAtk shows
    version: ClassVar[int] = 1
    access: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[bool] = True

    def attack_cost(self, prompts: int, concepts: int) -> AttackCost:
        return AttackCost(SearchCost(images=self.images, kept=self.images))

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        for i, prompt in enumerate(scene.prompts):
            yield i, shots(prompt, prompt.text, count=self.images)
