"""Numbers that are finite, and the error where they are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..contracts import ErasebenchError


class NotFinite(ErasebenchError):
    """Weights, embeddings, latents or pictures that hold NaN or infinity."""


def is_finite(x: Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite; of whole numbers none is."""
    if not (x.is_floating_point() or x.is_complex()):
        return True
    return bool(torch.isfinite(x if x.element_size() > 1 else x.float()).all())  # of 8 bits none is compared


def check_finite(given: Mapping[str, Tensor], values: Sequence[Tensor]) -> None:
    """Raises NotFinite where weights are not finite as given, or not any more as the model holds them."""
    fine = [torch.isfinite(value).all() for value in values]
    if not fine or torch.stack([flag.to(fine[0].device) for flag in fine]).all():
        return
    name, value = next((n, v) for (n, v), flag in zip(given.items(), fine, strict=True) if not flag)
    held = values[list(given).index(name)].dtype
    why = f"does not fit into {held}" if is_finite(value) else "is not finite (NaN or infinity)"
    raise NotFinite(f"{name}: the change {why}")
