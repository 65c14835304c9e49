"""The embedded world's perfect eraser: a model trained without the concepts.

U-Net and text encoder are trained from scratch, with the base's initial seed, tokenizer and VAE, on a world that never
contained the concepts (`python -m erasebench.mini.train retrained`).

Its text encoder is narrower than the base's. Its outputs, and the projections that read them, are padded with zeros,
which changes no product.
"""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F
from transformers import CLIPTextModel

from erasebench.contracts import Brief, ErasebenchError
from erasebench.mini.files import WEIGHTS
from erasebench.model.model import Model
from erasebench.store.local import digest, sha256_file


class Padded(CLIPTextModel):
    """Text encoder with zero-padded outputs.

    Outputs [B, L, D] become [B, L, width].
    """

    width: int

    def forward(self, *inputs, **keywords):
        out = super().forward(*inputs, **keywords)
        out["last_hidden_state"] = padded(out.last_hidden_state, self.width)
        return out


def padded(x: torch.Tensor, width: int) -> torch.Tensor:
    """Append zeros to x [..., D]: [..., width]."""
    return F.pad(x, (0, width - x.shape[-1]))


@dataclass(frozen=True)
class Retrained:
    """Weights trained without the concepts.

    folder: `unet/`, `text_encoder/` and `forgotten.json`; the default is the shipped one. content: digest of the files,
    which identifies them.
    """

    folder: str | None = None
    content: str = ""
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        files = [f for f in sorted(self.where.rglob("*")) if f.suffix in (".json", ".safetensors")]
        if not self.forgotten_file.is_file():
            raise ErasebenchError(f"{self.where} holds no retrained model: train it (erasebench.mini.train retrained)")
        object.__setattr__(self, "content", digest({str(f.relative_to(self.where)): sha256_file(f) for f in files}))

    @property
    def where(self) -> Path:
        return WEIGHTS / "retrained" if self.folder is None else Path(self.folder)

    @property
    def forgotten_file(self) -> Path:
        return self.where / "forgotten.json"

    def skip(self, model: Model) -> str:
        """Require the base that matches this model.

        Only that base has the same U-Net, up to the width of the text.
        """
        theirs = UNet2DConditionModel.load_config(self.where / "unet")
        same = ("in_channels", "block_out_channels", "layers_per_block", "attention_head_dim", "norm_num_groups")
        fits = all(_plain(theirs[key]) == _plain(model.unet.config[key]) for key in same)
        fits = fits and theirs["cross_attention_dim"] <= model.text_width and model.text_encoder_2 is None
        return "" if fits else "it is the retrained twin of the embedded model alone"

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        """Check the concepts; nothing is learnt.

        Raises ErasebenchError if the training data contained a concept.
        """
        forgotten = json.loads(self.forgotten_file.read_text(encoding="utf-8"))
        known = [c.name for c in brief.concepts if c.name not in forgotten]
        if known:
            raise ErasebenchError(
                f"method=retrained has seen {known[0]!r} in its training: it stands only beside what it never saw "
                f"({', '.join(forgotten[:3])}, ...)"
            )

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        load = {"torch_dtype": model.dtype, "local_files_only": True}
        unet = UNet2DConditionModel.from_pretrained(self.where / "unet", **load)
        text = Padded.from_pretrained(self.where / "text_encoder", **load).to(model.device).eval().requires_grad_(False)
        text.width = model.text_width
        weights = {}
        for name, parameter in unet.named_parameters():
            wanted = model.weight(f"unet.{name}")
            weights[f"unet.{name}"] = (
                padded(parameter.data, wanted.shape[-1]) if parameter.dim() == 2 else parameter.data
            )
        return model.changed(weights=weights, text_encoder=text)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, list | tuple) else value
