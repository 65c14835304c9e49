"""RECE (Gong et al., ECCV 2024): UCE, repeated against embeddings that restore the concept.

The edited projections are W M. They read the following embedding as the base reads c                    (Eq. 6)

    a = (lambda_r I + M^T G M)^-1 M^T G c,    G = sum over projections W^T W,

A second edit of W M maps a onto the surrogate; M is multiplied by it. All matrices are D x D. The released code picks
its epoch by a detector on validation images inside the timed loop; here a fit runs all `epochs`.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from erasebench.methods.uce import UCE
from torch import Tensor

from erasebench.contracts import Brief
from erasebench.model.model import Model
from erasebench.toolbox.closed_form import (
    PROJECTIONS,
    System,
    edited,
    encoded,
    factor,
    load_edit,
    save_edit,
    write_notes,
)


@dataclass(frozen=True)
class RECE:
    """UCE's parameters for the first edit, then `epochs` further edits.

    Each epoch finds the embedding of Eq. 6 and edits it away (lambda = ridge). recover_ridge is lambda_r of Eq. 6.
    preserve_scale weighs the empty prompt and the preserved names. Without preserved names, the empty prompt counts
    once for each concept, as released.
    """

    first: UCE = UCE()
    epochs: int = 3
    ridge: float = 0.1
    recover_ridge: float = 0.1
    preserve_scale: float = 0.1
    version: ClassVar[int] = 2
    published_surrogates: ClassVar[Mapping[str, str]] = UCE.published_surrogates

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        edit, made = self.first.system(model, brief).solve(self.first.ridge)
        notes = [made.notes(self.first.ridge)]
        energy = sum(w.T @ w for w in (model.weight(name).double() for name in model.names(PROJECTIONS)))
        rows = encoded(model, [text for c in brief.concepts for text in (c.name, c.surrogate)] + ["", *brief.preserved])
        kept = torch.cat([rows[text][0].double() for text in ("", *brief.preserved)])
        for _ in range(self.epochs):
            system = System(model.text_width, model.device)
            for concept in brief.concepts:
                back = self.recovered(energy, edit, rows[concept.name][0].double())
                system.map(back, rows[concept.surrogate][0])
            system.map(kept, kept, self.preserve_scale * (1 if brief.preserved else len(brief.concepts)))
            again, made = system.solve(self.ridge)
            notes.append(made.notes(self.ridge))
            edit = edit @ again
        save_edit(edit, out)
        worst = max(notes, key=lambda note: note["condition"])
        write_notes(out, worst | {"edit": notes.index(worst)})

    def recovered(self, energy: Tensor, edit: Tensor, rows: Tensor) -> Tensor:
        """Return the embeddings of Eq. 6 for rows [R, D].

        The edited projections read them as the base reads the rows.
        """
        return factor(edit.T @ energy @ edit, self.recover_ridge).solve(rows @ energy @ edit)

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return edited(model, load_edit(model, artifact))
