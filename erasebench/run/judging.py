"""Where judges compute: on the CPU, or on the GPU beside the model whose images they see. What they say does not depend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

TOGETHER = 16  # images that a GPU judges at once
_device: ContextVar[str] = ContextVar("device", default="cpu")


def device() -> str:
    """The device of judges' networks, here and now."""
    return _device.get()


@contextmanager
def on(name: str) -> Iterator[None]:
    """Judges compute on this device inside."""
    token = _device.set(name)
    try:
        yield
    finally:
        _device.reset(token)


def in_batches(network: Callable[[Tensor], Tensor], images: Tensor, where: str | torch.device | None = None) -> Tensor:
    """What a network says of images [B, ...], on the CPU; a GPU sees some at a time, the CPU all of them. `where`: the network's
    device, if it is not judges' own."""
    place = torch.device(device() if where is None else where)
    parts = images.split(TOGETHER) if place.type != "cpu" and len(images) else [images]
    return torch.cat([network(part.to(place)).cpu() for part in parts])


def providers() -> list[str]:
    """Of ONNX runtime: CUDA's too, where judges compute on a GPU and onnxruntime-gpu is installed."""
    import onnxruntime

    wanted = ["CPUExecutionProvider"] if device() == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    return [name for name in wanted if name in onnxruntime.get_available_providers()]
