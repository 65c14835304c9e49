"""TIME (Orgad et al., ICCV 2023), adapted to erasing.

The V projections read a concept as its surrogate. Eq. 5 without preserved prompts: every row from the concept's last
token to the end of the context is projected like its counterpart.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from erasebench.contracts import Brief
from erasebench.model.model import Model
from erasebench.toolbox.closed_form import System, aligned, edited, load_edit, save_edit, write_notes


@dataclass(frozen=True)
class TIME:
    """Closed-form edit of the V projections.

    with_key: edit the K projections too. augmented: number of training templates used (1 or 4 in the paper).
    """

    ridge: float = 0.1  # lambda of Eq. 5
    with_key: bool = False
    augmented: int = 4
    version: ClassVar[int] = 1

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        system = System(model.text_width, model.device)
        for template in brief.templates[: self.augmented]:
            pairs = [(concept.name, concept.surrogate) for concept in brief.concepts]
            system.map(*aligned(model, pairs, "last_to_end", template))
        edit, factor = system.solve(self.ridge)
        save_edit(edit, out)
        write_notes(out, factor.notes(self.ridge))

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return edited(model, load_edit(model, artifact), "kv" if self.with_key else "v")
