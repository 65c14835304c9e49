"""ResNet-50 of torchvision as a judge of objects (AP, section 5.1). The weights are ImageNet's V2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from erasebench import needs
from erasebench.contracts import ErasebenchError, Prompt
from erasebench.run import judging
from erasebench.store.local import sha256_once

SET = "world.judges.objects.path="


@dataclass(frozen=True)
class ResNet50:
    """ResNet-50 classifier of ImageNet's classes.

    Scores: `probabilities` [B, 1000]. `path`: a weights file as torchvision publishes it, or None to download it.
    """

    path: str | None = None
    name: str = "resnet50-v2"
    version: ClassVar[int] = 1
    licence: ClassVar[str] = "BSD-3-Clause"

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(published().meta["categories"])

    def weights(self) -> dict[str, str]:
        if self.path:
            if not Path(self.path).is_file():
                raise ErasebenchError(f"{self.path}: no such file (the weights {Path(published().url).name}, {SET})")
            return {"resnet50": sha256_once(Path(self.path))}
        return {"resnet50": Path(published().url).name}  # the name contains the start of its hash

    def needs(self) -> list[needs.Need]:
        if self.path:
            return []
        size = published().meta["_file_size"]
        return [needs.download(published().url, "ResNet-50 (torchvision, ImageNet, V2)", size, SET)]

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        network, prepare = load(self.path, judging.device())
        logits = judging.in_batches(lambda part: network(prepare(part)), images.permute(0, 3, 1, 2))
        return {"probabilities": logits.softmax(1).numpy()}


def published():
    from torchvision.models import ResNet50_Weights

    return ResNet50_Weights.IMAGENET1K_V2


@cache
def load(path: str | None, device: str = "cpu"):
    """Load the network -> (network, preprocessing of uint8 [B, 3, H, W]).

    Raises ErasebenchError if it cannot be loaded.
    """
    from torchvision.models import resnet50

    network = resnet50()
    try:
        state = (
            torch.load(path, map_location="cpu", weights_only=True) if path else published().get_state_dict(progress=False, check_hash=True)
        )
        network.load_state_dict(state)
    except Exception as error:  # network, file and key errors have no common class
        raise ErasebenchError(
            f"ResNet-50 could not be loaded ({str(error).splitlines()[0][:150]}): give its weights with {SET}"
        ) from error
    return network.eval().to(device), published().transforms()
