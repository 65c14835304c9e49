"""Erased models as their authors publish them: state dicts with the keys of diffusers or CompVis, whole or of some layers (ESD,
UCE), diffusers folders (MACE), text encoders (AdvUnlearn), LoRA files of peft, diffusers and kohya (SPM)."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .contracts import ErasebenchError, Missing
from .model import Model
from .store import digest, sha256_file

SAFE, PICKLED = (".safetensors",), (".bin", ".pt", ".pth", ".ckpt")
LORA = (  # diffusers before 0.22, diffusers, and peft or kohya
    r"(?P<module>.+)\.processor\.(?P<projection>to_\w+)_lora\.(?P<half>down|up)\.weight",
    r"(?P<module>.+)\.lora(_linear_layer)?\.(?P<half>down|up)\.weight",
    r"(base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>A|B|down|up)(\.default)?\.weight",
)
COMPVIS = ("model.diffusion_model.", "input_blocks.", "cond_stage_model.")
IGNORED = re.compile(r"position_ids$|^(first_stage_model|model_ema|logvar|alphas|betas|sqrt_|log_one|posterior_)")


def located(path: str) -> Path:
    """A file or folder here, or what a hub id names, fetched. Raises ErasebenchError for neither."""
    if Path(path).exists():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ErasebenchError(f"{path}: no such file or folder, and no hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", *(f"*{end}" for end in SAFE + PICKLED)]))
    except Exception as error:  # hub and network errors have no common class
        raise Missing(
            f"{path}: neither here nor to be had from the hub ({str(error).strip().splitlines()[0][:120]})"
        ) from error


def files_of(path: Path) -> dict[str, list[Path]]:
    """Part ("unet", "text_encoder", or "" where the keys must say) -> its weight files."""
    if path.is_file():
        return {"": [path]}
    parts = {part: weight_files(path / part) for part in ("unet", "text_encoder") if (path / part).is_dir()}
    found = {part: files for part, files in (parts or {"": weight_files(path)}).items() if files}
    if not found:
        raise ErasebenchError(f"{path}: no weights in it (a diffusers folder has unet/*.safetensors)")
    return found


def weight_files(folder: Path) -> list[Path]:
    """Its safetensors, or else its pickles; of several number formats the full one."""
    for kinds in (SAFE, PICKLED):
        files = sorted(f for f in folder.iterdir() if f.suffix in kinds)
        full = [f for f in files if not re.search(r"\.(fp16|bf16|non_ema)\.", f.name)]
        if files:
            return full or files
    return []


def content(path: Path) -> str:
    """Hash of the weights, wherever they lie."""
    return digest([sha256_file(file) for files in files_of(path).values() for file in files])


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by the names in the file, metadata). Nothing in a file is executed. Raises ErasebenchError for what is empty, broken,
    holds code or anything but tensors."""
    if file.stat().st_size == 0:
        raise ErasebenchError(f"{file}: an empty file")
    metadata: dict[str, str] = {}
    try:
        if file.suffix in SAFE:
            with safe_open(file, "pt") as opened:
                tensors, metadata = {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ErasebenchError(f"{file}: not a safetensors file, or a broken one ({error})") from error
    except pickle.UnpicklingError as error:
        if re.search("Unsupported (global|class)", str(error)):
            raise ErasebenchError(
                f"{file}: holds more than tensors; a pickle may run code when it is read, so it is not read: "
                "ask its author for safetensors"
            ) from error
        raise ErasebenchError(f"{file}: not a checkpoint") from error
    except Exception as error:  # zip, format and end-of-file errors have no common class
        raise ErasebenchError(f"{file}: not a checkpoint ({str(error).strip().splitlines()[0][:120]})") from error
    if isinstance(tensors, Mapping) and isinstance(tensors.get("state_dict"), Mapping):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, Mapping) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ErasebenchError(f"{file}: not a state dict (names and their tensors)")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ErasebenchError(f"{file}: {name} is not finite (NaN or infinity)")
    return dict(tensors), metadata


def weights_of(path: Path, model: Model, partial: bool = False, scale: float = 1.0) -> dict[str, Tensor]:
    """An erased model's weights by this model's names ("unet.<name>", "text_encoder.<name>").

    partial  whether layers of a state dict may be absent whose like are there; scale: of what a LoRA file adds
    Raises ErasebenchError for keys that the model does not have, that are absent, or whose shapes are another base's.
    """
    named: dict[str, Tensor] = {}
    for part, files in files_of(path).items():
        tensors, metadata = {}, {}
        for file in files:
            more, said = read(file)
            tensors |= more
            metadata |= said
        if any("lora" in key for key in tensors):
            named |= merged(tensors, metadata, model, scale, path)
            continue
        if any(key.startswith(COMPVIS) for key in tensors):
            tensors = from_compvis(tensors, model, path)
        given = ours(tensors, model, path, part)
        if not partial and (absent := unlike(given, model)):
            raise ErasebenchError(
                f"{path}: {len(absent)} weights are absent whose like are there, e.g. {absent[0]} "
                "(method.partial=true, if that is meant)"
            )
        named |= given
    for name, tensor in named.items():
        if tensor.shape != (wanted := model.weight(name).shape):
            raise ErasebenchError(
                f"{path}: {name} is {tuple(tensor.shape)}, the base's is {tuple(wanted)}: not of the base's architecture"
            )
    return named


