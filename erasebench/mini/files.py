"""Files of the embedded world that are read without torch. Their location, and the captions."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from ..contracts import ErasebenchError

WEIGHTS = Path(__file__).parent / "weights"


def path_of(*parts: str) -> Path:
    """Return the path of a file or folder of the embedded world.

    Raises ErasebenchError if this installation lacks it.
    """
    path = WEIGHTS.joinpath(*parts)
    if not path.exists():
        raise ErasebenchError(
            f"the embedded world's {'/'.join(parts)} is not in this installation: `make mini` trains it"
        )
    return path


@cache
def captions() -> tuple[list[str], list[str]]:
    """Return the captions -> (evaluation, training). No caption is in both."""
    lists = json.loads(path_of("captions.json").read_text(encoding="utf-8"))
    return lists["evaluation"], lists["training"]
