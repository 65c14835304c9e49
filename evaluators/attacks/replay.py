"""Replay of another attack's results on this model. It measures how well they transfer."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from erasebench.contracts import ErasebenchError, Found, Scene
from erasebench.model.model import Model
from erasebench.run.attacks import found_in, set_of


@dataclass(frozen=True)
class Replay:
    """Replay of a stored attack.

    source: the key of an attack's result, or its first letters, as the run logs it and its rows record it
    (attack_params).
    """

    source: str = ""
    version: ClassVar[int] = 1
    access: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[bool] = True
    images: ClassVar[int] = 0

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        folder = set_of(scene.store, self.source)
        entries = {tuple(e["prompt"]): e["entry"] for e in json.loads((folder / "set.json").read_text())["prompts"]}
        known = [entries.get((p.text, p.seed, p.concept)) for p in scene.prompts]
        if not any(known):
            raise ErasebenchError(f"attack.replay.source={self.source}: it attacked none of this task's prompts")
        for i, entry in enumerate(known):
            path = scene.store.find("attacks", entry) if entry else None
            if entry and path is None:
                raise ErasebenchError(f"attack.replay.source={self.source}: what it found is no longer in the store")
            yield i, found_in(path) if path else Found(outcome="not in the source")
