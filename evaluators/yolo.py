"""YOLOv8n-cls as a judge of objects (Dark Miner, section 5.1).

The architecture is ultralytics', the weights are safetensors.

    python -m erasebench.evaluators.yolo train data=<folder of Imagenette> out=<folder> epochs=20

trains it on Imagenette with ultralytics' own recipe. ultralytics and weights trained with it are AGPL-3.0; the extra
`yolo` installs it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from erasebench import needs
from erasebench.contracts import ErasebenchError, Missing, Prompt
from erasebench.run import judging
from erasebench.store.local import sha256_once

FILES = ("yolo.safetensors", "yolo.json")
IMAGENETTE = {  # its folders are named by WordNet id
    "n01440764": "tench", "n02102040": "english springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "french horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
}  # fmt: skip


@dataclass(frozen=True)
class Yolo:
    """YOLOv8n-cls classifier of objects.

    Scores: `probabilities` [B, C]. `folder` contains yolo.safetensors and yolo.json (classes, size in pixels);
    "embedded" selects the embedded world's own.
    """

    folder: str | None = "embedded"
    name: str = "yolov8n-cls"
    version: ClassVar[int] = 1
    licence: ClassVar[str] = "AGPL-3.0"

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(json.loads((self.path / "yolo.json").read_text(encoding="utf-8"))["classes"])

    @property
    def path(self) -> Path:
        from erasebench.mini.files import WEIGHTS

        if self.folder is None:
            raise Missing(
                "YOLOv8 for Imagenette is not here; train it: python -m erasebench.evaluators.yolo train data=... out=... "
                "(then world.judges.yolo.folder=)"
            )
        path = WEIGHTS / "yolo" if self.folder == "embedded" else Path(self.folder)
        if all((path / name).is_file() for name in FILES):
            return path
        if self.folder == "embedded":
            raise Missing("the embedded world's YOLOv8 is not here; train it: python -m erasebench.mini.train yolo")
        raise ErasebenchError(f"{path}: no {' and '.join(FILES)} (YOLOv8 weights, world.judges.yolo.folder=)")

    def needs(self) -> list[needs.Need]:
        if self.folder == "embedded":
            return []
        made = "python -m erasebench.evaluators.yolo train data=<Imagenette> out=<folder>"
        return [needs.file(self.folder, "YOLOv8 for Imagenette", 0, made, "world.judges.yolo.folder=")]

    def weights(self) -> dict[str, str]:
        return {"yolo.safetensors": sha256_once(self.path / "yolo.safetensors")}

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        network, size = load(self.path, judging.device())
        x = images.permute(0, 3, 1, 2).float() / 255
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return {"probabilities": judging.in_batches(lambda part: logits(network, part), x).softmax(1).numpy()}


def build(classes: int) -> nn.Module:
    """Build the network with random weights. Raises ErasebenchError if ultralytics is not installed."""
    # by default it looks for updates, installs packages and prints messages
    for name, value in (("OFFLINE", "true"), ("AUTOINSTALL", "false"), ("VERBOSE", "false")):
        os.environ.setdefault(f"YOLO_{name}", value)
    opener = Image.open
    try:
        from ultralytics.nn.tasks import ClassificationModel
    except ImportError as error:
        raise ErasebenchError("ultralytics is not installed: pip install 'erasebench[yolo]' (AGPL-3.0)") from error
    finally:
        Image.open = opener  # ultralytics replaces it; its own fetches a package for an image it cannot read
    return ClassificationModel("yolov8n-cls.yaml", ch=3, nc=classes, verbose=False)


def logits(network: nn.Module, x: Tensor) -> Tensor:
    """Return class logits [B, C]. In eval mode ultralytics' head returns a tuple with probabilities first."""
    out = network(x)
    return out[1] if isinstance(out, tuple) else out


def save(network: nn.Module, classes: Sequence[str], size: int, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    half = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_file({k: v.contiguous().cpu() for k, v in half.items()}, folder / "yolo.safetensors")
    (folder / "yolo.json").write_text(json.dumps({"classes": list(classes), "size": size}), encoding="utf-8")


@cache
def load(folder: Path, device: str = "cpu") -> tuple[nn.Module, int]:
    """Load the network -> (network, side of its input in pixels). Raises ErasebenchError if the weights do not fit."""
    from safetensors.torch import load_file

    described = json.loads((folder / "yolo.json").read_text(encoding="utf-8"))
    network = build(len(described["classes"]))
    try:
        state = load_file(folder / "yolo.safetensors")
        network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    except Exception as error:  # safetensors, key and shape errors have no common class
        raise ErasebenchError(f"{folder}: not YOLOv8's weights ({str(error).splitlines()[0][:150]})") from error
    return network.eval().to(device), described["size"]


def train(data: Path, out: Path, epochs: int, size: int = 224) -> None:
    """Train on a folder with train/<class>/ and val/<class>/. Imagenette is published in this form."""
    from ultralytics import YOLO

    yolo = YOLO("yolov8n-cls.yaml")
    yolo.train(data=str(data), epochs=epochs, imgsz=size, project=str(out), name="training", exist_ok=True)
    best = YOLO(str(out / "training" / "weights" / "best.pt"))
    classes = [IMAGENETTE.get(name, name) for name in best.names.values()]
    save(best.model.float(), classes, size, out)
    print(f"{out}/yolo.safetensors: {len(classes)} classes")


def main(argv: Sequence[str]) -> int:
    given = dict(part.split("=", 1) for part in argv[1:] if "=" in part)
    if argv[:1] != ["train"] or not {"data", "out"} <= set(given) or set(given) - {"data", "out", "epochs"}:
        print(
            "usage: python -m erasebench.evaluators.yolo train data=<folder> out=<folder> [epochs=20]", file=sys.stderr
        )
        return 2
    data, epochs = Path(given["data"]), given.get("epochs", "20")
    if not (data / "train").is_dir() or not epochs.isdigit() or epochs == "0":
        print(f"error: {data}/train is no folder of classes, or epochs={epochs} no whole number", file=sys.stderr)
        return 2
    train(data, Path(given["out"]), int(epochs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
