"""The manifest of an entry of the store: its files, by content."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

MANIFEST, IDENTITY = "manifest.json", "identity.json"
CHECKSUM = re.compile("[0-9a-f]{64}")  # a key is one too


class Damaged(Exception):
    """An entry whose files do not match its manifest."""


def files_of(manifest: bytes) -> dict[str, str]:
    """Relative path -> sha256. Raises Damaged for what is no manifest, or would name a file elsewhere."""
    try:
        files = json.loads(manifest.decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise Damaged("its manifest is not JSON") from error
    if not isinstance(files, dict) or not all(isinstance(c, str) and CHECKSUM.fullmatch(c) for c in files.values()):
        raise Damaged("its manifest is not one of checksums")
    folders = {"."}
    for name in files:
        path = PurePosixPath(name[:256])
        plain = str(path) == name and not path.is_absolute() and ".." not in path.parts
        if not (plain and name.isprintable() and len(name.encode()) < 256) or name == MANIFEST:
            raise Damaged(f"its manifest names {name[:80]!r}")
        folders.update(map(str, path.parents))
    if both := sorted(folders & set(files)):
        raise Damaged(f"its manifest names {both[0][:80]!r}")
    if IDENTITY not in files:
        raise Damaged("its manifest names no identity")
    return files


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name twice")
    return made
