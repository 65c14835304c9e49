"""Masks of a concept in images.

Masks are bool [N, h, w], of images uint8 [N, H, W, 3], at any resolution.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..contracts import ErasebenchError
from ..model.model import Model
from ..needs import Need, hub
from .attention import maps
from .closed_form import filled, span

DETECTOR, SEGMENTER = "IDEA-Research/grounding-dino-tiny", "facebook/sam-vit-huge"
FILES = ("config.json", "model.safetensors", "preprocessor_config.json")  # files of both
WORDS = ("tokenizer.json", "tokenizer_config.json")  # tokenizer files of the detector


def whole(model: Model, images: Tensor, template: str, name: str) -> Tensor:
    return torch.ones(images.shape[:3], dtype=torch.bool)


@torch.no_grad()
def attended(model: Model, images: Tensor, template: str, name: str) -> Tensor:
    """Mask the pixels where the model itself attends to the concept.

    This is the attention to the concept's tokens, averaged over layers, heads and three noise levels, and
    thresholded midway between its minimum and maximum.
    """
    z = model.encode_images(images)
    start, stop = span(model, template, name)
    context = model.encode([filled(template, name)]).repeat(len(z))
    noise = model.noise(range(len(z)), images.shape[1])
    total = torch.zeros(len(z), *z.shape[2:], device=z.device)
    for t in (100, 200, 300):
        alpha = model.alphas_cumprod[t].to(z.dtype)
        noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
        for probabilities in maps(model, noisy, torch.tensor(t), context).values():
            seen = probabilities[..., start:stop].mean(1).sum(-1)
            side = round(seen.shape[1] ** 0.5)
            total += F.interpolate(seen.unflatten(1, (1, side, side)).float(), z.shape[2:], mode="bilinear")[:, 0]
    low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
    return total > (low + high) / 2


@torch.no_grad()
def grounded(model: Model, images: Tensor, template: str, name: str, box: float = 0.3, text: float = 0.25) -> Tensor:
    """Mask the concept with Grounding DINO and SAM.

    Grounding DINO finds boxes of the concept, SAM segments them; the mask is the union (MACE, section 4).
    """
    detector, segmenter, prepare_boxes, prepare_masks = grounding(str(model.device))
    found = []
    for image in images.numpy():
        inputs = prepare_boxes(images=image, text=f"{name.lower()}.", return_tensors="pt").to(model.device)
        boxes = prepare_boxes.post_process_grounded_object_detection(
            detector(**inputs), inputs.input_ids, threshold=box, text_threshold=text, target_sizes=[image.shape[:2]]
        )[0]["boxes"]
        if not len(boxes):
            found.append(torch.zeros(image.shape[:2], dtype=torch.bool))
            continue
        inputs = prepare_masks(image, input_boxes=[boxes.tolist()], return_tensors="pt").to(model.device)
        out = segmenter(**inputs, multimask_output=False)
        masks = prepare_masks.image_processor.post_process_masks(
            out.pred_masks.cpu(), inputs["original_sizes"].cpu(), inputs["reshaped_input_sizes"].cpu()
        )[0]
        found.append(masks[:, 0].any(0))
    return torch.stack(found)


@cache
def grounding(device: str):
    """Load (detector, segmenter, and the processors of their inputs).

    Raises ErasebenchError if the weights are missing.
    """
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, SamModel, SamProcessor

    try:
        return (
            AutoModelForZeroShotObjectDetection.from_pretrained(DETECTOR).to(device).eval(),
            SamModel.from_pretrained(SEGMENTER).to(device).eval(),
            AutoProcessor.from_pretrained(DETECTOR),
            SamProcessor.from_pretrained(SEGMENTER),
        )
    except OSError as error:
        raise ErasebenchError(
            f"masks=grounded needs the weights of {DETECTOR} and {SEGMENTER}, which could not be loaded: "
            "download them, or choose method.masks=attention"
        ) from error


def segmenting() -> list[Need]:
    """Return the needs of masks=grounded."""
    return [
        hub(DETECTOR, (*FILES, *WORDS), "Grounding DINO", 690, "method.masks=attention needs none"),
        hub(SEGMENTER, FILES, "SAM", 2560, "method.masks=attention needs none"),
    ]


def drawn(name: str) -> tuple[Tensor, Tensor]:
    """Return the embedded world's own drawings of a concept.

    They are (images uint8 [N, 64, 64, 3], masks bool [N, 64, 64]).
    """
    from ..mini import nets

    try:
        known = [d for d in nets.drawings("concept") if name in d["masks"]]
    except ErasebenchError as error:
        raise ErasebenchError(f"masks=drawn needs the embedded world's drawings: {error}") from error
    if not known:
        raise ErasebenchError(f"masks=drawn: no drawing of {name!r} is shipped; choose method.masks=attention")
    return tuple(
        torch.stack([torch.from_numpy(pick(d)) for d in known])
        for pick in (lambda d: d["pixels"], lambda d: d["masks"][name])
    )


MASKS = {"whole": whole, "attention": attended, "grounded": grounded}
