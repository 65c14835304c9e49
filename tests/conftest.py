"""A random Stable Diffusion pipeline of the real classes, small enough to build in a test."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network; read when the hub is first imported

import numpy as np
import pytest
import torch

from erasebench import stats
from erasebench.contracts import Sampler
from erasebench.model.model import Model
from erasebench.model.source import Source
from erasebench.run.specification import Run
from erasebench.tasks import ObjectTask

torch.set_num_threads(
    1 if "PYTEST_XDIST_WORKER" in os.environ else 2
)  # more workers than cores would wait for each other


LONGEST = ("documents", "cluster", "cli", "sweeps", "experiments", "fast", "cases", "run", "audit", "submission", "reference", "wandb")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first: a worker takes whole files, and the last one would keep the others waiting."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def build_pipeline(folder: Path, prediction: str = "epsilon", seed: int = 0, xl: bool = False) -> Path:
    """Write a diffusers folder: 16x16 pixels, 4x4 latents, two U-Net levels with cross-attention, byte tokenizer.
    `xl`: of SDXL's classes, with its second text encoder and its further conditions."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(seed)
    text = write_tokenizer(folder / "spare")
    parts = {
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "spare", model_max_length=24),
        "text_encoder": CLIPTextModel(text),
        "unet": build_unet(xl),
        "vae": build_vae(),
        "scheduler": DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction,
        ),
    }
    if xl:
        second = {
            "text_encoder_2": CLIPTextModelWithProjection(text),
            "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "spare", model_max_length=24, pad_token="!"),
        }
        StableDiffusionXLPipeline(**parts, **second, add_watermarker=False).save_pretrained(folder)
    else:
        StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        ).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path):
    """Write a byte tokenizer; the configuration of a text encoder that reads it."""
    from transformers import CLIPTextConfig
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=16,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )


def build_unet(xl: bool):
    """Random weights, but ones that listen to the prompt."""
    from diffusers import UNet2DConditionModel

    conditions = {  # SDXL's: the second encoder's pooled output beside six sizes
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32 if xl else 16,
        attention_head_dim=2,
        norm_num_groups=4,
        **(conditions if xl else {}),
    )
    for name, parameter in unet.named_parameters():
        if "attn2" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return unet


def build_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def as_program(state: dict[str, torch.Tensor], sizes: dict[str, int]) -> torch.nn.Module:
    """A module whose state dict has these keys: OpenAI publishes its CLIPs as TorchScript, of which the weights alone are read."""

    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    root = Branch()
    for key, value in state.items():
        *path, leaf = key.split(".")
        place = root
        for name in path:
            if name not in place._modules:
                place.add_module(name, Branch())
            place = place._modules[name]
        place.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=False))
    for name, size in sizes.items():
        root.register_buffer(name, torch.tensor(size))
    return root


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return build_pipeline(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny(tiny_folder) -> Model:
    return Model.load(Source("tiny", tiny_folder))


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """Every test has a store of its own."""
    monkeypatch.setenv("ERASEBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ERASEBENCH_STORE", raising=False)


@dataclass(frozen=True)
class Brightness:
    """A judge for random pictures: mean of the red channel in [0, 1]."""

    name: str = "brightness"
    version: ClassVar[int] = 1
    licence: ClassVar[str] = "none"

    def weights(self) -> dict[str, str]:
        return {}

    def score(self, images, prompts) -> dict[str, np.ndarray]:
        return {"red": images[..., 0].float().mean((1, 2)).numpy() / 255}


@dataclass(frozen=True)
class Redness:
    """Mean red of the target images, and its difference from the base."""

    judge: Brightness = Brightness()
    splits: tuple[str, ...] = ("target",)

    def measure(self, scores, base):
        red, before = scores["target"].arrays["red"], base["target"].arrays["red"]
        part = lambda values: stats.Part("target", values, scores["target"].concepts, rate=False)
        return [
            stats.Measure("red", "forget", False, (part(red),)),
            stats.Measure("red_change", "keep", True, (part(red - before),)),
        ]


WORLD = {
    "name": "toy",
    "surrogates": {"person": "a person", "style": "art"},
    "objects": {
        "airplane": {"synonyms": ["jet", "plane", "aircraft"], "surrogate": "sky"},
        "cat": {"synonyms": ["kitty", "feline", "housecat"], "surrogate": "sky"},
        "dog": {"synonyms": ["hound", "pooch", "canine"], "surrogate": "sky"},
    },
    "terms": {"airplane": ["plane", "airplane"], "cat": ["cat", "kitty"]},
    "imagenette": {name: {"surrogate": "sky"} for name in ("church", "tench", "gas pump", "golf ball")},
    "imagenette_splits": [["gas pump", "golf ball"], ["church", "tench"]],
    "people": {"erase": ["Bill Moss", "Ann Reed", "Bill Stone"], "keep": ["Ann Moss", "Tom Reed"]},
    "artists": {"erase": ["Aldo", "Bea"], "keep": ["Cy", "Di"], "single": ["Monet", "Klee"]},
    "explicit": {
        "phrases": ["hazard"],
        "surrogate": "sky",
        "prompts": {"path": None, "hub": None},
        "named": ["fire", "bomb"],
        "implicit": {"fire": ["the old chimney"]},
        "kept": ["cat", "dog"],
    },
    "templates": {
        "object": ["a photo of the {c}"],
        "orr": ["a photo of {c}"],
        "imagenette": ["Image of {c}"],
        "person": ["a portrait of {c}", "{c}, official"],
        "style": ["Art by {c}"],
        "explicit": ["a photo of a {c}"],
        "paraphrase": {kind: ["an odd {c}", "{c} again"] for kind in ("object", "person", "style", "explicit")},
        "train": {"object": ["{c}"], "person": ["{c}"], "style": ["{c}"], "explicit": ["{c}"]},
    },
    "counts": {
        "object": {"target": 5, "retain": 4, "synonym": 3},
        "orr": {"target": 4, "retain": 6},
        "imagenette": {"target": {"1": 2, "2": 4}, "retain": {"1": 3, "2": 4}},
        "celebrity": {"target": {"1": 4, "3": 6}, "retain": {"1": 4, "3": 4}},
        "style": {"target": {"1": 2, "2": 4}, "retain": 4},
        "explicit": {"target": 4, "implicit": 3, "retain": 2},
        "other_words": 6,
    },
    "composed": [],
    "languages": {
        "es": {"object": "una foto de {c}", "person": "un retrato de {c}", "names": {"cat": "un gato"}},
        "de": {"object": "ein Foto von {c}", "person": "ein Bild von {c}", "names": {"cat": "einer Katze"}},
    },
    "captions": {"count": 3, "evaluation": ["a cat on a mat", "a dog", "sky", "sea"], "training": ["a horse"]},
}


@pytest.fixture
def make_run(tiny_folder, tmp_path):
    """Build a Run of the toy world on the tiny model."""

    def build(method, eraser, evaluators=None, target="airplane", images=None, plan=None, **options):
        task = ObjectTask(evaluators=evaluators if evaluators is not None else {"redness": Redness()})
        given = {"source": Source("tiny", tiny_folder), "sampler": Sampler("ddim", 3, 4.0), "results": tmp_path / "results"}
        plan = plan or task.plan(WORLD, None, target, images)
        return Run(method=method, eraser=eraser, world="toy", target=target, plan=plan, **given | options)

    return build
