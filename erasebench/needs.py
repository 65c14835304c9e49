"""Files and packages that plugins need: where they lie, how large they are, where they come from, and what says so.

A plugin that reads what is not its own has `needs() -> Sequence[Need]`; so have the judges and CLIPs among its fields.
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
    """A file, a repository or a package that a plugin does not work without.

    what     in words
    megabytes  of the download, about; 0 for a package
    source   a URL, a repository of the hub, a command
    option   what gives its place, or nothing
    find     its place on this machine, or None
    fetch    downloads it to where `find` looks; None: it must be brought
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
        """How to get it, in one line."""
        placed = f" ({self.option})" if self.option else ""
        return f"{self.source}{placed}"


def needs_of(*plugins: Any) -> list[Need]:
    """What plugins need, and what the judges and CLIPs among their fields do; each once."""
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


_refused: dict[str, str] = {}  # what could not be fetched in this process, and why


def bring(*plugins: Any) -> None:
    """Fetch what plugins need and this machine has not. What cannot be had is remembered for `lacking`."""
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
    """Why plugins cannot work on this machine, in one line, or nothing. What can be fetched counts as here until `bring` has
    failed to."""
    for need in needs_of(*plugins):
        if (need.fetch is None or need.what in _refused) and need.find() is None:
            tried = f"could not be fetched ({_refused[need.what]})" if need.what in _refused else "is not here"
            return f"{need.what}{need.size} {tried}: {need.how}"
    return ""


def check(*plugins: Any) -> None:
    """Raises ErasebenchError for the first thing that plugins lack."""
    if reason := lacking(*plugins):
        raise ErasebenchError(reason)


# -- kinds of needs -----------------------------------------------------------------------------------------------------


def package(module: str, what: str, command: str) -> Need:
    """A package, by the module that it installs."""
    found = lambda: Path(spec.origin or ".") if (spec := importlib.util.find_spec(module)) else None
    return Need(what, 0, command, "", found)


def file(path: str | Path | None, what: str, megabytes: float, source: str, option: str) -> Need:
    """A file or folder that somebody brings."""
    return Need(what, megabytes, source, option, lambda: Path(path) if path and Path(path).exists() else None)


def download(url: str, what: str, megabytes: float, option: str) -> Need:
    """A file that torch keeps in its own cache, its hash in its name."""

    def place() -> Path:
        import torch

        return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]

    def fetch() -> None:
        import torch

        place().parent.mkdir(parents=True, exist_ok=True)
        begins = re.search(r"-([a-f0-9]{8,})\.", url)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(PATIENCE)  # torch would wait for ever
        try:
            torch.hub.download_url_to_file(url, str(place()), begins[1] if begins else None, progress=False)
        finally:
            socket.setdefaulttimeout(before)

    return Need(what, megabytes, url, option, lambda: place() if place().is_file() else None, fetch)


def cached(repository: str, name: str, revision: str | None = None) -> Path | None:
    """A file of the hub's cache on this machine."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name, revision=revision)
    return Path(found) if isinstance(found, str) and Path(found).is_file() else None


def hub(repository: str, names: Iterable[str], what: str, megabytes: float, option: str = "") -> Need:
    """Files of a repository of the hub, all of which are needed."""

    def find() -> Path | None:
        places = [cached(repository, name) for name in names]
        return places[0].parent if all(places) and places[0] else None

    def fetch() -> None:
        from huggingface_hub import hf_hub_download

        for name in names:
            hf_hub_download(repository, name)

    return Need(what, megabytes, f"https://huggingface.co/{repository}", option, find, fetch)
