"""Places on a disk, which stay out of rows and sent data."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# an absolute path within a sentence, in quotes or up to a blank; of URLs only those of files count
QUOTED = re.compile(r"(['\"`])(?:file://)?(?:~\w*|[A-Za-z]:)?[/\\][^'\"`\n]*[/\\]([^'\"`/\\\n]+)[/\\]?\1")
BARE = re.compile(
    r"(?:(?<![\w.:/~\\])|(?<=\w=)|(?<=\w:))(?:file://)?(?:~\w*/|/(?!/)|[A-Za-z]:\\|\\\\)(?:[^\s'\"`,;:()\[\]{}<>|/\\]+[/\\])+"
)
ABSOLUTE = re.compile(r"(?:file:|~\w*(?:/|$)|/|\\\\|[A-Za-z]:[\\/])")
SCHEME = re.compile(r"[A-Za-z][\w+.-]*://")


def is_absolute(text: str) -> bool:
    """Return whether a text is an absolute path.

    It starts at the root, the home folder, a drive or a server.
    """
    return ABSOLUTE.match(text) is not None


def is_place(text: str) -> bool:
    """Return whether a text has the form of a path or address.

    Such a text is absolute, relative to here (./x, ../x), or has a scheme.
    """
    return is_absolute(text) or SCHEME.match(text) is not None or bool({".", ".."} & {*re.split(r"[/\\]", text)})


def exists(text: str) -> bool:
    """Return whether a path exists, seen from the current folder."""
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, the home of an unknown user
        return False


def named(text: str) -> str:
    """Return the last name of a path, with `...` for its folders."""
    *_, last = re.split(r"[/\\]", text.rstrip("/\\"))
    return f".../{last}"


def strings(value: Any) -> Iterator[str]:
    """Yield every text within lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings(key)
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def masked(value: Any) -> Any:
    """Return a hyperparameter without places: only the last name of a path.

    Relative paths count if they exist.
    """
    if isinstance(value, str):
        is_path = "\n" not in value and (is_absolute(value) or ("/" in value and exists(value)))
        return named(value) if is_path and len(value) > 1 else value
    if isinstance(value, dict):
        return {key: masked(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked(inner) for inner in value]
    return value


def masked_json(text: str) -> str:
    """Return a JSON text without places; the same text if it has none."""
    try:
        given = json.loads(text or "null")
    except (ValueError, RecursionError):
        return masked_text(text)
    if (public := masked(given)) == given:
        return text
    return json.dumps(public, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def masked_text(text: str, known: Iterable[str] = ()) -> str:
    """Return a sentence without places: only the last name of every path.

    `known` paths may have blanks in them.
    """
    for path in sorted({path for path in known if is_absolute(path) and len(path) > 1}, key=len, reverse=True):
        text = text.replace(path, named(path))
    folders = {*map(str, (Path.home(), Path.cwd(), Path(tempfile.gettempdir()))), os.environ.get("ERASEBENCH_HOME", "")}
    for folder in sorted((f for f in folders if len(f) > 1), key=len, reverse=True):
        text = re.sub(rf"{re.escape(folder)}(?![\w.-])", "...", text)
    text = QUOTED.sub(lambda match: f"{match[1]}.../{match[2]}{match[1]}", text)
    return BARE.sub(".../", text)
