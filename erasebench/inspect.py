"""What did an erasure move that nobody asked for? Ranks a world's words by how far their noise predictions moved.

python -m erasebench.inspect method=uce target=cat
python -m erasebench.inspect method=checkpoint method.path=/somebody/elses/model target=cat

A word's change is E |eps_changed(z, t, word) - eps(z, t, word)|^2 / E |eps(z, t, word) - eps(z, t, "")|^2, over pure
noise at random t: how far it moved, measured by how much the word says at all. All words are tried on two draws of the
noise, the quarter that moved most on twice as many, and so on: N words cost about 8 N U-Net evaluations.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import config, vocabulary
from .model import Model, join
from .rows import Row
from .run import Erased, Run
from .store import Store

SHOWN = 20


@torch.no_grad()
def moved(model: Model, texts: Sequence[str], last: int = SHOWN, draws: int = 2, seed: int = 0) -> dict[str, float]:
    """text -> change, the `last` that moved most, the most first. `model` is changed; its teacher is the base."""
    left, generator, batch = list(dict.fromkeys(texts)), torch.Generator().manual_seed(seed), 64
    while True:
        found: dict[str, float] = {}
        z = model.noise(torch.randint(2**31, (draws,), generator=generator).tolist())
        t = torch.randint(len(model.alphas_cumprod), (draws,), generator=generator).to(z.device)
        with model.teacher():
            empty = model.eps(z, t, model.unconditional().repeat(draws))
        per = max(1, batch // draws)
        for i in range(0, len(left), per):
            part = left[i : i + per]
            found |= dict(zip(part, change(model, part, z, t, empty).tolist(), strict=True))
        left = sorted(found, key=found.get, reverse=True)[: max(last, len(left) // 4)]
        if len(left) == len(found) or len(left) <= last:
            return {text: found[text] for text in left[:last]}
        draws *= 2


def change(model: Model, texts: Sequence[str], z: Tensor, t: Tensor, empty: Tensor) -> Tensor:
    """The change [N] of each text over the same noise z [n, C, h, w] at t [n], `empty` being the base without prompt."""
    count = len(texts)
    many = lambda x: x.repeat(count, *[1] * (x.ndim - 1))
    spread = lambda context: join(*(context.select(slice(i, i + 1)).repeat(len(z)) for i in range(count)))
    with model.teacher():
        before = model.eps(many(z), many(t), spread(model.encode(texts)))
    now = model.eps(many(z), many(t), spread(model.encode(texts)))
    energy = lambda difference: difference.square().flatten(1).mean(1).view(count, -1).mean(1)
    return energy(now - before) / energy(before - many(empty)).clamp(min=1e-12)


def job(run: Run) -> list[Row]:
    erased, brief = Erased(run, Store()), run.plan.brief
    try:
        model = erased.erased()
        # a world's vocabulary, and the names that its task keeps; what was asked for is shown, and marked
        known = vocabulary.words(model, replace(brief, concepts=()), "captions" if brief.captions else "tokenizer")
        asked = {text for concept in brief.concepts for text in (concept.name, *concept.synonyms)}
        ranked = moved(model, [*asked, *known, *brief.preserved], SHOWN + len(asked))
    finally:
        erased.close()
    print(f"{run.method} on {run.source.name}: what moved most of {len({*asked, *known, *brief.preserved})} words")
    for text, far in ranked.items():
        note = "asked for" if text in asked else "kept by the task" if text in brief.preserved else ""
        print(f"  {far:8.3f}  {text:24} {note}".rstrip())
    return []


if __name__ == "__main__":
    sys.exit(config.main(job, sys.argv[1:]))
