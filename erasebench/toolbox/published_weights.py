"""Erased models in the formats of their authors.

Reads state dicts with the keys of diffusers or CompVis, whole or of some layers (ESD, UCE), diffusers folders
(MACE), text encoders (AdvUnlearn), LoRA files of peft, diffusers and kohya (SPM).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..contracts import ErasebenchError, Missing
from ..model.model import Model
from ..store.local import digest, sha256_file
from .adapters import is_adapter, merged, metadata_counts, settings_files
from .layouts import PARTS, Names, foreign_kind, reason_to_ignore
from .state_dicts import PICKLED, SAFE, Remarks, as_weight, read

VARIANT = re.compile(r"[.-](fp16|bf16|non_ema)(?=[.-])")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.)")
STATE = re.compile(r"(optimizer|scheduler|scaler|sampler|random_states|rng_state|training_args|trainer_state)")
ROOM = 6  # largest file of a training / base in float32: weights, moving average, two moments, and a margin
SPARE = 2**30  # bytes for VAE and other parts


def located(path: str) -> Path:
    """Return a local file or folder, or download a hub id.

    Raises ErasebenchError for neither.
    """
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


def files_of(path: Path, remarks: Remarks | None = None) -> dict[str, list[Path]]:
    """Return part -> its weight files.

    The part is "unet", "text_encoder", or "" if the keys determine it.
    """
    remarks = {} if remarks is None else remarks
    if path.is_file():
        return {"": [path]}
    if not path.is_dir():
        raise ErasebenchError(f"{path}: no file or folder")
    try:
        folders = sorted(f for f in path.iterdir() if f.is_dir() and any(_weights_in(f)))
        parts = {part: weight_files(path / part, remarks) for part in PARTS if (path / part).is_dir()}
        found = {part: files for part, files in (parts or {"": weight_files(path, remarks)}).items() if files}
        loose = weight_files(path, {}) if parts and found else []
    except OSError as error:
        raise ErasebenchError(f"{path}: cannot be read ({error.strerror})") from error
    if not found:
        hint = f"give one of its folders: {', '.join(f.name for f in folders[:5])}" if folders else ""
        raise ErasebenchError(f"{path}: no weights in it ({hint or 'a diffusers folder has unet/*.safetensors'})")
    if loose and not (path / "model_index.json").is_file():
        raise ErasebenchError(f"{path}: {loose[0].name} beside {', '.join(found)}: give one of them")
    remarks.setdefault("other weights of a pipeline's folder", []).extend(f.name for f in loose)
    remarks.setdefault("other folders", []).extend(f.name for f in folders if f.name not in found)
    return found


def _weights_in(folder: Path) -> list[Path]:
    """Return the weight files of a folder, without training states."""
    return sorted(f for f in folder.iterdir() if f.suffix in SAFE + PICKLED and not STATE.match(f.name))


def weight_files(folder: Path, remarks: Remarks | None = None) -> list[Path]:
    """Return the safetensors of a folder, or else its pickles.

    Of several number formats of one model, the full one is taken. Raises ErasebenchError if a shard is missing, or
    pickles are of another model.
    """
    remarks = {} if remarks is None else remarks
    remarks.setdefault("the state of a training", []).extend(f.name for f in folder.iterdir() if STATE.match(f.name))
    files = _weights_in(folder)
    stem = lambda f: SHARD.sub("", VARIANT.sub("", f.name)).removesuffix(f.suffix).removeprefix("pytorch_")
    safe = [f for f in files if f.suffix in SAFE]
    if safe and (other := [f for f in files if f not in safe and stem(f) not in set(map(stem, safe))]):
        raise ErasebenchError(f"{folder}: several models ({safe[0].name}, {other[0].name}): give one file")
    files, left = safe or files, [f for f in files if safe and f not in safe]
    order = ("", "fp16", "bf16", "non_ema")
    variant = lambda f: (VARIANT.search(f.name) or ["", ""])[1]
    best = {s: min((variant(f) for f in files if stem(f) == s), key=order.index) for s in map(stem, files)}
    kept = [f for f in files if variant(f) == best[stem(f)]]
    left += [f for f in files if f not in kept]
    if left:
        remarks.setdefault("another number format of the same weights", []).extend(f.name for f in left)
    _refuse_missing_shards(folder, kept)
    return kept


def _refuse_missing_shards(folder: Path, files: list[Path]) -> None:
    """Raise ErasebenchError if shards are missing.

    They are named in an index, or implied by the numbers in the names.
    """
    names = {f.name for f in files}
    for index in sorted(folder.glob("*.index*.json")):
        try:
            wanted = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ErasebenchError(f"{index}: no index of shards") from error
        if (wanted & names or not names) and (missing := sorted(map(str, wanted - names))):
            raise ErasebenchError(f"{folder}: {index.name} names {missing[0]}, which is not there")
    for name in sorted(names):
        if shard := SHARD.search(name):
            for number in range(1, int(shard[2]) + 1):
                other = SHARD.sub(f"-{number:05d}-of-{shard[2]}", name)
                if other not in names:
                    raise ErasebenchError(f"{folder}: {other} is not there, of {int(shard[2])} shards")


def content(path: Path) -> str:
    """Return a hash of the weights and of an adapter's settings.

    The settings set its strength and lie beside the weights; the path does not matter.
    """
    try:
        files = [file for files in files_of(path).values() for file in files]
        hashes = [sha256_file(file) for file in files]
        hashes += [sha256_file(file) for file in settings_files(path)]
        # earlier versions did not read a strength in the metadata, so a fit of theirs must differ
        return digest(hashes + ["settings"] * any(metadata_counts(_metadata(file)) for file in files))
    except OSError as error:
        raise ErasebenchError(f"{path}: cannot be read ({error.strerror or error})") from error


def _metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, or {} for other files."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except Exception:  # not a safetensors file, or a broken one: `read` reports it
        return {}


def weights_of(
    path: Path, model: Model, partial: bool = False, scale: float = 1.0, remarks: Remarks | None = None
) -> dict[str, Tensor]:
    """Return an erased model's weights by this model's names.

    The names are "unet.<name>" and "text_encoder.<name>"; weights are in this model's number format.

        partial  whether layers of a state dict may be absent although similar ones are present
        scale    of the delta of a LoRA file
        remarks  collects keys that were left out, and other remarks: a reason -> keys

    Raises ErasebenchError for keys that the model does not have, that are absent, or whose shapes are another
    base's.
    """
    remarks = {} if remarks is None else remarks
    limit = SPARE + ROOM * sum(4 * p.numel() for part in PARTS for p in getattr(model, part).parameters())
    named: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    whole: set[str] = set()
    for part, files in files_of(path, remarks).items():
        for group in _models(files):
            tensors, metadata = _read_together(group, limit, remarks)
            if is_adapter(tensors):
                given = merged(tensors, metadata, model, scale, group[0], remarks, part)
            else:
                given = ours(tensors, model, group[0], part, remarks)
                whole |= given.keys()
            if twice := sorted(given.keys() & named.keys()):
                raise ErasebenchError(
                    f"{path}: several state dicts that name the same weights ({source[twice[0]]}, {group[0].name}, "
                    f"e.g. {twice[0]}): give one file"
                )
            source |= dict.fromkeys(given, group[0].name)
            named |= given
    _refuse_changed_second_encoder(path, model)
    if not partial and (absent := unlike({name: named[name] for name in whole}, model)):
        raise ErasebenchError(
            f"{path}: {len(absent)} weights are absent whose like are there, e.g. {absent[0]} "
            "(method.partial=true, if that is meant)"
        )
    return named


def _models(files: list[Path]) -> list[list[Path]]:
    """Group the shards of one model; other files stay alone."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(SHARD.sub("", file.name), []).append(file)
    return list(groups.values())


