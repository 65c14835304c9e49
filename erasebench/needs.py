"""Files and packages that plugins need: place, size, source and option.

A plugin that reads files or packages other than its own has `needs() -> Sequence[Need]`; so have the judges and
CLIPs among its fields.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from .contracts import ErasebenchError, HasNeeds

log = logging.getLogger("erasebench")
PATIENCE = 30  # seconds without an answer


@dataclass(frozen=True)
class Need:
    """A file, repository or package that a plugin requires.

        what       its name, in words
        megabytes  of the download, about; 0 for a package
        source     a URL, a repository of the hub, a command
        option     the option that gives its place, or ""
        find       returns its place on this machine, or None
        fetch      downloads it to the place that `find` checks; None: the user must provide it
    """

    what: str
    megabytes: float
    source: str
    option: str
    find: Callable[[], Path | None]
    fetch: Callable[[], object] | None = None

    @property
    def size(self) -> str:
        if not self.megabytes:
            return ""
        return f" ({self.megabytes / 1000:.1f} GB)" if self.megabytes >= 1000 else f" ({self.megabytes:.0f} MB)"

    @property
    def how(self) -> str:
        """Instructions to get it, in one line."""
        placed = f" ({self.option})" if self.option else ""
        return f"{self.source}{placed}"


def needs_of(*plugins: Any) -> list[Need]:
    """Return the needs of plugins and of their parts.

    Parts are the judges and CLIPs among their fields. Each need is listed once.
    """
    found: dict[str, Need] = {}
    for plugin in _with_parts(plugins):
        for need in plugin.needs() if isinstance(plugin, HasNeeds) else ():
            found.setdefault(need.what, need)
    return list(found.values())


def _with_parts(plugins: Iterable[Any]) -> Iterator[Any]:
    for plugin in plugins:
        if is_dataclass(plugin) and not isinstance(plugin, type):
            yield plugin
            yield from _with_parts([getattr(plugin, f.name) for f in fields(plugin)])


_refused: dict[str, str] = {}  # needs that could not be fetched in this process -> reason


def bring(*plugins: Any) -> None:
    """Fetch the needs of plugins that this machine lacks.

    A need that cannot be fetched is remembered for `lacking`.
    """
    for need in needs_of(*plugins):
        if need.fetch is None or need.what in _refused or need.find() is not None:
            continue
        log.info("fetching %s%s: %s", need.what, need.size, need.source)
        try:
            need.fetch()
        except Exception as error:  # hub, network and file errors have no common class
            lines = str(error).strip().splitlines() or [type(error).__name__]
            _refused[need.what] = lines[0][:150]


def lacking(*plugins: Any) -> str:
    """Explain why plugins cannot work on this machine.

    The reason is one line, or "" if they can. A need that can be fetched counts as present until `bring` has failed
    to fetch it.
    """
    for need in needs_of(*plugins):
        if (need.fetch is None or need.what in _refused) and need.find() is None:
            tried = f"could not be fetched ({_refused[need.what]})" if need.what in _refused else "is not here"
            return f"{need.what}{need.size} {tried}: {need.how}"
    return ""


def check(*plugins: Any) -> None:
    """Raise ErasebenchError for the first need that plugins lack."""
    if reason := lacking(*plugins):
        raise ErasebenchError(reason)


# -- kinds of needs -----------------------------------------------------------------------------------------------------


def package(module: str, what: str, command: str) -> Need:
    """Describe a package, identified by the module that it installs."""
    found = lambda: Path(spec.origin or ".") if (spec := importlib.util.find_spec(module)) else None
    return Need(what, 0, command, "", found)


def file(path: str | Path | None, what: str, megabytes: float, source: str, option: str) -> Need:
    """Describe a file or folder that the user provides."""
    return Need(what, megabytes, source, option, lambda: Path(path) if path and Path(path).exists() else None)


def download(url: str, what: str, megabytes: float, option: str) -> Need:
    """Describe a file in torch's own cache, named with its hash."""

    def place() -> Path:
        import torch

        return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]

    def fetch() -> None:
        import torch

        place().parent.mkdir(parents=True, exist_ok=True)
        begins = re.search(r"-([a-f0-9]{8,})\.", url)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(PATIENCE)  # torch would wait forever
        try:
            torch.hub.download_url_to_file(url, str(place()), begins[1] if begins else None, progress=False)
        finally:
            socket.setdefaulttimeout(before)

    return Need(what, megabytes, url, option, lambda: place() if place().is_file() else None, fetch)


def cached(repository: str, name: str, revision: str | None = None) -> Path | None:
    """Return a file of the hub's cache on this machine, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name, revision=revision)
    return Path(found) if isinstance(found, str) and Path(found).is_file() else None


def hub(repository: str, names: Iterable[str], what: str, megabytes: float, option: str = "") -> Need:
    """Describe files of a hub repository, all of which are needed."""

    def find() -> Path | None:
        places = [cached(repository, name) for name in names]
        return places[0].parent if all(places) and places[0] else None

    def fetch() -> None:
        from huggingface_hub import hf_hub_download

        for name in names:
            hf_hub_download(repository, name)

    return Need(what, megabytes, f"https://huggingface.co/{repository}", option, find, fetch)
