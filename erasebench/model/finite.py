"""Checks for finite numbers, and the error raised if they fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..contracts import ErasebenchError


class NotFinite(ErasebenchError):
    """Weights, embeddings, latents or images with NaN or infinity."""


def is_finite(x: Tensor) -> bool:
    """Return whether no number of a tensor is NaN or infinite; integers never are."""
    if not (x.is_floating_point() or x.is_complex()):
        return True
    return bool(torch.isfinite(x if x.element_size() > 1 else x.float()).all())  # torch cannot compare 8-bit floats


def check_finite(given: Mapping[str, Tensor], values: Sequence[Tensor]) -> None:
    """Raise NotFinite if weights are not finite in the model's format.

    `given` are the tensors as passed, `values` the same after conversion, in the same order. The message says whether a
    weight was not finite as given or does not fit into the format."""
    fine = [torch.isfinite(value).all() for value in values]
    if not fine or torch.stack([flag.to(fine[0].device) for flag in fine]).all():
        return
    name, value = next((n, v) for (n, v), flag in zip(given.items(), fine, strict=True) if not flag)
    held = values[list(given).index(name)].dtype
    why = f"does not fit into {held}" if is_finite(value) else "is not finite (NaN or infinity)"
    raise NotFinite(f"{name}: the change {why}")