def plain(name: str) -> str:
    """Some versions of transformers call a text encoder's module text_model, others do not."""
    return name.replace("text_encoder.text_model.", "text_encoder.")


def ours(tensors: Mapping[str, Tensor], model: Model, path: Path, part: str) -> dict[str, Tensor]:
    """By this model's names. Raises ErasebenchError for keys that are none of them."""
    known = {plain(name): name for name in model.names("")}
    named, unexpected = {}, []
    for key, tensor in tensors.items():
        places = (
            [key]
            if key.startswith(("unet.", "text_encoder."))
            else [f"{p}.{key}" for p in ([part] if part else ("unet", "text_encoder"))]
        )
        name = next((known[plain(place)] for place in places if plain(place) in known), None)
        if name is not None:
            named[name] = tensor
        elif not IGNORED.search(key):
            unexpected.append(key)
    if unexpected:
        raise ErasebenchError(
            f"{path}: {len(unexpected)} of {len(tensors)} keys are not of the base's architecture, e.g. {sorted(unexpected)[0]}"
        )
    return named


def from_compvis(tensors: Mapping[str, Tensor], model: Model, path: Path) -> dict[str, Tensor]:
    """The U-Net, and the text encoder if it is there, by diffusers' names; VAE, EMA and schedule are left out."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    prefix = "" if any(key.startswith(COMPVIS[0]) for key in tensors) else COMPVIS[0]
    text = "cond_stage_model.transformer.text_model."
    if foreign := [k for k in tensors if k.startswith(COMPVIS[2]) and not k.startswith(text)]:
        raise ErasebenchError(
            f"{path}: {foreign[0]}: a text encoder in a layout that is not read; give the U-Net alone"
        )
    unet = {prefix + key: tensor for key, tensor in tensors.items() if not key.startswith(COMPVIS[2])}
    try:
        converted = convert_ldm_unet_checkpoint(unet, dict(model.unet.config)) if unet else {}
    except Exception as error:  # whatever key it missed
        raise ErasebenchError(f"{path}: CompVis keys, but not of the base's architecture ({error})") from error
    named = {f"unet.{key}": tensor for key, tensor in converted.items()}
    return named | {f"text_encoder.{k.removeprefix(text)}": t for k, t in tensors.items() if k.startswith(text)}


def merged(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], model: Model, scale: float, path: Path
) -> dict[str, Tensor]:
    """W + scale * alpha / rank * up down, of a LoRA file. alpha is in the file, or in its metadata, or the rank."""
    modules = {}
    for name in model.names(r"\.weight$"):
        module = plain(name.removesuffix(".weight"))
        old = module.replace("text_encoder.", "text_encoder.text_model.")
        kohya = [
            m.replace("unet.", "lora_unet_", 1).replace("text_encoder.", "lora_te_", 1).replace(".", "_")
            for m in (module, old)
        ]
        modules |= dict.fromkeys([module, module.removeprefix("unet."), old, *kohya], name)
    adapter = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            module, half = key.removesuffix(".alpha"), "alpha"
        elif match := next(filter(None, (re.fullmatch(pattern, key) for pattern in LORA)), None):
            said = match.groupdict()
            projection = {"to_out": "to_out.0"}.get(said.get("projection"), said.get("projection"))
            module = f"{said['module']}.{projection}" if projection else said["module"]
            half = {"A": "down", "B": "up"}.get(said["half"], said["half"])
        else:
            raise ErasebenchError(f"{path}: {key} is no key of a LoRA file")
        if module not in modules:
            raise ErasebenchError(f"{path}: {key}: not of the base's architecture")
        pairs.setdefault(modules[module], {})[half] = tensor
    made = {}
    for name, pair in pairs.items():
        if not {"up", "down"} <= set(pair):
            raise ErasebenchError(f"{path}: {name} has only {', '.join(pair)} of up and down")
        weight, up, down = model.weight(name), pair["up"].float().flatten(1), pair["down"].float().flatten(1)
        rank = down.shape[0]
        if up.shape != (weight.shape[0], rank) or down.shape[1] != weight[0].numel():
            raise ErasebenchError(f"{path}: the LoRA of {name} does not fit: not of the base's architecture")
        alpha = pair.get("alpha", adapter.get(f"{name.partition('.')[0]}.lora_alpha", adapter.get("lora_alpha", rank)))
        made[name] = weight + (scale * float(alpha) / rank * (up @ down)).view_as(weight).to(weight)
    return made


def unlike(named: Mapping[str, Tensor], model: Model) -> list[str]:
    """Weights that are absent though others of their kind (the same place in another block) are there."""
    kind = lambda name: (name.partition(".")[0], re.split(r"\.\d+\.", name)[-1])
    kinds = {kind(name) for name in named}
    return sorted(name for name in model.names("") if name not in named and kind(name) in kinds)
