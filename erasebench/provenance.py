"""Provenance of a number: code, packages, hardware.

Recorded beside the rows, never part of an identity.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec, resolve_name
from pathlib import Path

SOURCE = "source.json"
# modules that carry out runs and compute no part of a plugin's entries in the store
HARNESS = {  # modules that compute nothing of a fit, and the package itself
    *("", "attack", "contracts", "execute", "interrupt", "options", "places", "provenance", "redaction", "remote"),
    *(
        "rows",
        "run",
        "seals",
        "store",
        "manifest",
        "needs",
        "devices",
        "produce",
        "record",
        "scoring",
        "session",
        "sheet",
    ),
}
PACKAGES = ("erasebench", "torch", "diffusers", "transformers", "peft", "open_clip_torch", "numpy")


@cache
def git() -> tuple[str, bool | None]:
    """Return (commit, dirty) of the checkout that this code runs from.

    ("", None) outside git. Files in results never make it dirty: no row depends on them.
    """
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return "", None
    try:
        run = lambda *args: subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        return run("rev-parse", "HEAD"), bool(run("status", "--porcelain", "--", ".", ":(exclude)results"))
    except (OSError, subprocess.SubprocessError):
        return "", None


@cache
def packages() -> str:
    """Return JSON of name -> version of packages that affect the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return json.dumps(found, sort_keys=True)


def device(name: str) -> str:
    """Return the name of the processor or GPU."""
    if name.startswith("cuda"):
        import torch

        from .model.devices import arithmetic

        try:
            return f"{torch.cuda.get_device_name(name)}, {arithmetic()}"
        except (AssertionError, RuntimeError, ValueError):  # the run failed because the GPU does not exist
            return name
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (
                line.split(":", 1)[1].strip()
                for line in cpuinfo.read_text().splitlines()
                if line.startswith("model name")
            ),
            "",
        )
    return model or platform.processor() or platform.machine()


def reset_peak_memory(name: str) -> None:
    """Start measuring peak memory for a new stage.

    Shards that a CPU makes side by side share one measurement. On systems without such a counter (macOS), peaks
    cover the process's whole life.
    """
    if name.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(name)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(name: str) -> float:
    """Return peak memory since `reset_peak_memory`.

    It is the GPU's if one is used, else this process's.
    """
    if name.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(name) / 2**20
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


# -- the source of a plugin -------------------------------------------------------------------------------------------


def sources(plugin: object) -> dict[str, str]:
    """Return module -> sha256 of a plugin's source files.

    Covers the plugin, the plugins among its fields, and, recursively, their imports from the toolbox, from their own
    package and from their own folder. Empty if there is no file, as for a class typed at a prompt.
    """
    found: dict[str, str] = {}
    values = [getattr(plugin, f.name) for f in fields(plugin)] if is_dataclass(plugin) else []
    for part in (plugin, *filter(is_dataclass, values)):
        name, file = type(part).__module__, _defined_in(type(part))
        if file is not None:
            _follow(name, file, (name.partition(".")[0], file.parent), found)
    return found


def _defined_in(kind: type) -> Path | None:
    """Return the file of a class.

    If its module is not registered, returns the file of its functions.
    """
    try:
        names = [inspect.getsourcefile(kind)]
    except (OSError, TypeError):
        names = [f.__code__.co_filename for f in vars(kind).values() if inspect.isfunction(f)]
    return next((file for name in names if name and (file := Path(name)).is_file()), None)


def _follow(name: str, file: Path, home: tuple[str, Path], found: dict[str, str]) -> None:
    """Add a module and, recursively, its imports from home.

    Home is the plugin's package or folder, or ours.
    """
    state = file.stat()
    found[name], imported = _read(file, name, file.name == "__init__.py", state.st_mtime_ns, state.st_size)
    package, folder = home
    for other in imported:
        top, _, rest = other.partition(".")
        if other in found or (top == "erasebench" and rest.partition(".")[0] in HARNESS):
            continue
        ours = top in ("erasebench", package)
        beside = (folder / f"{top}.py").is_file() and not {"site-packages", "dist-packages"} & set(folder.parts)
        origin = _origin(other) if ours or beside else None
        if origin is not None and (ours or origin.parent == folder):
            _follow(other, origin, home, found)


def _origin(name: str) -> Path | None:
    """Return the source file of a module.

    None if the name is not a module but an object within one.
    """
    parent = sys.modules.get(name.rpartition(".")[0])
    if parent is not None and not hasattr(parent, "__path__"):
        return None
    try:
        known = sys.modules.get(name)
        origin = known.__file__ if known is not None else getattr(find_spec(name), "origin", None)
    except Exception:  # finding a module imports its parents, and these may raise anything
        return None
    file = Path(origin or "")
    return file if file.suffix == ".py" and file.is_file() else None


@cache
def _read(file: Path, name: str, is_package: bool, *stamp: int) -> tuple[str, tuple[str, ...]]:
    """Return (sha256, names that may be imported modules) of a file.

    Read again when its time or size changes.
    """
    content = file.read_bytes()
    try:
        imported = tuple(dict.fromkeys(_imported(ast.parse(content), name if is_package else name.rpartition(".")[0])))
    except (SyntaxError, ValueError, ImportError):  # an unfinished edit since the import
        imported = ()
    return hashlib.sha256(content).hexdigest(), imported


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level and not package:
                continue
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
        else:
            yield from _imported(node, package)


def write_sources(folder: Path, made_by: Mapping[str, str]) -> None:
    """Write a plugin's source hashes beside its output."""
    (folder / SOURCE).write_text(json.dumps(made_by, indent=1, sort_keys=True))


def changed_sources(entry: Path, now: Mapping[str, str]) -> list[str]:
    """Return modules whose source changed since a plugin made an entry.

    Empty if the sources before or now are not known.
    """
    try:
        before = json.loads((entry / SOURCE).read_text())
    except (OSError, ValueError):  # made before sources were noted
        return []
    if not isinstance(before, dict) or not before or not now:
        return []
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
