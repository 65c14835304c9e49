"""Folders of published architectures with few channels and random weights, and the tokenizer of CLIP whole."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch

VAE_LEVELS = 4  # eight pixels a latent
WORDS = 49408
UNETS: dict[str, dict[str, Any]] = {  # what each architecture has of its own
    "sd14": {  # heads of SD 1.x are eight a layer, whatever its width
        "block_out_channels": (16, 16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
    },
    "sd21": {  # a number of heads for each level, and linear projections
        "block_out_channels": (16, 16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": [1, 2, 4, 4],
        "cross_attention_dim": 32,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (16, 16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": [1, 2, 4],
        "transformer_layers_per_block": [1, 2, 3],
        "cross_attention_dim": 32 + 48,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
    },
    "bk_sdm": {  # BK-SDM-Small: a layer less in every block, no middle block, the last level's channels as the one before
        "block_out_channels": (16, 16, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "mid_block_type": None,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
    },
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TEXT = {  # of all: the ids are those that the published configurations name, which are not the tokenizer's
    "vocab_size": WORDS,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


def write_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> Any:
    """CLIP's own tokenizer, made of the merges that open_clip ships with."""
    import open_clip
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    packed = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")[1 : WORDS - 512 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(m.replace(" ", "") for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=pad)


def text_encoder(width: int, act: str, projected: bool = False) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width}
    return kind(CLIPTextConfig(**TEXT, **sizes, hidden_act=act))


def unet(name: str, side: int) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(sample_size=side, norm_num_groups=4, **{"layers_per_block": 2, **UNETS[name]})
    for parameter_name, parameter in network.named_parameters():  # random weights, but ones that listen to the prompt
        if "attn2" in parameter_name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def write_base(folder: Path, name: str, side: int = 8) -> Path:
    """A diffusers folder of an architecture in UNETS; pictures of 8 * `side` pixels."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        EulerDiscreteScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

    torch.manual_seed(0)
    xl, second_generation = name == "sdxl", name == "sd21"
    vae = AutoencoderKL(
        block_out_channels=(8,) * VAE_LEVELS,
        down_block_types=("DownEncoderBlock2D",) * VAE_LEVELS,
        up_block_types=("UpDecoderBlock2D",) * VAE_LEVELS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8 * side,
        **({"scaling_factor": 0.13025, "force_upcast": True} if xl else {}),
    )
    schedulers = {"sd21": DDIMScheduler, "sdxl": EulerDiscreteScheduler}
    own = {
        "sd21": {"prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False},
        "sdxl": {"interpolation_type": "linear", "timestep_spacing": "leading"},
    }.get(name, {"skip_prk_steps": True, "set_alpha_to_one": False})
    parts = {
        "vae": vae,
        "text_encoder": text_encoder(32, "gelu" if second_generation else "quick_gelu"),
        "tokenizer": write_tokenizer(folder.parent / f"{name}-words", "!" if second_generation else "<|endoftext|>"),
        "unet": unet(name, side),
        "scheduler": schedulers.get(name, PNDMScheduler)(**SCHEDULE, **own),
    }
    if xl:
        words = write_tokenizer(folder.parent / f"{name}-words-2", "!")
        second = {"text_encoder_2": text_encoder(48, "gelu", projected=True), "tokenizer_2": words}
        StableDiffusionXLPipeline(**parts, **second, add_watermarker=False).save_pretrained(folder)
    else:
        checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        StableDiffusionPipeline(**parts, **checker).save_pretrained(folder)
    return folder
