"""Cross-attention with visible maps and per-sample low-rank adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.context import Context
from ..model.model import Model


class LowRank(NamedTuple):
    """Adapters of one projection, one per sample: x -> x down^T up^T; down [B, r, D], up [B, out, r]."""

    down: Tensor
    up: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.down.mT @ self.up.mT


class Enough(Exception):
    """Signal that the last cross-attention layer has been seen.

    Nothing later in the U-Net matters to the caller.
    """


@dataclass
class Seeing:
    """Processor of a cross-attention layer that passes its probabilities to `see`.

    The probabilities are [B, heads, pixels, tokens].
    """

    name: str
    see: Callable[[str, Tensor], None]
    key: LowRank | None = None
    value: LowRank | None = None

    def __call__(
        self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask=None, temb=None
    ) -> Tensor:
        context = encoder_hidden_states
        key, value = attn.to_k(context), attn.to_v(context)
        if self.key is not None:
            key = key + self.key(context)
        if self.value is not None:
            value = value + self.value(context)
        probabilities = attn.get_attention_scores(
            attn.head_to_batch_dim(attn.to_q(hidden_states)), attn.head_to_batch_dim(key)
        )
        self.see(self.name, probabilities.unflatten(0, (len(context), attn.heads)))
        out = attn.batch_to_head_dim(probabilities @ attn.head_to_batch_dim(value))
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def split_heads(attn, x: Tensor) -> Tensor:
    """[B, tokens, inner] -> [B, heads, tokens, width of a head]."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def attend(attn, hidden_states: Tensor, key: Tensor, value: Tensor, more: Tensor | float = 0.0) -> Tensor:
    """Return the output [B, pixels, D] of an attention module.

    Takes keys and values [B, tokens, inner] of any origin. `more` [B, heads, pixels, width of a head] is added to
    the output of the heads.
    """
    query, key, value = (split_heads(attn, x) for x in (attn.to_q(hidden_states), key, value))
    return project(attn, F.scaled_dot_product_attention(query, key, value) + more)


def project(attn, read: Tensor) -> Tensor:
    """Project the heads' output to the module's output [B, pixels, D].

    The input is [B, heads, pixels, width of a head].
    """
    return attn.to_out[1](attn.to_out[0](read.transpose(1, 2).flatten(2))) / attn.rescale_output_factor


@dataclass
class Adapted:
    """Attention processor whose value projection has an adapter.

    The layer is a self- or cross-attention layer; the adapter is [1, r, D], [1, out, r].
    """

    value: LowRank

    def __call__(
        self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask=None, temb=None
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return attend(attn, hidden_states, attn.to_k(context), attn.to_v(context) + self.value(context))


def projection(layer: str, which: str) -> str:
    """Return the name of an attention processor's K or V projection."""
    return f"unet.{layer.removesuffix('.processor')}.to_{which}.weight"


def layers(model: Model) -> list[str]:
    """Return the names of the cross-attention processors."""
    return [name for name in model.unet.attn_processors if name.endswith("attn2.processor")]


def maps(
    model: Model, z: Tensor, t: Tensor, context: Context, adapters: Mapping[str, tuple[LowRank, LowRank]] | None = None
) -> dict[str, Tensor]:
    """Return every layer's cross-attention probabilities [B, heads, pixels, tokens].

    The U-Net runs no further than the last of them. `adapters`: layer -> those of its K and V.
    """
    seen: dict[str, Tensor] = {}
    names = layers(model)

    def see(name: str, probabilities: Tensor) -> None:
        seen[name] = probabilities
        if len(seen) == len(names):
            raise Enough

    processors = {name: Seeing(name, see, *(adapters or {}).get(name, ())) for name in names}
    with model.changed(processors=processors), model.without_checkpointing(), suppress(Enough):
        model.eps(z, t, context)
    return seen


def fitted(mask: Tensor, pixels: int) -> Tensor:
    """Resize a mask to the resolution of a layer.

    The mask is bool [B, h, w] -> [B, pixels], flat, for a layer with this many pixels. Nearest, as in MACE; if that
    loses a small mask altogether, every pixel that the mask touches is set.
    """
    side, mask = round(pixels**0.5), mask[:, None].float()
    nearest = F.interpolate(mask, (side, side), mode="nearest").flatten(1) > 0.5
    touched = F.adaptive_max_pool2d(mask, side).flatten(1) > 0.5
    return torch.where(nearest.any(1, keepdim=True), nearest, touched)
