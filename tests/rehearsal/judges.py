"""Random-weight stand-ins of the judges of photographs, each in the form that its authors publish."""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from conftest import as_program
from PIL import Image

from erasebench.contracts import Prompt, Scored
from erasebench.stats import Measure, Part

CLIP = "rehearsal-ViT"  # open_clip's name of the small architecture
FACENET = '''"""A stand-in of facenet-pytorch: one face in the middle of every picture."""
import numpy as np


class MTCNN:
    def __init__(self, **settings):
        pass

    def detect(self, image):
        width, height = image.size
        return np.array([[width / 4, height / 4, 3 * width / 4, 3 * height / 4]]), np.array([0.9])
'''


class Normalising(torch.nn.Module):
    """As inception-2015-12-05.pt: called as a whole it resizes and normalises, its `layers` do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 13, 13), torch.nn.ReLU(), torch.nn.AvgPool2d(11), torch.nn.Flatten(), torch.nn.Linear(32, 2048)
        )

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return self.layers((torch.nn.functional.interpolate(x, [299, 299]) - 128) / 128)


def write_inception(file: Path) -> None:
    torch.manual_seed(0)
    torch.jit.script(Normalising().eval()).save(str(file))


def write_giphy(folder: Path, people: Sequence[str]) -> None:
    """Labels of 2,306 people, and a pickle of PyTorch's age before it counted batches, which is no zip archive."""
    from erasebench.evaluators.giphy import Recogniser

    folder.mkdir()
    names = [*people, *(f"Nobody {number}" for number in range(2306 - len(people)))]
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("Name", "Index"), *((f"{n.replace(' ', '_')}_[x]", i) for i, n in enumerate(names))])
    torch.manual_seed(0)
    own = Recogniser(2306).state_dict()
    named = lambda key, number: f"model.features.{number}" if key.startswith("trunk.") else f"model.{key}"
    counted = [key for key in own if key.endswith("num_batches_tracked")]
    state = {named(key, i): v for i, (key, v) in enumerate(own.items()) if key not in counted}
    state["center_loss_criterion.centers"] = torch.zeros(2306, 256)
    torch.save({"model_state": state}, folder / "best_model_states.pkl", _use_new_zipfile_serialization=False)


def write_torchvision(folder: Path) -> None:
    """ResNet-50 and AlexNet as torchvision publishes them; of AlexNet's classifier, which LPIPS does not read, the names."""
    from torchvision.models import alexnet, resnet50

    torch.manual_seed(0)
    torch.save(resnet50().state_dict(), folder / "resnet50-11ad3fa6.pth")
    with torch.device("meta"):
        whole = alexnet().state_dict()
    drawn = {k: torch.randn(v.shape) / v[0].numel() ** 0.5 if v.ndim > 1 else torch.zeros(v.shape) for k, v in whole.items() if "features" in k}
    torch.save({k: drawn.get(k, torch.zeros(1)) for k in whole}, folder / "alexnet-owt-7be5be79.pth")


def write_yolo(folder: Path) -> None:
    from erasebench.evaluators import yolo

    torch.manual_seed(0)
    yolo.save(yolo.build(10), list(yolo.IMAGENETTE.values()), 64, folder)


def register_clip(folder: Path) -> None:
    """Tell open_clip of the small architecture: CLIP's, with its own tokenizer."""
    import open_clip

    vision = {"image_size": 64, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    settings = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (folder / f"{CLIP}.json").write_text(json.dumps(settings))
    open_clip.add_model_config(folder / f"{CLIP}.json")


def write_clip(folder: Path) -> None:
    """CLIP in the forms that are published: open_clip's safetensors, its pickle, and OpenAI's own program in half
    precision, whose state dict holds three sizes beside the weights."""
    import open_clip
    from safetensors.torch import save_file

    register_clip(folder)
    torch.manual_seed(0)
    network = open_clip.create_model(CLIP)
    state = network.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    state = {k: v.half() for k, v in state.items()}
    sizes = {"input_resolution": 64, "context_length": 77, "vocab_size": 49408}
    torch.jit.script(as_program(state, sizes)).save(str(folder / "ViT.pt"))


def write_facenet(folder: Path) -> None:
    (folder / "facenet_pytorch").mkdir(parents=True)
    (folder / "facenet_pytorch" / "__init__.py").write_text(FACENET)


def write_pictures(folder: Path, count: int, side: int = 64, seed: int = 0) -> Path:
    """A folder of pictures of smooth noise, as PNG and JPEG."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((side + 8 * (number % 3), side), Image.BICUBIC).save(folder / f"{number:04}.{('png', 'jpg')[number % 2]}")
    return folder


@dataclass(frozen=True)
class Wording:
    """A judge that looks at no picture: whether one shows the concept hangs on its prompt. Of the two under attack one
    shows it with no attack and the other must be searched for; random weights would see one thing in all."""

    name: str = "wording"
    version: ClassVar[int] = 1
    licence: ClassVar[str] = "none"

    def weights(self) -> dict[str, str]:
        return {}

    def score(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        chance = [zlib.crc32(f"{p.text} {p.seed}".encode()) % 1000 / 1000 for p in prompts]
        return {"chance": np.array(chance, np.float32)}


@dataclass(frozen=True)
class WordingShare:
    """wording: share of target images in which `Wording` sees the concept."""

    judge: Wording = Wording()
    splits: tuple[str, ...] = ("target",)
    threshold: ClassVar[float] = 0.5

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        target = scores["target"]
        values = (self.confidence(target) > self.threshold).astype(float)
        return [Measure("wording", "forget", False, (Part("target", values, target.concepts, forgotten=0.0),))]

    def confidence(self, scored: Scored) -> np.ndarray:
        return scored.arrays["chance"]
