"""Seals on results of re-running, as proof that this installation made them.

Nobody else can write such a seal by hand. A file proves nothing to a reader on another machine without a secret that
its writer did not have: verifications by others are shown as their word. To verify rows oneself:
`python -m erasebench verify <rows> --rerun`.
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
    """Return the file of this installation's secret.

    Only its owner may read it.
    """
    return home() / "seal.key"


def secret() -> bytes:
    """Return the secret, created on first use.

    Raises ErasebenchError if it can neither be read nor created.
    """
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
    """Return the result of re-running, with a seal."""
    return found | {"seal": _seal(found, secret())}


def is_sealed(found: dict[str, Any] | None) -> bool:
    """Return whether this installation sealed it, and it is unchanged since."""
    try:
        return bool(found) and place().is_file() and hmac.compare_digest(_seal(found, secret()), str(found["seal"]))
    except (ErasebenchError, KeyError, TypeError, RecursionError, OSError):  # TypeError: a seal beyond ASCII
        return False


def _seal(found: dict[str, Any], key: bytes) -> str:
    text = json.dumps({name: value for name, value in found.items() if name != "seal"}, sort_keys=True)
    return hmac.new(key, text.encode(), "sha256").hexdigest()
