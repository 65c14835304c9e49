"""Quality of images of ordinary captions. Frechet distance to real images, and distance to the base's own images."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erasebench import needs, stats
from erasebench.contracts import ErasebenchError, Judge, Metric, Missing, Prompt, Scored
from erasebench.mini.nets import LICENCE
from erasebench.run import judging, verdicts
from erasebench.stats import Measure, Part
from erasebench.store.local import Store, sha256_file, sha256_once

SET = "world.judges.quality"
LPIPS = "world.judges.perceptual.judge.path="
FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/pt_inception-2015-12-05-6726825d.pth"
CLEAN = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"


@dataclass(frozen=True)
class Features:
    """Features of the embedded world's judge. Scores: `features` [B, D]."""

    name: str = "features"
    version: ClassVar[int] = 1
    licence: ClassVar[str] = LICENCE

    def weights(self) -> dict[str, str]:
        from erasebench.mini import nets

        return nets.checksums("judge")

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        from erasebench.mini import nets

        return {"features": nets.features(images).numpy()}


@dataclass(frozen=True)
class Quality:
    """Frechet distance to drawings and distance to the base, on captions.

    `fd_mini`: Frechet distance (Heusel et al., 2017) between images of captions and the world's own drawings of
    captions, on the world's features. It is biased by the number of images: compare equal n only. Its interval is
    +-1.96 bootstrap standard errors. `paired_distance`: mean 1 - cos between an image's features and those of the
    base's image of the same prompt and seed.
    """

    judge: Features
    splits: tuple[str, ...] = ("caption",)

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure | Metric]:
        from erasebench.mini import nets

        verdicts.check_varies(self.judge, (scores, base), "features")
        real = nets.caption_features()
        ours = verdicts.rows(self.judge, scores["caption"], "features", real.shape[1])
        theirs = verdicts.rows(self.judge, base["caption"], "features", real.shape[1])
        check_pairs(self.judge, ours, theirs)
        unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        paired = Part(
            "caption", 1 - (unit(ours) * unit(theirs)).sum(1), [p.text for p in scores["caption"].prompts], rate=False
        )
        return [distance("fd_mini", ours, real), Measure("paired_distance", "quality", False, (paired,))]


def distance(name: str, ours: np.ndarray, real: np.ndarray, times: int = 200) -> Metric:
    """Return the Frechet distance of features [N, D] from [M, D].

    Its interval is +-1.96 bootstrap standard errors, over the images with features. The result is empty for a single
    image, which has no covariance. Raises ErasebenchError if the real features are not finite or have another width.
    """
    count, ours = len(ours), ours[~np.isnan(ours).any(1)]
    empty = Metric(name, "caption", None, None, None, "", count, len(ours), False, "quality")
    if len(ours) < 2:
        return empty
    if not np.isfinite(real).all() or real.shape[1] != ours.shape[1]:
        raise ErasebenchError(f"{name}: the real images' features are {list(real.shape)}, or not finite")
    from_real, rng = stats.frechet_to(real), np.random.default_rng(0)
    value = from_real(ours)
    half = 1.96 * stats.bootstrap_se(lambda index: from_real(ours[index]), len(ours), rng, times=times)
    return replace(empty, value=value, low=value - half, high=value + half, ci_method="bootstrap-se")


def check_pairs(judge: Judge, ours: np.ndarray, theirs: np.ndarray) -> None:
    if ours.shape != theirs.shape:
        raise ErasebenchError(
            f"judge {judge.name}: features {list(ours.shape)} against the base's {list(theirs.shape)}"
        )


