"""Sampling rates of GPUs.

A rate is assumed from the class of the GPU and the requested speed, and corrected by the first finished shard.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import yaml

log = logging.getLogger("erasebench")
FILE = "rates.yaml"


def table() -> dict[str, Any]:
    """Return conf/rates.yaml."""
    return yaml.safe_load((resources.files("erasebench.conf") / FILE).read_text(encoding="utf-8"))


def gpu_class(device: str) -> str:
    """Return the class of a GPU by its name.

    Empty for an unknown GPU. For example, A100 of NVIDIA A100-SXM4-80GB.
    """
    words = device.replace("-", " ").upper().split()
    return next((name for name in table()["peak"] if " ".join(name.upper().split()) in " ".join(words)), "")


def assumed(base: str, speed: str, device: str = "") -> tuple[float, str]:
    """Return (U-Net evaluations of single latents per second, description).

    The rate is of a base by its name, at a speed, on a GPU by its own name; without a GPU, on the class of GPU that
    papers use.
    """
    known = table()
    if base in known["measured"]:
        return known["measured"][base], "two processor cores"
    which = gpu_class(device) or known["default"]
    tera = known["teraflop"].get(base, known["teraflop"]["default"])
    return known["peak"][which][speed] * known["share"][speed] / tera, f"speed={speed} on an {which}"


@dataclass
class Forecast:
    """Forecast of the remaining sampling time.

    The threads of a process share it. `left` counts the remaining evaluations; the rate is assumed at first.
    """

    left: int
    rate: float
    of: str
    told: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def line(self) -> str:
        return f"about {hours(self.left / self.rate)} of sampling at {self.rate:.3g} U-Net evaluations a second"

    def begin(self) -> None:
        log.info("%s (assumed: %s)", self.line(), self.of)

    def correct(self, meta: Mapping[str, Any]) -> None:
        """Take the rate of a finished shard (its `unet_samples` and `seconds`).

        The first is logged.
        """
        with self.lock:
            if not meta.get("unet_samples") or not meta.get("seconds"):
                return
            self.left = max(0, self.left - meta["unet_samples"])
            if not self.told:
                self.told, self.rate = True, meta["unet_samples"] / meta["seconds"]
                log.info("%s (the first shard's)", self.line())


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
