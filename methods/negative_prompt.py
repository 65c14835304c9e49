"""Negative prompt: the concept replaces the empty prompt of classifier-free guidance.

Names that do not fit into one context are split into chunks, and the encodings are averaged. The artifact holds the
chunks.
"""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from erasebench.contracts import Brief, FitCost
from erasebench.model.guidance import ClassifierFree
from erasebench.model.model import Model


@dataclass(frozen=True)
class NegativePrompt:
    """Classifier-free guidance: eps(neg) + scale * (eps(prompt) - eps(neg)).

    neg is the names of the concepts, joined by commas.
    """

    version: ClassVar[int] = 1

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        return FitCost()

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        chunks = listed(model, [concept.name for concept in brief.concepts])
        (out / "negative.json").write_text(json.dumps(chunks))

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        context = model.encode(json.loads((artifact / "negative.json").read_text()))
        return model.changed(guidance=ClassifierFree(negative=context.mean()))


def listed(model: Model, names: Sequence[str]) -> list[str]:
    """Join the names by commas, in as few texts as possible.

    Each text fits into the model's context.
    """
    chunks: list[str] = []
    for name in names:
        longer = f"{chunks[-1]}, {name}" if chunks else name
        fits = len(model.tokenizer(longer).input_ids) <= model.context_length
        chunks[-1:] = [longer] if fits or not chunks else [chunks[-1], name]
    return chunks
