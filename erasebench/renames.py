"""Names that modules and commands had before the package had folders: who uses one is told the new name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

VERBS = {  # module that was a command -> verb
    "agreement": "agreement",
    "audit": "audit",
    "catalog": "readme",
    "check": "check",
    "claims": "claims",
    "compare": "compare",
    "doctor": "doctor",
    "export": "export",
    "graph": "graph",
    "inspect": "moved",
    "leaderboard": "leaderboard",
    "plan": "schedule",
    "reference": "reference",
    "regress": "regress",
    "store.__main__": "store",
    "submit": "verify",
    "track": "wandb",
}
MODULES = {  # module that plugins may import -> where it is
    "adapters": "toolbox.adapters",
    "attention": "toolbox.attention",
    "bases": "model.bases",
    "closed_form": "toolbox.closed_form",
    "devices": "model.devices",
    "formats": "toolbox.published_weights",
    "layouts": "toolbox.layouts",
    "masks": "toolbox.masks",
    "memory": "model.memory",
    "pictured": "toolbox.inversion",
    "search": "toolbox.search",
    "state_dicts": "toolbox.state_dicts",
    "training": "toolbox.training",
    "trajectory": "toolbox.trajectory",
    "vocabulary": "toolbox.vocabulary",
}


class Renames(MetaPathFinder):
    """The last finder: it finds nothing, and raises ModuleNotFoundError with the new name for an old one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package == __package__ and name in VERBS:
            raise ModuleNotFoundError(f"it is `erasebench {VERBS[name]}` now, or `python -m erasebench {VERBS[name]}`")
        if package == __package__ and name in MODULES:
            raise ModuleNotFoundError(f"{fullname} is {package}.{MODULES[name]} now")
        return None
