"""Side effects of an erasure: ranks a world's words by how far their noise predictions moved.

python -m erasebench moved method=uce target=cat
python -m erasebench moved method=checkpoint method.path=/somebody/elses/model target=cat

A word's change is E |eps_changed(z, t, word) - eps(z, t, word)|^2 over pure noise at random t. Its unit is the words'
average signal, the mean over all of them of E |eps(z, t, word) - eps(z, t, "")|^2 (in units of a word's own signal,
words with hardly any would come first). All words are tried on two draws of the noise, the quarter that moved most on
twice as many, and so on: N words cost about 8 N U-Net evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..model.context import join
from ..model.model import Model
from ..rows import Row
from ..run.session import Session
from ..run.specification import Run
from ..store.local import Store
from ..toolbox import vocabulary

SHOWN = 20


@torch.no_grad()
def moved(model: Model, texts: Sequence[str], last: int = SHOWN, draws: int = 2, seed: int = 0) -> dict[str, float]:
    """Return text -> change for the `last` texts that moved most.

    The largest change comes first. `model` is changed; its teacher is the base.
    """
    left, generator, batch, unit = list(dict.fromkeys(texts)), torch.Generator().manual_seed(seed), 64, None
    while True:
        seen: list[Tensor] = []
        z = model.noise(torch.randint(2**31, (draws,), generator=generator).tolist())
        t = torch.randint(len(model.alphas_cumprod), (draws,), generator=generator).to(z.device)
        with model.teacher():
            empty = model.eps(z, t, model.unconditional().repeat(draws))
        per = max(1, batch // draws)
        for i in range(0, len(left), per):
            seen.append(change(model, left[i : i + per], z, t, empty))
        far, said = torch.cat(seen, 1)
        unit = said.mean() if unit is None else unit  # over all words, not only the remaining ones
        found = dict(zip(left, (far / unit).tolist(), strict=True))
        left = sorted(found, key=found.get, reverse=True)[: max(last, len(left) // 4)]
        if len(left) == len(found) or len(left) <= last:
            return {text: found[text] for text in left[:last]}
        draws *= 2


def change(model: Model, texts: Sequence[str], z: Tensor, t: Tensor, empty: Tensor) -> Tensor:
    """Return each text's change, and the base's own signal.

    The change is the distance of the predictions from the base's, and the signal is the distance of the base's
    predictions from those without a prompt, `empty`. Both are mean squares [2, N] over the same noise z [n, C, h, w]
    at t [n].
    """
    count = len(texts)
    many = lambda x: x.repeat(count, *[1] * (x.ndim - 1))
    spread = lambda context: join(*(context.select(slice(i, i + 1)).repeat(len(z)) for i in range(count)))
    with model.teacher():
        before = model.eps(many(z), many(t), spread(model.encode(texts)))
    now = model.eps(many(z), many(t), spread(model.encode(texts)))
    energy = lambda difference: difference.square().flatten(1).mean(1).view(count, -1).mean(1)
    return torch.stack([energy(now - before), energy(before - many(empty))])


def job(run: Run) -> list[Row]:
    session, brief = Session(run, Store()), run.plan.brief
    try:
        model = session.erased()
        # a world's vocabulary, and the names that its task keeps; the erased concepts are shown too, and marked
        known = vocabulary.words(model, replace(brief, concepts=()), "captions" if brief.captions else "tokenizer")
        # synonyms included, which the brief hides, and the word of a concept that is given by reference images
        asked = {text for c in (*brief.concepts, *run.plan.concepts) for text in (c.name, *c.synonyms)}
        ranked = moved(model, [*asked, *known, *brief.preserved], SHOWN + len(asked))
    finally:
        session.close()
    print(f"{run.method} on {run.source.name}: what moved most of {len({*asked, *known, *brief.preserved})} words")
    for text, far in ranked.items():
        note = "asked for" if text in asked else "kept by the task" if text in brief.preserved else ""
        print(f"  {far:8.3f}  {text:24} {note}".rstrip())
    return []
