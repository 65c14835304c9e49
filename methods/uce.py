"""Unified Concept Editing (Gandikota et al., WACV 2024): a closed-form edit of the K and V projections.

Eq. 7 for a layer W is  W' = (lambda W + sum w W c* c^T) (lambda I + sum w c c^T)^-1  with token embeddings c and
the targets c*. Nothing in it but W itself depends on the layer, so W' = W M with one matrix M for all of them:
one Gram matrix, one Cholesky factorisation, in fp64 (the released fp32 inverse is off by up to 3e-3).
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasebench.contracts import Brief
from erasebench.model import Model


@dataclass(frozen=True)
class UCE:
    """Map each concept's token embeddings onto its surrogate's, keep those of the preserved names (Eq. 7).

    token_set: which rows of the encoded name enter. `last` is its last token alone (the released code since
    2025); `last_to_end` also takes the EOS and padding rows after it (the code behind the published tables).
    preserve_scale: weight of a preserved name; None is max(1/10, 1 / number of names), as released.
    """

    erase_scale: float = 1.0
    preserve_scale: float | None = None
    ridge: float = 0.5  # lambda of Eq. 7; keeps the Gram matrix invertible
    token_set: Literal["last", "last_to_end"] = "last_to_end"
    version: ClassVar[int] = 1

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        pairs = [(concept.name, concept.surrogate) for concept in brief.concepts]
        kept = [(name, name) for name in brief.preserved]
        keep_scale = self.preserve_scale if self.preserve_scale is not None else max(0.1, 1 / max(len(kept), 1))
        width = model.text_encoder.config.hidden_size
        gram = torch.zeros(2, width, width, dtype=torch.float64, device=model.device)
        for some, scale in ((pairs, self.erase_scale), (kept, keep_scale)):
            if some:
                source, target = self.rows(model, some)
                gram += scale * torch.stack([target.T @ source, source.T @ source])
        values, keys = gram + self.ridge * torch.eye(width, dtype=gram.dtype, device=gram.device)
        edit = torch.cholesky_solve(values.T, torch.linalg.cholesky(keys)).T  # values @ keys^-1
        save_file({"edit": edit.contiguous().cpu()}, out / "edit.safetensors")

    def rows(self, model: Model, pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Embeddings [R, D] of the names and of what each is mapped to, aligned at their last tokens, in fp64."""
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        with torch.no_grad():
            context = model.encode(texts)
        last = dict(zip(texts, (context.ends - 1).tolist(), strict=True))
        hidden = dict(zip(texts, context.hidden.double(), strict=True))
        length = 1 if self.token_set == "last" else context.hidden.shape[1] - max(last.values())
        cut = lambda text: hidden[text][last[text] : last[text] + length]
        return torch.cat([cut(name) for name, _ in pairs]), torch.cat([cut(target) for _, target in pairs])

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        edit = load_file(artifact / "edit.safetensors")["edit"].to(model.device)
        names = model.names(r"attn2\.to_[kv]\.weight$")
        return model.changed(weights={name: model.weight(name).double() @ edit for name in names})
