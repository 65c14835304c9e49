"""Slots that `Model.changed` sets and restores: weights, attention processors, attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contracts import ErasebenchError
from .finite import check_finite


class Slot(NamedTuple):
    """Replaceable part of a model: getter, setter, and the value before the change."""

    get: Callable[[], Any]
    set: Callable[[Any], None]
    before: Any


Change = tuple[Slot, Any]  # a slot and its new value


def weight_changes(parameters: Mapping[str, torch.nn.Parameter], weights: Mapping[str, Tensor]) -> Iterator[Change]:
    """Return changes that put tensors in place of parameters.

    The parameters' own storage is never written. Raises as `Model.changed` does."""
    slots, values = [], []
    for name, value in weights.items():
        if name not in parameters:
            raise ErasebenchError(f"the model has no weight {name}")
        parameter = parameters[name]
        check_weight(name, parameter, value)
        put = lambda v, p=parameter: setattr(p, "data", v)
        slots.append(Slot(lambda p=parameter: p.data, put, parameter.data))
        values.append(value.to(parameter.device, parameter.dtype))
    check_finite(weights, values)
    return zip(slots, values, strict=True)


def processor_change(unet: Any, processors: Mapping[str, Any]) -> Change:
    """Return a change that replaces attention processors of the U-Net by name.

    Raises ErasebenchError for an unknown name."""
    present = unet.attn_processors
    if absent := set(processors) - set(present):
        raise ErasebenchError(f"the U-Net has no attention processor {sorted(absent)[0]}")
    # set_attn_processor empties the dictionary that it receives
    put = lambda v: unet.set_attn_processor(dict(v))
    return Slot(lambda: dict(unet.attn_processors), put, dict(present)), {**present, **processors}


def attribute_change(holder: object, name: str, value: Any) -> Change:
    """Return a change of one attribute of the model."""
    return Slot(lambda: getattr(holder, name), lambda v: setattr(holder, name, v), getattr(holder, name)), value


def check_weight(name: str, parameter: Tensor, value: Any) -> None:
    """Raise ErasebenchError for a value that cannot replace a parameter."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        what = (
            f"a {'meta' if value.is_meta else 'sparse'} tensor" if isinstance(value, Tensor) else type(value).__name__
        )
        raise ErasebenchError(f"{name}: the change is {what}, an ordinary tensor is needed")
    if not value.is_floating_point():
        raise ErasebenchError(f"{name}: the change is {value.dtype}, numbers like {parameter.dtype} are needed")
    if parameter.shape != value.shape:
        raise ErasebenchError(f"{name} is {tuple(parameter.shape)}, the change is {tuple(value.shape)}")
