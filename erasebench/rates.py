"""How fast a GPU samples: assumed by its class and the speed asked for, and corrected by the first shard that is made."""

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
    """conf/rates.yaml."""
    return yaml.safe_load((resources.files("erasebench.conf") / FILE).read_text(encoding="utf-8"))


def gpu_class(device: str) -> str:
    """The class of a GPU by its own name: A100 of NVIDIA A100-SXM4-80GB; nothing for one that is not known."""
    words = device.replace("-", " ").upper().split()
    return next((name for name in table()["peak"] if " ".join(name.upper().split()) in " ".join(words)), "")


def assumed(base: str, speed: str, device: str = "") -> tuple[float, str]:
    """(evaluations of single latents by the U-Net in a second, of what): of a base by its name, at a speed, on a GPU by its own
    name; of the class that papers are run on where there is none."""
    known = table()
    if base in known["measured"]:
        return known["measured"][base], "two processor cores"
    which = gpu_class(device) or known["default"]
    tera = known["teraflop"].get(base, known["teraflop"]["default"])
    return known["peak"][which][speed] * known["share"][speed] / tera, f"speed={speed} on an {which}"


@dataclass
class Forecast:
    """How long is left to sample: `left` evaluations, at first at an assumed rate. Threads of one process share it."""

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
        """Take the rate of a shard that was made (its `unet_samples` and `seconds`); the first is told."""
        with self.lock:
            if not meta.get("unet_samples") or not meta.get("seconds"):
                return
            self.left = max(0, self.left - meta["unet_samples"])
            if not self.told:
                self.told, self.rate = True, meta["unet_samples"] / meta["seconds"]
                log.info("%s (the first shard's)", self.line())


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
