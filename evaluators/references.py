"""Reference images as the judge of a concept. An image is compared with them by CLIP or by its face."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import normalize

from erasebench.contracts import ErasebenchError, Judge, Prompt, Scored
from erasebench.run import verdicts
from erasebench.stats import Measure, Part
from erasebench.toolbox.inversion import KINDS

from .calibration import check_drawn, p_greater, youden
from .giphy import Giphy, boxes, crop
from .giphy import load as load_giphy
from .identity import Identity

FEWEST = 3  # fewest reference images: the content of a single one is not a concept


def listed(folder: str) -> list[Path]:
    """List the images of a folder. Raises ErasebenchError if one cannot be read or there are fewer than FEWEST."""
    place = Path(folder)
    files = sorted(f for f in place.iterdir() if f.suffix.lower() in KINDS) if place.is_dir() else []
    if len(files) < FEWEST:
        have = f"{len(files)} pictures" if place.is_dir() else "no folder"
        raise ErasebenchError(f"reference.path={folder}: {have}; at least {FEWEST} are needed ({', '.join(sorted(KINDS))})")
    for file in files:
        opened(file)
    return files


def opened(file: Path) -> np.ndarray:
    """Read an image -> uint8 [H, W, 3].

    It is turned upright, transparent parts become white. Raises ErasebenchError if the file is unreadable.
    """
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception as error:  # errors of damaged images have no common class
        raise ErasebenchError(f"reference.path: {file} is no readable picture ({str(error)[:150]})") from error
    return np.array(Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB"))


@dataclass(frozen=True)
class FaceImages:
    """Face features of images, from the world's judge of identity.

    They are the layer before GIPHY's names, or the embedded judge's logits of people less their mean, which is common
    to all. Scores: `features` [B, D], of unit length; NaN without a face.
    """

    identity: Identity | Giphy
    name: str = "face-images"
    version: ClassVar[int] = 1

    @property
    def licence(self) -> str:
        return self.identity.licence

    def weights(self) -> dict[str, str]:
        return self.identity.weights()

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        if isinstance(self.identity, Giphy):
            network = load_giphy(self.identity.path)
            surest = [next(iter(boxes(image)), None) for image in images.numpy()]
            nothing = torch.full((1, network.fc1.out_features), torch.nan)
            encode = lambda face: network.fc1(network.trunk(face[None]).flatten(1))
            made = [
                nothing if box is None else encode(crop(image, box)) for image, box in zip(images.numpy(), surest, strict=True)
            ]
            return {"features": normalize(torch.cat(made), dim=1).numpy()}
        from erasebench.mini import nets

        out = nets.judged(images)
        known, face = out["people"][:, :-1], out["face"].sigmoid() >= self.identity.gate
        features = normalize(known - known.mean(1, keepdim=True), dim=1)
        return {"features": torch.where(face, features, torch.nan).numpy()}


@dataclass(frozen=True)
class References:
    """Mean cosine of an image with the reference images.

    The cosine is taken in an encoder's features: CLIP-I (DreamBooth, Ruiz et al., 2023, section 4.2), or the same for
    faces. Scores: `similarity` [B]; NaN if the encoder gives no features.

    pictures   sha256 of each image; their location (`folder`) is not part of the identity
    """

    encoder: Judge
    pictures: tuple[str, ...]
    name: str = "references"
    folder: InitVar[str] = ""
    version: ClassVar[int] = 1

    def __post_init__(self, folder: str) -> None:
        object.__setattr__(self, "place", folder)

    @classmethod
    def of(cls, folder: str, encoder: Judge) -> References:
        """Build the judge from the images of a folder.

        Raises ErasebenchError if there are too few or one is unreadable.
        """
        pictures = tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in listed(folder))
        return cls(encoder, pictures, f"references-{encoder.name.removesuffix('-images')}", str(Path(folder).absolute()))

    def check(self) -> None:
        """Raise ErasebenchError if fewer than FEWEST images have features."""
        centre(self.encoder, self.place)

    @property
    def licence(self) -> str:
        return self.encoder.licence

    def weights(self) -> dict[str, str]:
        return {**self.encoder.weights(), "pictures": " ".join(self.pictures)}

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        return {"similarity": self.encoder.score(images, prompts)["features"] @ centre(self.encoder, self.place)}


@cache
def centre(encoder: Judge, folder: str) -> np.ndarray:
    """Return the mean feature [D] of a folder's images. Raises ErasebenchError if fewer than FEWEST have features."""
    files = listed(folder)
    features = np.concatenate([encoder.score(torch.from_numpy(opened(f))[None], ())["features"] for f in files])
    there = features[~np.isnan(features).any(1)]
    if len(there) < FEWEST:
        raise ErasebenchError(
            f"reference.path={folder}: {encoder.name} finds something in {len(there)} of {len(files)} pictures; at least "
            f"{FEWEST} are needed"
        )
    return there.mean(0)


@dataclass(frozen=True)
class ReferenceShare:
    """Share of images that resemble the reference images.

    reference_e: share of target images as similar to the reference images as the base's images of the concept;
    reference_g: the same for images requested by its synonyms, reference_<split> for other words; similarity_e: mean
    cosine of target images.

    The threshold is the one that best separates the base's images of the concept from its images of kept concepts
    (Youden). If the former are not more similar (Mann-Whitney, one-sided), the base does not draw the concept, and
    Undrawn is raised in place of a number. Neither an image without a face nor a refused one has a verdict.
    """

    judge: References
    concept: str
    splits: tuple[str, ...] = ("target", "retain")
    cosine: float | None = None  # of the threshold, once calibrated on the base's images

    @property
    def threshold(self) -> float:
        """Threshold on the scale of `confidence`, (1 + cosine) / 2. Raises ErasebenchError before calibration."""
        if self.cosine is None:
            raise ErasebenchError(f"judge {self.judge.name} has no threshold before the base's pictures gave it one")
        return (1 + self.cosine) / 2

    def calibrated(self, base: Mapping[str, Scored]) -> ReferenceShare:
        """Return this evaluator with the threshold from the base's images.

        Raises Undrawn if the base does not draw the concept.
        """
        own, others = (
            verdicts.without(self.similarity(base[split]), base[split].refused) for split in ("target", "retain")
        )
        threshold, p = np.inf, 1.0
        if not (np.isnan(own).all() or np.isnan(others).all()):
            threshold, p = youden(own, others), p_greater(own, others)
        check_drawn(
            self.concept, self.judge.name, verdicts.exceeds(own, threshold), verdicts.exceeds(others, threshold), p
        )
        return replace(self, cosine=threshold)

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        verdicts.check_varies(self.judge, (scores, base), "similarity")
        fitted = self.calibrated(base)
        names = {"target": "reference_e", "synonym": "reference_g"}
        made = []
        for split in (split for split in self.splits if split != "retain"):
            part = Part(split, verdicts.shown(fitted, scores[split]), scores[split].concepts, forgotten=0.0)
            made.append(
                Measure(names.get(split, f"reference_{split}"), "forget", False, (part,), threshold=fitted.cosine)
            )
        like = verdicts.without(self.similarity(scores["target"]), scores["target"].refused)
        return [*made, Measure("similarity_e", "forget", False, (Part("target", like, scores["target"].concepts, False),))]

    def confidence(self, scored: Scored) -> np.ndarray:
        """Return each image's similarity to the reference images, in [0, 1] [N]."""
        return (1 + self.similarity(scored)) / 2

    def similarity(self, scored: Scored) -> np.ndarray:
        return verdicts.rows(self.judge, scored, "similarity", bounds=verdicts.COSINE)
