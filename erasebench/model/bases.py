"""Configuration of a base: interpretation and checks.

It is interpreted as in diffusers; an unusable base is refused with a one-line error.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..contracts import ErasebenchError
from ..needs import cached

DTYPES = ("float32", "float16", "bfloat16", "float64")
INDEX = "model_index.json"
PREDICTIONS = ("epsilon", "v_prediction", "sample")
PIPELINES = {"StableDiffusionPipeline": False, "StableDiffusionXLPipeline": True}  # class -> whether it is SDXL's
KINDS = {  # part of the name of another class -> description; the first match counts
    "Inpaint": "an inpainting model, which does not draw from text alone",
    "ControlNet": "a ControlNet, an addition to a base: give the base that it belongs to",
    "Flux": "a flow transformer: not supported yet",
    "StableDiffusion3": "a flow transformer: not supported yet",
    "SD3": "a flow transformer: not supported yet",
    "FlowMatch": "of a flow transformer: not supported yet",
    "AuraFlow": "a flow transformer: not supported yet",
    "Transformer": "a diffusion transformer: not supported yet",
    "PixArt": "a diffusion transformer: not supported yet",
    "Img2Img": "an image-to-image pipeline, which does not draw from text alone",
    "Pix2Pix": "an image-to-image pipeline, which does not draw from text alone",
    "Depth": "a depth-to-image model, which does not draw from text alone",
    "Variation": "an image variation model, which does not read text",
    "UnCLIP": "a model that draws from image embeddings, not from text alone",
    "Upscale": "an upscaler, which does not draw from text alone",
    "Audio": "a model of sound",
    "Video": "a model of video",
    "T2IAdapter": "an adapter, an addition to a base: give the base that it belongs to",
    "LatentConsistency": "a latent consistency model, to which guidance is an input: not supported",
    "EDM": "of a base in EDM's parametrisation: not supported",
    "UNet2DCondition": "a U-Net alone: give the whole pipeline's folder",
    "AutoencoderKL": "a VAE alone: give the whole pipeline's folder",
    "CLIPTextModel": "a text encoder alone: give the whole pipeline's folder",
    "CLIPModel": "a CLIP alone: give the whole pipeline's folder",
}
CLASSES = {  # part of a base -> classes
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
INPUTS = {  # entry -> input of a U-Net besides latents, timestep and prompt
    "class_embed_type": "a class",
    "num_class_embeds": "a class",
    "encoder_hid_dim": "another encoder's embeddings",
    "encoder_hid_dim_type": "another encoder's embeddings",
    "time_cond_proj_dim": "the guidance scale (a latent consistency model)",
}
WHOLE = {  # entries that are positive integers
    "unet": ("in_channels", "out_channels"),
    "vae": ("latent_channels",),
    "text_encoder": ("hidden_size", "vocab_size", "max_position_embeddings"),
    "text_encoder_2": ("hidden_size", "vocab_size", "max_position_embeddings", "projection_dim"),
}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
VARIANTS = ("fp16", "bf16")  # in order of preference, if weights come in several variants


def kind_of(name: str) -> str:
    """Describe a class in words; an unknown class has an empty description."""
    return next((words for part, words in KINDS.items() if part in name), "")


def named(name: str) -> str:
    return f"{name}, {kind_of(name)}" if kind_of(name) else f"{name}, which is not supported"


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ErasebenchError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ErasebenchError(f"{file} is damaged: it is no JSON ({str(error)[:80]})") from error
    if not isinstance(content, dict):
        raise ErasebenchError(f"{file} is damaged: it holds a {type(content).__name__}, not a configuration")
    return content


def describe(folder: Path) -> str:
    """Describe a folder without a base's parts; empty if it is unknown."""
    index, own = read_json(folder / "model_index.json"), read_json(folder / "config.json")
    for name in (index.get("_class_name"), own.get("_class_name"), *(own.get("architectures") or ())):
        if isinstance(name, str) and name not in PIPELINES:
            return f"it is a {named(name)}"
    if (folder / "adapter_config.json").is_file() or any(folder.glob("*lora*.safetensors")):
        return "it is a LoRA, an addition to a base: give the base, and the LoRA as method=checkpoint method.path="
    if index.get("text_encoder") == [None, None] and index.get("text_encoder_2"):
        return "it has SDXL's second text encoder alone: a refiner, which does not draw from text alone"
    return ""


