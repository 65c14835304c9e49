"""Device of the judges: the CPU, or the GPU of the model whose images they score.

Their scores do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

TOGETHER = 16  # images that a GPU scores at once
_device: ContextVar[str] = ContextVar("device", default="cpu")


def device() -> str:
    """Return the current device of the judges' networks."""
    return _device.get()


@contextmanager
def on(name: str) -> Iterator[None]:
    """Run judges on this device inside the `with`."""
    token = _device.set(name)
    try:
        yield
    finally:
        _device.reset(token)


def in_batches(network: Callable[[Tensor], Tensor], images: Tensor, where: str | torch.device | None = None) -> Tensor:
    """Apply a network to images [B, ...]; the output is on the CPU.

    A GPU processes TOGETHER images at a time, the CPU all at once. `where`: the network's device; the judges' by
    default."""
    place = torch.device(device() if where is None else where)
    parts = images.split(TOGETHER) if place.type != "cpu" and len(images) else [images]
    return torch.cat([network(part.to(place)).cpu() for part in parts])


def providers() -> list[str]:
    """Return ONNX Runtime's execution providers for judges.

    CUDA's is among them if judges run on a GPU and onnxruntime-gpu is installed."""
    import onnxruntime

    wanted = ["CPUExecutionProvider"] if device() == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    return [name for name in wanted if name in onnxruntime.get_available_providers()]
