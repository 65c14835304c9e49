"""CLIP as a judge (open_clip), and the CLIP score of captions."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from erasebench import needs
from erasebench.contracts import ErasebenchError, Prompt, Scored
from erasebench.mini.nets import LICENCE
from erasebench.run import judging, verdicts
from erasebench.stats import Measure, Part
from erasebench.store.local import sha256_once

SIZES = {"ViT-B-32-quickgelu": 605, "ViT-L-14-quickgelu": 1710}  # megabytes: parameters times four
SET = "world.judges.clip.pretrained=, that of styles with world.judges.styles.clip.pretrained=, a method's with method.clip.pretrained="


@dataclass(frozen=True)
class Clip:
    """Cosine similarity of images with their own prompt and with `texts`.

    pretrained="embedded" is the world's own model; any other value is open_clip's name of pretrained weights, or a
    file. Scores: `own` [B], `texts` [B, T], both raw cosines.
    """

    name: str = "clip"
    architecture: str = "ViT-B-32-quickgelu"
    pretrained: str = "openai"
    texts: tuple[str, ...] = ()
    version: ClassVar[int] = 1

    def weights(self) -> dict[str, str]:
        if self.pretrained == "embedded":
            from erasebench.mini import nets

            return nets.checksums("clip")
        file = Path(self.pretrained)
        if self.names_file and not file.is_file():
            raise ErasebenchError(f"{self.pretrained}: no such file (the weights of a CLIP, {SET})")
        return {"open_clip": sha256_once(file) if file.is_file() else f"{self.architecture}/{self.pretrained}"}

    @property
    def names_file(self) -> bool:
        """Whether `pretrained` can only be a file. open_clip's names are single words."""
        return bool(Path(self.pretrained).suffix) or len(Path(self.pretrained).parts) > 1

    def needs(self) -> list[needs.Need]:
        if self.pretrained == "embedded" or Path(self.pretrained).is_file():
            return []
        if self.names_file:
            return [needs.file(self.pretrained, f"CLIP {self.pretrained}", 0, "open_clip's weights, or OpenAI's", SET)]
        return [published(self.architecture, self.pretrained)]

    @property
    def licence(self) -> str:
        return LICENCE if self.pretrained == "embedded" else "MIT (open_clip, and OpenAI's weights)"

    def knows(self, name: str, kind: str = "objects") -> bool:
        """Return whether training included the name of an object (or artist).

        Web data include any name; the embedded model only read the names of its world.
        """
        if self.pretrained != "embedded":
            return True
        from erasebench.mini import nets

        return name in nets.classes()[kind]

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        model, preprocess, tokenize = load(self.architecture, self.pretrained)
        encode = lambda texts: torch.nn.functional.normalize(model.encode_text(tokenize(list(texts))), dim=-1).cpu()
        pixels = preprocess(images)
        features = judging.in_batches(model.encode_image, pixels, pixels.device)
        features = torch.nn.functional.normalize(features, dim=-1)
        scores = {"own": (features * encode([p.text for p in prompts])).sum(1).numpy()}
        if self.texts:
            scores["texts"] = (features @ encode(self.texts).T).numpy()
        return scores


@cache
def published(architecture: str, pretrained: str) -> needs.Need:
    """Return the need for weights under open_clip's name.

    They are looked up where open_clip keeps them: in the hub's cache, or in its own.
    """
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    known = get_pretrained_cfg(architecture, pretrained)
    repository, _, name = known.get("hf_hub", "").rpartition("/")
    names = [name] if name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    own = Path("~/.cache/clip").expanduser() / known.get("url", "").rpartition("/")[2]

    def find() -> Path | None:
        if repository:
            return next(filter(None, (needs.cached(repository, each) for each in names)), None)
        return own if known.get("url") and own.is_file() else None

    def fetch() -> None:
        if not known:
            raise ErasebenchError("open_clip knows no such weights, and there is no such file")
        download_pretrained(known)

    source = f"https://huggingface.co/{repository}" if repository else known.get("url") or "a file of weights"
    return needs.Need(f"CLIP {architecture}/{pretrained}", SIZES.get(architecture, 0), source, SET, find, fetch)


def load(architecture: str, pretrained: str):
    """Load CLIP on the device of judges.

    -> (model, preprocess: uint8 [B, H, W, 3] -> input, tokenize). The embedded model stays on the CPU.
    """
    if pretrained == "embedded":
        from erasebench.mini import nets

        return nets.load_clip()
    return loaded(architecture, pretrained, judging.device())


@cache
def loaded(architecture: str, pretrained: str, device: str):
    import open_clip
    from PIL import Image

    try:
        program = is_program(Path(pretrained))
        model, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=None if program else pretrained)
        if program:
            model.load_state_dict(weights_of_program(Path(pretrained)))
    except Exception as error:  # hub, file and name errors have no common class
        raise ErasebenchError(
            f"CLIP {architecture}/{pretrained} could not be loaded ({str(error).splitlines()[0][:150]}): give a file with {SET}"
        ) from error
    preprocess = lambda images: torch.stack([transform(Image.fromarray(i.numpy())) for i in images]).to(device)
    tokenizer = open_clip.get_tokenizer(architecture)
    return model.eval().to(device), preprocess, lambda texts: tokenizer(texts).to(device)


def is_program(file: Path) -> bool:
    """Return whether a file is TorchScript, as OpenAI publishes its CLIPs.

    open_clip reads such a file only under its own name.
    """
    if not file.is_file() or not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def weights_of_program(file: Path) -> dict[str, Tensor]:
    """Return the weights of a TorchScript file, in float32.

    None of its code runs, and its three sizes are left out.
    """
    state = torch.jit.load(str(file), map_location="cpu").state_dict()
    return {name: weight.float() for name, weight in state.items() if name not in ("input_resolution", "context_length", "vocab_size")}


@dataclass(frozen=True)
class ClipScore:
    """Mean cosine of images with their prompt, times 100.

    The score is that of Hessel et al., 2021, without the 2.5 and the clamp, as the erasure papers print it. It is
    measured on captions, or on another split under another `metric`. A refused image scores as it stands.
    """

    judge: Clip
    splits: tuple[str, ...] = ("caption",)
    metric: str = "clip_score"

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        (split,) = self.splits
        scored = scores[split]
        verdicts.check_varies(self.judge, (scores, base), "own")
        cosines = verdicts.rows(self.judge, scored, "own", bounds=verdicts.COSINE)
        own = Part(split, 100 * cosines, [p.text for p in scored.prompts], rate=False)
        return [Measure(self.metric, "quality", True, (own,))]