def single_file(file: Path) -> str:
    """Return advice on converting a base in a single file."""
    pipeline = next(name for name, xl in PIPELINES.items() if xl == has_second_encoder(file))
    return (
        f"{file} is a single file; a diffusers folder is needed: python -c \"from diffusers import "
        f"{pipeline} as P; P.from_single_file('{file}').save_pretrained('{file.with_suffix('')}')\""
    )


def has_second_encoder(file: Path) -> bool:
    """Return whether a single file is SDXL's.

    False for a pickle, which is not opened, since it may run code."""
    if file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, "pt") as tensors:
            return any(name.startswith("conditioner.embedders.1.") for name in tensors.keys())  # noqa: SIM118
    except Exception:  # not safetensors, or damaged: the conversion reports it
        return False


def variant_of(folder: Path, part: str) -> str | None:
    """Return the variant of a part's weights to read; None for plain ones.

    Plain weights come first, then the preferred variants (VARIANTS), then the only one there is. Raises ErasebenchError
    if no weights can be read."""
    stem, place = STEMS.get(part, "model"), folder / part
    names = {f.name for f in place.iterdir()} if place.is_dir() else set()
    if {f"{stem}.safetensors", f"{stem}.safetensors.index.json"} & names:
        return None
    patterns = (rf"{stem}\.(\w+)\.safetensors", rf"{stem}\.safetensors\.index\.(\w+)\.json")
    found = sorted({m[1] for name in names for pattern in patterns if (m := re.fullmatch(pattern, name))})
    if preferred := next((variant for variant in VARIANTS if variant in found), None):
        return preferred
    if len(found) == 1:
        return found[0]
    if found:
        raise ErasebenchError(f"{place} holds the variants {', '.join(found)} and no {stem}.safetensors: rename one to that")
    if any(name.endswith((".bin", ".ckpt", ".pt", ".pth")) for name in names):
        raise ErasebenchError(
            f"{place} holds pickled weights (.bin), which may run code and are not read: where you trust them, "
            f"python -c \"from diffusers import DiffusionPipeline as P; P.from_pretrained('{folder}')"
            ".save_pretrained('converted')\""
        )
    raise ErasebenchError(f"{place} has no weights: {stem}.safetensors is needed")


def is_read(file: Path, part: str, variant: str | None) -> bool:
    """Return whether loading reads a file of a part's folder.

    Without a variant, all files are assumed to be read."""
    if variant is None or not (file.suffix == ".safetensors" or ".safetensors.index." in file.name):
        return True
    return bool(re.search(rf"[.]{re.escape(variant)}[.-]", file.name))


def first_absent(repository: str, revision: str | None) -> str:
    """Name a base's first file missing from the hub cache, if any."""
    here = lambda name: cached(repository, name, revision)
    if (index := here(INDEX)) is None:
        return INDEX
    entries = read_json(index)
    xl = PIPELINES.get(str(entries.get("_class_name")), False)
    parts = [part for part in CLASSES if xl or not part.endswith("_2")]
    for name in ("scheduler/scheduler_config.json", *(f"{p}/config.json" for p in parts if "tokenizer" not in p)):
        if here(name) is None:
            return name
    for part in parts:
        if "tokenizer" in part:
            if here(f"{part}/tokenizer.json") is None and not (here(f"{part}/vocab.json") and here(f"{part}/merges.txt")):
                return f"{part}/vocab.json"
        elif lost := first_weights_absent(here, f"{part}/{STEMS.get(part, 'model')}"):
            return lost
    return ""


