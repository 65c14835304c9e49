"""Old names of modules and commands, from before the package had folders.

Using one raises an error with the new name.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

VERBS = {  # former command module -> verb
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
MODULES = {  # module that plugins may import -> its new place
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
    """The last finder: it rejects old names and finds nothing.

    For an old name it raises ModuleNotFoundError with the new one.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package == __package__ and name in VERBS:
            raise ModuleNotFoundError(f"it is `erasebench {VERBS[name]}` now, or `python -m erasebench {VERBS[name]}`")
        if package == __package__ and name in MODULES:
            raise ModuleNotFoundError(f"{fullname} is {package}.{MODULES[name]} now")
        return None
