"""GIPHY's celebrity detector as a judge of identity (MACE, section 4.2).

MTCNN finds faces, and a ResNet-50 classifies them by 2,306 names. The user supplies the weights: `folder` contains
best_model_states.pkl and labels.csv of GIPHY's release. The MTCNN is facenet-pytorch's, whose networks are those of
GIPHY's TensorFlow code: `pip install --no-deps facenet-pytorch`. This departs from the released code if an image has
several faces: there a mixture model on the embeddings decides which are one person, here faces with the same most
likely name are one person.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from erasebench import needs
from erasebench.contracts import ErasebenchError, Missing, Prompt
from erasebench.run import judging
from erasebench.store.local import sha256_once

MARGIN, SIDE = 0.2, 224
FILES = ("best_model_states.pkl", "labels.csv")
FACENET = "pip install --no-deps facenet-pytorch"
SET = "world.judges.identity.folder="


@dataclass(frozen=True)
class Giphy:
    """GIPHY's detector of celebrities.

    Scores: `names` [B, 2306], softmax of the person with most faces; NaN without a face.
    """

    folder: str | None = None
    sha256: str | None = None  # of the weights, checked if given
    name: str = "giphy"
    version: ClassVar[int] = 1
    licence: ClassVar[str] = "MPL-2.0"

    @property
    def people(self) -> list[str]:
        return list(labels(self.path / FILES[1]))

    @property
    def path(self) -> Path:
        if self.folder is None:
            raise Missing(
                f"GIPHY's celebrity detector is not here: a folder with {' and '.join(FILES)} is needed ({SET})"
            )
        for name in FILES:
            if not (Path(self.folder) / name).is_file():
                raise ErasebenchError(f"{self.folder}: no {name} (GIPHY's celebrity detector, {SET})")
        return Path(self.folder)

    def needs(self) -> list[needs.Need]:
        source = "https://github.com/Giphy/celeb-detection-oss (its release of weights and labels)"
        files = (
            needs.file(self.folder and Path(self.folder) / name, f"GIPHY's {name}", size, source, SET)
            for name, size in zip(FILES, (100, 0), strict=True)
        )
        return [*files, needs.package("facenet_pytorch", "MTCNN of facenet-pytorch", FACENET)]

    def weights(self) -> dict[str, str]:
        found = {name: sha256_once(self.path / name) for name in FILES}
        if self.sha256 and found[FILES[0]] != self.sha256:
            raise ErasebenchError(f"{self.path / FILES[0]}: sha256 is {found[FILES[0]]}, expected {self.sha256}")
        return found

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        network, people = load(self.path, judging.device()), self.people
        made = np.full((len(images), len(people)), np.nan, np.float32)
        for row, image in enumerate(images.numpy()):
            faces = [crop(image, box) for box in boxes(image)]
            if faces:
                chances = judging.in_batches(network, torch.stack(faces)).double()
                if not torch.isfinite(chances).all():  # NaN would mean that there is no face
                    raise ErasebenchError(f"judge {self.name}: what its network says of a face is not finite")
                made[row] = most_seen(chances).numpy()
        return {"names": made}


def most_seen(chances: Tensor) -> Tensor:
    """Return the probabilities of the person with most faces.

    Probabilities [F, C] of the faces of one image -> [C]. Faces with the same most likely name are one person, whose
    probabilities multiply. In a tie the first person counts, with the surest face.
    """
    first = chances.argmax(1).tolist()
    who = max(dict.fromkeys(first), key=first.count)
    logs = chances[[i for i, name in enumerate(first) if name == who]].clamp(min=1e-300).log().sum(0)
    return logs.softmax(0)


def crop(image: np.ndarray, box: Sequence[float]) -> Tensor:
    """Crop a face -> [3, 224, 224] in [0, 1].

    The box grows by half the margin on each side, in whole pixels, and is cut at the edges. Resizing ignores its
    aspect.
    """
    left, top, right, bottom = (int(v) for v in box)
    wide, high = int((right - left) * MARGIN) // 2, int((bottom - top) * MARGIN) // 2
    height, width = image.shape[:2]
    part = image[max(top - high, 0) : min(bottom + high, height), max(left - wide, 0) : min(right + wide, width)]
    resized = Image.fromarray(part).resize((SIDE, SIDE), Image.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def boxes(image: np.ndarray) -> list[list[float]]:
    """Return faces (left, top, right, bottom), the surest first. Empty boxes are left out."""
    found, chances = faces(judging.device()).detect(Image.fromarray(image))
    if found is None:
        return []
    order = np.argsort(-np.asarray(chances, float))
    height, width = image.shape[:2]
    inside = lambda b: min(b[2], width) - max(b[0], 0) >= 1 and min(b[3], height) - max(b[1], 0) >= 1
    return [found[i].tolist() for i in order if inside(found[i])]


@cache
def faces(device: str = "cpu"):
    try:
        from facenet_pytorch import MTCNN
    except ImportError as error:
        raise ErasebenchError(
            f"faces need MTCNN: {FACENET} (its pins on torch and numpy are stale)"
        ) from error
    return MTCNN(keep_all=True, min_face_size=20, thresholds=[0.6, 0.7, 0.7], factor=0.709, device=device)


@cache
def labels(path: Path) -> tuple[str, ...]:
    """Return names in the order of class ids.

    An id is the rank of a row sorted by the first column. Raises ErasebenchError if there are no rows.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    names = sorted(row[0] for row in rows[1:])
    if not names:
        raise ErasebenchError(f"{path}: no labels")
    return tuple(name.split("_[")[0].replace("_", " ") for name in names)


class Recogniser(nn.Module):
    """ResNet-50's trunk with two linear layers, 2048 -> 256 -> names."""

    def __init__(self, names: int):
        super().__init__()
        from torchvision.models import resnet50

        trunk = resnet50()
        self.trunk = nn.Sequential(*list(trunk.children())[:-1])
        self.fc1, self.fc2 = nn.Linear(2048, 256), nn.Linear(256, names)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.trunk(x).flatten(1))).softmax(1)


@cache
def load(folder: Path, device: str = "cpu") -> Recogniser:
    network = Recogniser(len(labels(folder / FILES[1])))
    try:
        state = torch.load(folder / FILES[0], map_location="cpu", weights_only=True)["model_state"]
        state = {k.removeprefix("model."): v for k, v in state.items() if "center_loss" not in k}
        theirs = {k: v for k, v in state.items() if not k.startswith(("fc1.", "fc2."))}
        head = {k: v for k, v in state.items() if k.startswith(("fc1.", "fc2."))}
        # the trunk's entries come in the order of the network, under any module name; PyTorch before 0.4.1 did not
        # count batches, and nothing here reads the counts
        counts = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
        own = [k for k in network.state_dict() if k.startswith("trunk.") and k not in counts]
        theirs = {k: v for k, v in theirs.items() if v.is_floating_point()}
        if len(own) != len(theirs):
            raise KeyError(f"{len(theirs)} trunk entries, expected {len(own)}")
        network.load_state_dict({**counts, **dict(zip(own, theirs.values(), strict=True)), **head})
    except Exception as error:  # unpickling, key and shape errors have no common class
        raise ErasebenchError(
            f"{folder / FILES[0]}: not GIPHY's weights ({str(error).splitlines()[0][:150]})"
        ) from error
    return network.eval().to(device)