def first_weights_absent(here: Callable[[str], Path | None], stem: str) -> str:
    """Name the first missing file of a part's weights, if any.

    The weights may be whole or in shards, plain or in half precision."""
    if here(f"{stem}.safetensors") or here(f"{stem}.fp16.safetensors"):
        return ""
    for index in filter(None, (here(f"{stem}.safetensors.index.json"), here(f"{stem}.safetensors.index.fp16.json"))):
        shards = sorted(set((read_json(index).get("weight_map") or {"": "its shards"}).values()))
        return next((name for name in (f"{stem.partition('/')[0]}/{shard}" for shard in shards) if not here(name)), "")
    return f"{stem}.safetensors"


def check_pointers(folder: Path, part: str) -> None:
    """Raise ErasebenchError if weights are Git LFS pointers.

    Git LFS leaves such small text files in place of weights that were not downloaded."""
    for file in (folder / part).glob("*.safetensors"):
        if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            raise ErasebenchError(f"{file} is a pointer of Git LFS, not the weights: git lfs pull fetches them")


@cache
def defaults(kind: type) -> dict[str, Any]:
    """Return the defaults of diffusers and transformers for a class's configuration."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def check_index(index: Mapping[str, Any]) -> bool:
    """Return whether model_index.json is SDXL's.

    Raises ErasebenchError unless the pipeline draws from text alone."""
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ErasebenchError(f"model_index.json names {named(str(name))}: {' or '.join(PIPELINES)} is needed")
    for part, classes in CLASSES.items():
        if part.endswith("_2") and not PIPELINES[name]:
            if index.get(part, [None])[0]:
                raise ErasebenchError(f"model_index.json names a {part} in a {name}: StableDiffusionXLPipeline has two")
            continue
        entry = index.get(part) or [None, None]
        if entry[-1] is not None and entry[-1] not in classes:
            raise ErasebenchError(f"{part} is a {named(str(entry[-1]))}: {classes[0]} is needed")
        if entry[-1] is None:
            raise ErasebenchError(f"model_index.json names no {part}, which {name} needs")
    return PIPELINES[name]


def check_parts(unet: Mapping, vae: Mapping, text: Mapping, second: Mapping | None) -> None:
    """Raise ErasebenchError if the parts do not fit together or are unsupported.

    The parts are the U-Net, the VAE and the text encoders."""
    latent, taken, given = vae["latent_channels"], unet["in_channels"], unet["out_channels"]
    if taken != latent:
        beside = {1: "a depth-to-image", latent: "an image-to-image", latent + 1: "an inpainting", 3: "an upscaling"}
        kind = beside.get(taken - latent if isinstance(taken, int) else None, "another kind of")
        raise ErasebenchError(
            f"U-Net of {taken} input channels and {latent} latent ones: {kind} model, which does not draw from text alone"
        )
    if given != latent:
        raise ErasebenchError(f"U-Net of {given} output channels and {latent} latent ones: it predicts more than noise")
    for entry, what in INPUTS.items():
        if unet.get(entry) is not None:
            raise ErasebenchError(f"U-Net with {entry} {unet[entry]!r}: it needs {what} beside the prompt")
    if unet["attention_type"] != "default":
        raise ErasebenchError(f"U-Net with attention_type {unet['attention_type']!r} (GLIGEN): it needs boxes beside the prompt")
    added = unet.get("addition_embed_type")
    if added != ("text_time" if second else None):
        wanted = "SDXL's text_time, which its two text encoders" if second else "none, which one text encoder"
        raise ErasebenchError(f"U-Net with addition_embed_type {added!r}: {wanted} can feed, is needed")
    widths = unet["cross_attention_dim"]
    width = text["hidden_size"] + (second["hidden_size"] if second else 0)
    if set(widths if isinstance(widths, list | tuple) else [widths]) != {width}:
        raise ErasebenchError(f"U-Net that reads embeddings of width {widths}, and text encoding of width {width}")
    if not any("CrossAttn" in str(block) for block in (*unet["down_block_types"], *unet["up_block_types"])):
        raise ErasebenchError("U-Net without cross-attention: it does not read text")
    if second:
        wanted = second["projection_dim"] + 6 * (unet["addition_time_embed_dim"] or 0)
        if (found := unet["projection_class_embeddings_input_dim"]) != wanted:
            raise ErasebenchError(
                f"U-Net whose added conditions are of width {found}, and {wanted} of the second text encoder and six sizes"
            )
    for encoder in (text, second):
        if encoder and encoder.get("use_attention_mask"):
            raise ErasebenchError("text encoder with use_attention_mask: prompts would be encoded without their padding")


def check_vae(vae: Mapping[str, Any], xl: bool) -> None:
    """Raise ErasebenchError for a VAE that the pipeline would decode wrongly."""
    if (vae["in_channels"], vae["out_channels"]) != (3, 3):
        raise ErasebenchError(f"VAE of {vae['in_channels']} and {vae['out_channels']} channels: pictures have 3")
    scale = vae["scaling_factor"]
    if not is_number(scale) or scale <= 0:
        raise ErasebenchError(f"VAE with scaling_factor {scale!r}: a number above 0 is needed")
    if vae["shift_factor"]:
        raise ErasebenchError(f"VAE with shift_factor {vae['shift_factor']}: of a flow model; no Stable Diffusion applies it")
    for entry in ("latents_mean", "latents_std"):
        values = vae[entry]
        if values is None:
            continue
        if not xl:
            raise ErasebenchError(f"VAE with {entry}: StableDiffusionPipeline does not apply it")
        if not isinstance(values, list | tuple) or len(values) != vae["latent_channels"] or not all(map(is_number, values)):
            raise ErasebenchError(f"VAE with {entry} {values!r}: a number for each latent channel is needed")
    if (vae["latents_mean"] is None) != (vae["latents_std"] is None):
        raise ErasebenchError("VAE with one of latents_mean and latents_std: diffusers applies both or none")


def check_scheduler(scheduler: Mapping[str, Any]) -> None:
    """Raise ErasebenchError if the base was not trained on DDPM's diffusion process."""
    from diffusers import DDIMScheduler
    from diffusers.schedulers import KarrasDiffusionSchedulers

    name = str(scheduler.get("_class_name", "DDIMScheduler"))
    if name not in KarrasDiffusionSchedulers.__members__ or name.startswith("EDM"):
        raise ErasebenchError(f"scheduler {named(name)}")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ErasebenchError(f"prediction type {prediction!r} is not supported ({', '.join(PREDICTIONS)})")
    if scheduler.get("use_flow_sigmas"):
        raise ErasebenchError("scheduler with use_flow_sigmas: of a flow model, not supported yet")
    if scheduler.get("rescale_betas_zero_snr"):
        raise ErasebenchError("scheduler with rescale_betas_zero_snr: a terminal SNR of zero is not supported")
    steps = scheduler.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or steps < 2:
        raise ErasebenchError(f"scheduler with num_train_timesteps {steps!r}: a whole number above 1 is needed")
    spacing, spacings = scheduler.get("timestep_spacing", "leading"), ("leading", "linspace", "trailing")
    if spacing not in spacings:
        raise ErasebenchError(f"scheduler with timestep_spacing {spacing!r}: {', '.join(spacings)} are known")
    betas = scheduler.get("trained_betas")
    if betas is not None and len(betas) != steps:
        raise ErasebenchError(f"scheduler with {len(betas)} trained_betas for {steps} training timesteps")
    try:
        alphas = DDIMScheduler.from_config(dict(scheduler)).alphas_cumprod
    except Exception as error:  # torch raises various errors for malformed entries
        raise ErasebenchError(f"scheduler that diffusers cannot build ({str(error).strip()[:120]})") from error
    if not (len(alphas) == steps and bool((alphas > 0).all()) and bool((alphas <= 1).all())):
        raise ErasebenchError("scheduler whose share of signal (alphas_cumprod) is not between 0 and 1 at every timestep")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def side_of(unet: Mapping[str, Any], xl: bool) -> int | None:
    """Return the side of the base's own latents, as diffusers' pipeline does.

    None if the configuration names none. Raises ErasebenchError for an invalid or non-square one."""
    side = unet["sample_size"]
    if isinstance(side, list | tuple) and len(side) == 2 and side[0] == side[1]:
        side = side[0]
    if side is None:
        return None
    if isinstance(side, bool) or not isinstance(side, int) or side < 1:
        square = isinstance(side, list | tuple) and len(side) == 2
        raise ErasebenchError(
            f"U-Net with sample_size {side!r}: "
            + ("pictures that are not square are not supported" if square else "a whole number above 0 is needed")
        )
    first = tuple(int(n) for n in re.findall(r"\d+", str(unet.get("_diffusers_version", "1")))[:2])
    # diffusers before 0.9 wrote a wrong value
    return 64 if not xl and first < (0, 9) and side < 64 else side