def _read_together(files: list[Path], limit: int, remarks: Remarks) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = {}, {}
    for file in files:
        more, described = read(file, limit, remarks)
        if twice := sorted(more.keys() & tensors.keys()):
            raise ErasebenchError(f"{file}: {twice[0]} stands in another shard too")
        tensors |= more
        metadata |= described
    return tensors, metadata


def _refuse_changed_second_encoder(path: Path, model: Model) -> None:
    """Raise ErasebenchError for a changed second text encoder.

    It is in a folder of SDXL; the base's second text encoder is the one used.
    """
    folder = path / "text_encoder_2"
    second = model.text_encoder_2
    if second is None or not folder.is_dir() or not (files := weight_files(folder)):
        return
    own = dict(second.named_parameters())
    for file in files:
        for key, tensor in read(file)[0].items():
            if key in own and not torch.equal(tensor.to(own[key].dtype), own[key].data.cpu()):
                raise ErasebenchError(f"{file}: {key} is not the base's: a changed second text encoder is not read")


def ours(
    tensors: Mapping[str, Tensor], model: Model, path: Path, part: str, remarks: Remarks | None = None
) -> dict[str, Tensor]:
    """Rename tensors to this model's names, in its number format.

    Raises ErasebenchError for unknown keys.
    """
    remarks = {} if remarks is None else remarks
    names, named, unexpected, left = Names.of(model), {}, [], {}
    for key, tensor in tensors.items():
        name = names.find(key.replace(".processor.", ".").replace("_custom_diffusion.", "."), part)
        if name is None:
            if reason := reason_to_ignore(key):
                left.setdefault(reason, []).append(key)
            else:
                unexpected.append(key)
        elif name in named and not torch.equal(named[name], tensor):
            raise ErasebenchError(f"{path}: two keys for {name}, e.g. {key}: save the one that is meant alone")
        elif tensor.shape != (wanted := names.weights[name].shape):
            raise ErasebenchError(
                f"{path}: {name} is {tuple(tensor.shape)}, the base's is {tuple(wanted)}: not of the base's architecture"
            )
        else:
            named[name] = tensor
    if unexpected or not named:
        raise ErasebenchError(f"{path}: {_unread(tensors, unexpected, left)}")
    for reason, keys in left.items():
        remarks.setdefault(reason, []).extend(keys)
    return {name: as_weight(name, tensor, names.weights[name], path, remarks) for name, tensor in named.items()}


def _unread(tensors: Mapping[str, Tensor], unexpected: list[str], left: Mapping[str, list[str]]) -> str:
    """Return the reason why a state dict is not read."""
    kind = foreign_kind(unexpected or tensors)
    if kind:
        return f"{kind} (e.g. {sorted(unexpected or tensors)[0]}): not of the base's architecture"
    if not unexpected:
        return f"holds nothing of U-Net or text encoder, only {', '.join(left)}"
    return f"{len(unexpected)} of {len(tensors)} keys are not of the base's architecture, e.g. {sorted(unexpected)[0]}"


def unlike(named: Mapping[str, Tensor], model: Model) -> list[str]:
    """Return absent weights although others of their kind are present.

    A kind is the same place in another block.
    """

    def kind(name: str) -> str:
        """Return the name without the numbers of blocks.

        Numbers within a block, as in to_out.0, stay.
        """
        name = re.sub(r"\b(attentions|resnets|transformer_blocks|layers|downsamplers|upsamplers)\.\d+\.", r"\1.", name)
        return re.sub(r"\b((down|up)_blocks\.\d+|mid_block)\.", "", name)

    kinds = {kind(name) for name in named}
    return sorted(name for name in model.names("") if name not in named and kind(name) in kinds)
