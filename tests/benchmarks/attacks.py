"""An attack on many prompts: together, and the same code one prompt at a time."""

from __future__ import annotations

import numpy as np
from erasebench.evaluators.attacks.udatk import UDAtk
from measure import embedded, peak_memory, record, seconds

from erasebench.contracts import Concept, Prompt, Sampler, Scene
from erasebench.store.local import Store


def main(count: int = 20) -> None:
    model = embedded()
    prompts = tuple(Prompt(str(i), "a photo of the cat", i, "target", "cat") for i in range(count))
    pictures = model.sample([p.text for p in prompts], [p.seed for p in prompts], Sampler("ddim", 5, 4.0)).images
    attack = UDAtk(tokens=3, timesteps=1, iterations=10)
    nothing = lambda sampled, asked: (np.zeros(len(asked), bool), np.zeros(len(asked)))

    def run(which: slice) -> None:
        shown = prompts[which]
        scene = Scene(
            prompts=shown,
            before=np.zeros(len(shown), bool),
            pictures=pictures[which],
            known={"cat": pictures},
            concepts={"cat": Concept("cat", "object", "grass")},
            templates=("a {c}",),
            sampler=Sampler("ddim", 5, 4.0),
            seed=0,
            together=count,
            store=Store(),
            identity={},
            hit=nothing,
            allows=lambda text: True,
        )
        assert len(list(attack.run(model, scene))) == len(shown)

    what, times = f"UDAtk, {count} prompts, 10 iterations and an image each", {}
    for label, parts in (("together", [slice(count)]), ("in turn", [slice(i, i + 1) for i in range(count)])):
        with peak_memory(what, label), seconds() as took:
            for part in parts:
                run(part)
        times[label] = took[0]
        record(what, label, took[0], "s")
    record(what, "in turn / together", times["in turn"] / times["together"], "times")