def check_tokenizer(tokenizer: Any, text: Mapping[str, Any], where: str = "tokenizer") -> None:
    """Raise ErasebenchError if the text encoder cannot read the tokenizer's ids.

    Start, end and padding tokens are required, too."""
    if len(tokenizer) > text["vocab_size"]:
        raise ErasebenchError(f"{where} of {len(tokenizer)} words, and a text encoder of {text['vocab_size']}")
    for entry in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, entry) is None:
            raise ErasebenchError(f"{where} without {entry.removesuffix('_id')}")


@dataclass(frozen=True)
class Base:
    """Configuration of a base, completed by diffusers' defaults."""

    xl: bool
    side: int | None  # of its own latents
    parts: dict[str, dict[str, Any]]  # unet, vae, text_encoder, text_encoder_2 (of SDXL), scheduler
    zeros: bool  # guidance uses all-zero embeddings for the empty prompt


def check(find: Callable[[str], Path]) -> Base:
    """Read and check the configuration of a base. `find` returns the path of each of its files.

    Raises ErasebenchError, with a description of the base, if the harness cannot draw with it as diffusers does."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig

    index = read(find, "model_index.json")
    xl = check_index(index)
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextConfig}
    kinds |= {"text_encoder_2": CLIPTextConfig} if xl else {}
    parts = {}
    for part, kind in kinds.items():
        own = read(find, f"{part}/config.json")
        name = own.get("_class_name", CLASSES[part][0])
        if name not in CLASSES[part]:
            raise ErasebenchError(f"{part} is a {named(str(name))}: {CLASSES[part][0]} is needed")
        if (model := own.get("model_type", "clip")) not in ("clip", "clip_text_model"):
            raise ErasebenchError(f"{part} is a {model}, which is not supported: {CLASSES[part][0]} is needed")
        parts[part] = {**defaults(kind), **own, **(own.get("text_config") or {})}
    for part, entries in WHOLE.items():
        for entry in entries if part in parts else ():
            value = parts[part][entry]
            if type(value) is not int or value < 1:
                raise ErasebenchError(f"{part} with {entry} {value!r}: a whole number above 0 is needed")
    check_parts(parts["unet"], parts["vae"], parts["text_encoder"], parts.get("text_encoder_2"))
    check_vae(parts["vae"], xl)
    parts["scheduler"] = read(find, "scheduler/scheduler_config.json")
    check_scheduler(parts["scheduler"])
    return Base(xl, side_of(parts["unet"], xl), parts, bool(index.get("force_zeros_for_empty_prompt", True)))


def read(find: Callable[[str], Path], name: str) -> dict[str, Any]:
    """Read a required configuration file. Raises ErasebenchError if it is missing or empty."""
    if content := read_json(find(name)):
        return content
    raise ErasebenchError(f"{name} is missing or empty")