@dataclass(frozen=True)
class AlexNet:
    """AlexNet's LPIPS features of images at 64 pixels (AP's lpips_eval).

    Scores: `features` [B, D], whose squared distance is LPIPS (Zhang et al., 2018, Eq. 1). AlexNet's weights come from
    torchvision (`path`: a file as torchvision publishes it), the linear ones from torchmetrics.
    """

    path: str | None = None
    name: str = "lpips-alex-64"
    version: ClassVar[int] = 1
    licence: ClassVar[str] = "BSD-3-Clause (AlexNet), BSD-2-Clause (LPIPS)"

    def weights(self) -> dict[str, str]:
        if self.path:
            if not Path(self.path).is_file():
                raise ErasebenchError(f"{self.path}: no such file (the weights {Path(alexnet().url).name}, {LPIPS})")
            return {"alexnet": sha256_once(Path(self.path))}
        return {"alexnet": Path(alexnet().url).name}  # the name contains the start of its hash

    def needs(self) -> list[needs.Need]:
        if self.path:
            return []
        return [needs.download(alexnet().url, "AlexNet of LPIPS", alexnet().meta["_file_size"], LPIPS)]

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        network = lpips(self.path, judging.device())
        return {"features": judging.in_batches(lambda part: self.features(network, part), images).numpy()}

    def features(self, network, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        x = torch.nn.functional.interpolate(x, (64, 64), mode="bilinear", antialias=True, align_corners=False)
        layers = []
        for seen, linear in zip(network.net(network.scaling_layer(x)), network.lins, strict=True):
            seen = seen / (seen.square().sum(1, keepdim=True).sqrt() + 1e-10)
            weight = linear.model[-1].weight.clamp(min=0) / (seen.shape[2] * seen.shape[3])
            layers.append((seen * weight.sqrt()).flatten(1))
        return torch.cat(layers, 1).half()


def alexnet():
    from torchvision.models import AlexNet_Weights

    return AlexNet_Weights.IMAGENET1K_V1


@cache
def lpips(path: str | None = None, device: str = "cpu"):
    from torchmetrics.functional.image.lpips import _LPIPS

    try:
        network = _LPIPS(pretrained=True, net="alex", eval_mode=True, pnet_rand=True)
        state = torch.load(path, weights_only=True) if path else alexnet().get_state_dict(progress=False, check_hash=True)
        # its slices number the layers like torchvision's `features`
        own = {key: state[f"features.{key.partition('.')[2]}"] for key in network.net.state_dict()}
        network.net.load_state_dict(own)
    except Exception as error:  # network, file and key errors have no common class
        raise ErasebenchError(
            f"LPIPS could not be loaded ({str(error).splitlines()[0][:150]}): give AlexNet's weights with {LPIPS}"
        ) from error
    return network.to(device)


@dataclass(frozen=True)
class Perceptual:
    """LPIPS between images and the base's (AP, section 5.3).

    lpips_e, lpips_s: mean LPIPS between an image and the base's of the same prompt and seed, for erased concepts
    (higher means further away) and kept ones. A refused image of an erased concept has no verdict.
    """

    judge: AlexNet = AlexNet()
    splits: tuple[str, ...] = ("target", "retain")

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        verdicts.check_varies(self.judge, (scores, base), "features")
        made = []
        for name, split, group, better in (("lpips_e", "target", "forget", True), ("lpips_s", "retain", "keep", False)):
            ours, theirs = (verdicts.rows(self.judge, side[split], "features", verdicts.ANY) for side in (scores, base))
            check_pairs(self.judge, ours, theirs)
            far, forgets = ((ours - theirs) ** 2).sum(1), group == "forget"
            values = verdicts.without(far, scores[split].refused) if forgets else far
            part = Part(split, values, scores[split].concepts, rate=False, forgotten=far if forgets else None)
            made.append(Measure(name, group, better, (part,)))
        return made


@dataclass(frozen=True)
class Inception:
    """InceptionV3 features [B, 2048], computed as by one of two tools.

    The tools share the weights and differ in preprocessing:

    clean         PIL's bicubic with antialiasing, each channel in floats, to 299, clipped to [0, 255], then
                  (x - 128) / 128 (clean-fid)
    torchmetrics  torch-fidelity's network, which resizes internally as TensorFlow 1 did

    `path`: for clean the TorchScript file inception-2015-12-05.pt. Only its `layers` are called: the whole network
    would resize and normalise again.
    """

    tool: Literal["clean", "torchmetrics"] = "clean"
    path: str | None = None
    version: ClassVar[int] = 2
    licence: ClassVar[str] = "Apache-2.0"

    @property
    def name(self) -> str:
        return f"inception-{self.tool}"

    def weights(self) -> dict[str, str]:
        if self.tool == "clean" and self.path is None:
            raise Missing(f"Inception is not here: give the file of {CLEAN} ({SET}.judge.path=)")
        if self.tool == "torchmetrics" and importlib.util.find_spec("torch_fidelity") is None:
            raise Missing("torchmetrics' Inception needs torch-fidelity: pip install 'erasebench[fid]'")
        if self.path and not Path(self.path).is_file():
            raise ErasebenchError(f"{self.path}: no such file (inception-2015-12-05.pt, {SET}.judge.path=)")
        return {"inception": sha256_once(Path(self.path)) if self.path else self.tool}

    def needs(self) -> list[needs.Need]:
        option = f"{SET}.judge.path="
        if self.tool == "clean":
            return [needs.file(self.path, "Inception of clean-fid", 96, CLEAN, option)]
        own = [] if self.path else [needs.download(FIDELITY, "Inception of torch-fidelity", 96, option)]
        return [needs.package("torch_fidelity", "torch-fidelity", "pip install 'erasebench[fid]'"), *own]

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        network = inception(self.tool, self.path, judging.device())
        if self.tool == "torchmetrics":
            return {"features": judging.in_batches(network, images.permute(0, 3, 1, 2)).float().numpy()}
        pictures = torch.stack([clean(image) for image in images.numpy()])
        return {"features": judging.in_batches(network, (pictures - 128) / 128).flatten(1).float().numpy()}


def clean(image: np.ndarray, side: int = 299) -> Tensor:
    """Resize uint8 [H, W, 3] -> [3, side, side] in [0, 255]. Values are never rounded (Parmar et al., 2022)."""
    channels = [Image.fromarray(image[..., c].astype(np.float32)).resize((side, side), Image.BICUBIC) for c in range(3)]
    # bicubic overshoots at edges
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 255)


