"""Seals on what re-running found: a mark that this installation made itself, which nobody else can write by hand.

A file proves nothing to a reader on another machine but by a secret that its writer did not have: what others say that they
verified is shown as their word, and `python -m erasebench verify <rows> --rerun` makes it one's own.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
from pathlib import Path
from typing import Any

from ..contracts import ErasebenchError
from ..store.local import home

SIZE = 32  # bytes of the secret


def place() -> Path:
    """The file of this installation's secret, which its owner alone may read."""
    return home() / "seal.key"


def secret() -> bytes:
    """The secret, made where it is first needed. Raises ErasebenchError where it can neither be read nor made."""
    path = place()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(secrets.token_bytes(SIZE))
        except FileExistsError:
            pass
        found = path.read_bytes()
    except OSError as error:
        raise ErasebenchError(f"{path}: verified rows cannot be sealed ({error.strerror})") from error
    if len(found) != SIZE:
        raise ErasebenchError(f"{path}: damaged, verified rows cannot be sealed; delete it for another")
    return found


def sealed(found: dict[str, Any]) -> dict[str, Any]:
    """What re-running found, with a seal."""
    return found | {"seal": _seal(found, secret())}


def is_sealed(found: dict[str, Any] | None) -> bool:
    """Whether this installation sealed it, and nothing was changed since."""
    try:
        return bool(found) and place().is_file() and hmac.compare_digest(_seal(found, secret()), str(found["seal"]))
    except (ErasebenchError, KeyError, TypeError, RecursionError, OSError):  # TypeError: a seal beyond ASCII
        return False


def _seal(found: dict[str, Any], key: bytes) -> str:
    text = json.dumps({name: value for name, value in found.items() if name != "seal"}, sort_keys=True)
    return hmac.new(key, text.encode(), "sha256").hexdigest()
