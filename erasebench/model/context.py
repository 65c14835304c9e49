"""Encoded prompts, in the form that a U-Net's cross-attention reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Context(NamedTuple):
    """Batch of encoded prompts.

    hidden [B, L, D], ids [B, L], ends [B] (position of the first EOS), and for SDXL pooled [B, P], the pooled output of
    its second encoder."""

    hidden: Tensor
    ids: Tensor
    ends: Tensor
    pooled: Tensor | None = None

    def select(self, index: Tensor | slice) -> Context:
        return Context(*(x[index] if x is not None else None for x in self))

    def to(self, device: torch.device | str) -> Context:
        return Context(*(x.to(device) if x is not None else None for x in self))

    def mean(self) -> Context:
        """Average the embeddings into one context [1, ...]; ids and ends are the first's."""
        pooled = None if self.pooled is None else self.pooled.mean(0, keepdim=True)
        return Context(self.hidden.mean(0, keepdim=True), self.ids[:1], self.ends[:1], pooled)

    def repeat(self, count: int) -> Context:
        """Repeat a single prompt `count` times, without copying."""
        return Context(*(x.expand(count, *x.shape[1:]) if x is not None else None for x in self))


def join(*contexts: Context) -> Context:
    return Context(*(torch.cat(parts) if parts[0] is not None else None for parts in zip(*contexts, strict=True)))
