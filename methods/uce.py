"""Unified Concept Editing (Gandikota et al., WACV 2024): a closed-form edit.

Eq. 7, for the K and V projections: each concept's token embeddings are projected like its surrogate's, those of
preserved names as before.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from erasebench.contracts import Brief, FitCost
from erasebench.model.model import Model
from erasebench.toolbox.closed_form import System, aligned, edited, encoded, gram, load_edit, save_edit, write_notes


@dataclass(frozen=True)
class UCE:
    """Closed-form edit of the K and V projections.

    token_set: rows of the encoded name that enter. `last` is its last token alone (the released code since 2025);
    `last_to_end` adds the EOS and padding rows after it. `last_to_end_and_empty` is the code behind the published
    tables: it also preserves the empty prompt, and uses all rows of it and of each preserved name. preserve_scale:
    weight of a preserved text; None is max(1/10, 1 / number of texts), as released.
    """

    erase_scale: float = 1.0
    preserve_scale: float | None = None
    ridge: float = 0.5  # lambda of Eq. 7
    token_set: Literal["last", "last_to_end", "last_to_end_and_empty"] = "last_to_end_and_empty"
    version: ClassVar[int] = 2
    published_surrogates: ClassVar[Mapping[str, str]] = {"object": "", "explicit": ""}

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        return FitCost(seconds=30 + concepts)

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        edit, factor = self.system(model, brief).solve(self.ridge)
        save_edit(edit, out)
        write_notes(out, factor.notes(self.ridge))

    def system(self, model: Model, brief: Brief) -> System:
        system = System(model.text_width, model.device)
        pairs = [(concept.name, concept.surrogate) for concept in brief.concepts]
        published = self.token_set == "last_to_end_and_empty"
        token_set = self.token_set.removesuffix("_and_empty")
        system.map(*aligned(model, pairs, token_set), self.erase_scale)
        preserved = [*brief.preserved, *[""] * published]
        scale = self.preserve_scale if self.preserve_scale is not None else max(0.1, 1 / max(1, len(preserved)))
        if published:
            system.keep(gram(torch.stack([row for row, _ in encoded(model, preserved).values()])), scale)
        elif preserved:
            system.map(*aligned(model, [(name, name) for name in preserved], token_set), scale)
        return system

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return edited(model, load_edit(model, artifact))
