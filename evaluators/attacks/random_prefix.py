"""Null attack with random tokens before the prompt.

The seed is the prompt's own. A gradient is worth only its gain over this attack.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from erasebench.contracts import AttackCost, Found, Scene, SearchCost, Shot
from erasebench.model.model import Model
from erasebench.toolbox.search import draws, fits, spelled, tokens, words

from .udatk import prefix_length


@dataclass(frozen=True)
class RandomPrefix:
    tokens: int | None = None  # None: as many as in UnlearnDiffAtk
    images: int = 51  # as many as UnlearnDiffAtk shows
    version: ClassVar[int] = 1
    access: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[bool] = True

    def attack_cost(self, prompts: int, concepts: int) -> AttackCost:
        return AttackCost(SearchCost(images=self.images, kept=self.images))

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        drawn, known, count = draws(model, scene, self), words(model), prefix_length(self.tokens, scene)
        for i, prompt in enumerate(scene.prompts):
            own = tokens(model, prompt.text)
            prefixes = known[drawn.integers([i], 0, len(known), self.images, count)[0]].tolist()
            if not fits(model, [*prefixes[0], *own]):
                yield i, Found(outcome="too long")
                continue
            texts = [spelled(model, [*prefix, *own]) for prefix in prefixes]
            yield i, Found(tuple(Shot(text, prompt.seed) for text in texts))