@cache
def inception(tool: str, path: str | None, device: str = "cpu"):
    try:
        if tool == "torchmetrics":
            from torchmetrics.image.fid import NoTrainInceptionV3

            return NoTrainInceptionV3("inception-v3-compat", ["2048"], path).to(device)
        return torch.jit.load(path, map_location=device).eval().layers
    except Exception as error:  # network, file and script errors have no common class
        raise ErasebenchError(
            f"Inception could not be loaded ({str(error).splitlines()[0][:150]}): set {SET}.judge.path="
        ) from error


@dataclass(frozen=True)
class Fid:
    """Frechet distance to the real images of a folder.

    fid_<tool>: Frechet distance between images of captions and the real ones in `real`, a folder. Its interval is
    +-1.96 bootstrap standard errors. It is biased by the number of images: never compare across n.
    """

    judge: Inception
    real: str | None = None
    splits: tuple[str, ...] = ("caption",)

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Metric]:
        verdicts.check_varies(self.judge, (scores, base), "features")
        real = self.real_features()
        ours = verdicts.rows(self.judge, scores["caption"], "features", real.shape[1])
        return [distance(f"fid_{self.judge.tool}", ours, real, times=20)]

    def check(self) -> None:
        if self.real is None:
            raise Missing(f"the real images are not here: a folder is needed ({SET}.real=)")
        if not Path(self.real).is_dir():
            raise ErasebenchError(f"{self.real}: no such folder (of real images, {SET}.real=)")

    def needs(self) -> list[needs.Need]:
        return [needs.file(self.real, "real images", 0, "a folder of them, COCO's as a rule", f"{SET}.real=")]

    def real_features(self) -> np.ndarray:
        """Return the features of every image in the folder.

        The store keeps them. Raises ErasebenchError if there are fewer than two images, one is unreadable or one has
        no features.
        """
        files = sorted(f for f in Path(self.real).glob("*") if f.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
        if len(files) < 2:
            raise ErasebenchError(f"{self.real}: a folder of real images is needed ({SET}.real=)")

        def fill(folder: Path) -> None:
            made = []
            for file in files:
                try:
                    pixels = np.asarray(Image.open(file).convert("RGB"))
                except OSError as error:
                    raise ErasebenchError(f"{file}: not a readable image") from error
                found = verdicts.check(self.judge, self.judge.score(torch.from_numpy(pixels)[None], []), 1)["features"]
                if np.isnan(found).any():
                    raise ErasebenchError(f"judge {self.judge.name} gives no features for {file}")
                made.append(found)
            np.savez_compressed(folder / "features.npz", features=np.concatenate(made))

        key = {"judge": self.judge, "weights": self.judge.weights(), "files": [(f.name, sha256_file(f)) for f in files]}
        with np.load(Store().get_or_make("references", key, fill) / "features.npz") as found:
            return found["features"].astype(float)
