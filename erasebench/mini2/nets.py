"""Networks of the embedded world: CLIP and the judge.

CLIP's text tower is the diffusion model's text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..mini.nets import Block, prepared
from .tokenizer import CONTEXT

WEIGHTS = Path(__file__).parent / "weights"
WIDTH, LAYERS, HEADS, INNER, EMBEDDING = 256, 4, 4, 256, 128  # of the text tower; INNER is the width of its MLP


@cache
def tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(WEIGHTS / "sd" / "tokenizer")


def tokenize(texts: Sequence[str]) -> Tensor:
    """Return ids [B, 32], padded with the end mark.

    Stable Diffusion does the same.
    """
    padded = {"padding": "max_length", "max_length": CONTEXT, "truncation": True, "return_tensors": "pt"}
    return tokenizer()(list(texts), **padded).input_ids


def clip_model(vocabulary: int, width: int = WIDTH, layers: int = LAYERS, vision: int = 16):
    """Build an open_clip CLIP for 64x64 images and 32-token captions."""
    from open_clip.model import CLIP

    text = {"context_length": CONTEXT, "vocab_size": vocabulary, "width": width, "heads": HEADS, "layers": layers}
    return CLIP(
        embed_dim=EMBEDDING,
        vision_cfg={"layers": (1, 1, 1, 1), "width": vision, "head_width": 64, "image_size": 64},
        text_cfg={**text, "mlp_ratio": INNER / WIDTH},
    )


def text_features(model: nn.Module, ids: Tensor, groups: int = 4) -> Tensor:
    """Return `model.encode_text` of ids [B, 32], normalised [B, 128].

    The batch is split by length, since captions are short. Attention is causal, and the feature is read at the end
    mark, so later positions have no effect.
    """
    ends = ids.argmax(1)  # the end mark is the highest id; the first one counts
    order, found = ends.argsort(), []
    for rows in order.tensor_split(groups):
        if len(rows):
            length = int(ends[rows].max()) + 1
            x = model.token_embedding(ids[rows, :length]) + model.positional_embedding[:length]
            x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
            found.append(x[torch.arange(len(rows)), ends[rows]])
    return F.normalize(torch.cat(found)[order.argsort()] @ model.text_projection, dim=-1)


def text_encoder(model: nn.Module, start: int, end: int) -> nn.Module:
    """Convert CLIP's text tower to transformers' CLIPTextModel.

    The weights keep their values under other names.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    tower = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=model.token_embedding.num_embeddings,
            hidden_size=model.token_embedding.embedding_dim,
            intermediate_size=model.transformer.resblocks[0].mlp.c_fc.out_features,
            num_hidden_layers=len(model.transformer.resblocks),
            num_attention_heads=HEADS,
            max_position_embeddings=CONTEXT,
            hidden_act="gelu",
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    state = {
        "embeddings.token_embedding.weight": model.token_embedding.weight,
        "embeddings.position_embedding.weight": model.positional_embedding,
        "final_layer_norm.weight": model.ln_final.weight,
        "final_layer_norm.bias": model.ln_final.bias,
    }
    for i, block in enumerate(model.transformer.resblocks):
        at = f"encoder.layers.{i}."
        pairs = {"layer_norm1": block.ln_1, "layer_norm2": block.ln_2, "self_attn.out_proj": block.attn.out_proj}
        pairs |= {"mlp.fc1": block.mlp.c_fc, "mlp.fc2": block.mlp.c_proj}
        for name, layer in pairs.items():
            state |= {f"{at}{name}.weight": layer.weight, f"{at}{name}.bias": layer.bias}
        weights, biases = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
        for letter, weight, bias in zip("qkv", weights, biases, strict=True):
            state |= {f"{at}self_attn.{letter}_proj.weight": weight, f"{at}self_attn.{letter}_proj.bias": bias}
    prefix = "text_model." if any(k.startswith("text_model.") for k in tower.state_dict()) else ""
    tower.load_state_dict({prefix + k: v.detach().clone() for k, v in state.items()})
    return tower.eval()


class Judge(nn.Module):
    """Shared trunk with a head for each question.

    Images [B, 3, 64, 64] in [-1, 1] -> dict of logits: objects [B, O] and hazards [B, H] yes or no; people [B, P + 1]
    and artists [B, A + 1], last: none of the known ones; face [B, 1]; colours [B, C + 1], last: its own; counts [B, 4];
    places [B, O, 4], whether each object lies left, right, at the top, at the bottom. `features` [B, 64], for the
    Frechet distance, are trained through `by_features`.
    """

    def __init__(self, sizes: dict[str, int], widths: Sequence[int] = (32, 64, 128, 192)):
        super().__init__()
        blocks = (Block(a, b) for a, b in zip(widths, widths[1:], strict=False))
        stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)
        pool = (nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.trunk = nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU(), *blocks, *pool)
        wide = 4 * widths[-1]
        self.features = nn.Linear(wide, 64)
        self.by_features = nn.Linear(64, sizes["objects"])
        outputs = {
            "objects": sizes["objects"],
            "people": sizes["people"] + 1,
            "face": 1,
            "artists": sizes["artists"] + 1,
        }
        outputs |= {"hazards": sizes["hazards"], "colours": sizes["colours"] + 1, "counts": 4}
        outputs |= {"places": 4 * sizes["objects"]}
        self.heads = nn.ModuleDict({name: nn.Linear(wide, size) for name, size in outputs.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        wide = self.trunk(x)
        features = self.features(wide)
        out = {name: head(wide) for name, head in self.heads.items()}
        out["places"] = out["places"].unflatten(1, (-1, 4))
        return {"features": features, "by_features": self.by_features(features), **out}


__all__ = ["WEIGHTS", "Judge", "clip_model", "prepared", "text_encoder", "text_features", "tokenize", "tokenizer"]
