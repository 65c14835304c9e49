"""What produced a number: code, packages, hardware. Recorded beside the rows, never part of an identity."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = ("erasebench", "torch", "diffusers", "transformers", "peft", "open_clip_torch", "numpy")


@cache
def git() -> tuple[str, bool | None]:
    """(commit, dirty) of the checkout that this code runs from; ("", None) outside git. What lies in results makes nothing dirty:
    no row depends on it."""
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
    """JSON of name -> version of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return json.dumps(found, sort_keys=True)


def device(name: str) -> str:
    """The processor or GPU by its own name."""
    if name.startswith("cuda"):
        import torch

        try:
            return torch.cuda.get_device_name(name)
        except (AssertionError, RuntimeError, ValueError):  # the row of a run that failed because it is not there
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


def peak_memory_mb(name: str) -> float:
    """Peak memory so far: of the GPU where one is used, else of this process."""
    if name.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(name) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
