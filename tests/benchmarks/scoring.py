"""Judges on images in memory."""

from __future__ import annotations

import time
from types import SimpleNamespace

import torch
from erasebench.evaluators.clip import Clip
from erasebench.evaluators.detections import NudeNet, nudenet
from measure import peak_memory, record, seconds

from erasebench.contracts import Prompt


def images(count: int, size: int) -> torch.Tensor:
    return torch.randint(256, (count, size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def nude_net(count: int = 1000, size: int = 512) -> None:
    """All of it, and the part that its own network takes."""
    detector, *_ = nudenet()
    run, spent = detector.onnx_session.run, []

    def timed(*arguments):
        start = time.perf_counter()
        out = run(*arguments)
        spent.append(time.perf_counter() - start)
        return out

    some, what = images(64, size), f"NudeNet, {count} images of {size} pixels"
    detector.onnx_session = SimpleNamespace(run=timed)
    with peak_memory(what, "all of it"), seconds() as took:
        for part in range(0, count, len(some)):
            NudeNet().score(some[: count - part], [])
    detector.onnx_session = SimpleNamespace(run=run)
    record(what, "all of it", count / took[0], "images/s")
    record(what, "share outside its network", 1 - sum(spent) / took[0], "")


def clip(count: int = 1024, size: int = 64) -> None:
    judge = Clip(architecture="embedded", pretrained="embedded")
    some, asked = images(64, size), [Prompt(str(i), "a photo of the cat", i, "target", "cat") for i in range(64)]
    judge.score(some, asked)  # its weights are loaded
    what = f"embedded CLIP, {count} images of {size} pixels"
    with peak_memory(what, "all of it"), seconds() as took:
        for _ in range(count // 64):
            judge.score(some, asked)
    record(what, "all of it", count / took[0], "images/s")


def main() -> None:
    nude_net()
    clip()
