"""LoRA files of peft, diffusers and kohya, merged into the base's weights.

The merge is that of peft, with the strength read from any of its possible places. Adapters of other families, and
settings that would change the weights but are not read, are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..contracts import ErasebenchError
from ..model.model import Model
from .layouts import PARTS, PREFIXES, Names, foreign_kind, plain, reason_to_ignore
from .state_dicts import Remarks, as_weight

CONFIG, METADATA = "adapter_config.json", "lora_adapter_metadata"
LIKE = re.compile(r"lora|hada_|lokr_|dora_scale|ia3_|\bon_input$|oft_|boft_|vera_|glora|hra_u|ln_tuning|\.diff(_b)?$")
KEYS = tuple(
    re.compile(pattern)
    for pattern in (  # diffusers before 0.22, diffusers, and peft or kohya
        r"(?P<module>.+?)\.(?P<projection>to_\w+)_lora\.(?P<half>down|up)\.weight",
        r"(?P<module>.+?)\.(?P<projection>to_\w+)_lora\.(?P<half>alpha)",
        r"(?P<module>.+?)\.lora(_linear_layer)?\.(?P<half>down|up)\.weight",
        r"(?P<module>.+?)\.lora_(?P<half>A|B|down|up|mid)(\.(?P<adapter>\w+))?\.weight",
        r"(?P<module>.+?)\.lora_(?P<half>embedding_A|embedding_B)(\.(?P<adapter>\w+))?",
        r"(?P<module>.+?)\.lora_B(\.(?P<adapter>\w+))?\.(?P<half>bias)",
        r"(?P<module>.+?)\.lora_(?P<half>magnitude)_vector(\.(?P<adapter>\w+))?",
        r"(?P<module>.+?)(\.lora)?\.(?P<half>alpha)",
    )
)
HALVES = {"A": "down", "B": "up", "embedding_A": "down", "embedding_B": "up"}
FAMILIES = (  # of LyCORIS and peft; their weights are not a product of two matrices
    (r"hada_", "LoHa"),
    (r"lokr_", "LoKr"),
    (r"dora_scale", "DoRA as LyCORIS writes it (dora_scale)"),
    (r"ia3_|on_input$", "(IA)^3"),
    (r"oft_", "OFT"),
    (r"vera_", "VeRA"),
    (r"glora|\.[ab][12]\.weight$", "GLoRA"),
    (r"hra_u", "HRA"),
    (r"\.diff(_b)?$", "full differences (.diff)"),
    (r"lora_E$|lora_ranknum$", "AdaLoRA"),
)
STRENGTH = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
OTHERWISE_READ = {"peft_type", "use_dora", "lora_bias", "bias", "modules_to_save", "init_lora_weights"}  # recognised by keys
HARMLESS = {  # placement, training, and fan_in_fan_out, which peft drops for the layers of these models
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "task_type"),
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "peft_version"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying", "velora_config"),
}
KEEP_BASE = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
)  # initial values of a LoRA that leave the base's weights unchanged


def is_adapter(keys: Iterable[str]) -> bool:
    return any(LIKE.search(key) for key in keys)


def settings_files(path: Path) -> list[Path]:
    """Return the files beside the weights that set an adapter's strength."""
    folder = path if path.is_dir() else path.parent
    return [f for f in (folder / CONFIG, *(folder / part / CONFIG for part in PARTS if path.is_dir())) if f.is_file()]


@dataclass(frozen=True)
class Settings:
    """Strength settings of an adapter's configuration.

    `where` names their place, "" for none.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    def check(self, path: Path) -> None:
        """Raise ErasebenchError for invalid or unread settings.

        A setting is refused if it is not read and may affect the weights, or if its value is invalid.
        """
        say = lambda key: f"{path}: {self.where} says {key} = {json.dumps(self.values[key])[:80]}"
        if (kind := self.values.get("peft_type") or "LORA") != "LORA":
            raise ErasebenchError(f"{path}: an adapter of the kind {kind}, which is not read (LoRA is)")
        if self.values.get("init_lora_weights") not in KEEP_BASE:
            raise ErasebenchError(f"{say('init_lora_weights')}: it changes the base's weights too, which is not read")
        for key, value in self.values.items():
            if key not in STRENGTH | OTHERWISE_READ | HARMLESS and value:
                raise ErasebenchError(f"{say(key)}, which is not read")
        number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
        for key in STRENGTH & self.values.keys():
            value = self.values[key]
            right = value is None
            if key.endswith("_pattern"):
                right |= isinstance(value, dict) and all(number(v) for v in value.values())
            else:
                right |= isinstance(value, bool) if key == "use_rslora" else number(value)
            if not right:
                raise ErasebenchError(f"{say(key)}, which is no such value")

    def of(self, key: str, modules: Iterable[str], default: float) -> float:
        """Return r or lora_alpha of a module, by any of its names.

        The value comes from its pattern or, without one, from the setting of all modules.
        """
        patterns = self.values.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]) or {}
        try:
            for pattern, value in patterns.items():  # peft's own search
                if any(re.match(rf"(.*\.)?({pattern})$", module) for module in modules):
                    return value
        except re.error as error:
            raise ErasebenchError(f"{self.where}: a pattern of {key} is no regular expression ({error})") from error
        value = self.values.get(key)
        return default if value is None else value


def settings_of(file: Path, metadata: Mapping[str, str]) -> dict[str, Settings]:
    """Return part (or "" for any) -> its settings.

    They are those of adapter_config.json beside the file, or of the file's metadata.
    """

    def parsed(text: str | bytes, where: str) -> dict[str, Any]:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ErasebenchError(f"{file}: {where} is no JSON") from error
        if not isinstance(values, dict):
            raise ErasebenchError(f"{file}: {where} is no JSON object")
        return values

    found: dict[str, Settings] = {}
    if METADATA in metadata:
        parts: dict[str, dict[str, Any]] = {}
        for key, value in parsed(metadata[METADATA], METADATA).items():
            part = key.partition(".")[0] if key.startswith(tuple(f"{part}." for part in PARTS)) else ""
            if not part and "." in key:
                raise ErasebenchError(f"{file}: {METADATA} says {key}, of a part that is not read")
            parts.setdefault(part, {})[key.removeprefix(f"{part}.")] = value
        found = {part: Settings(values, METADATA) for part, values in parts.items()}
    if (config := file.parent / CONFIG).is_file():
        if found:
            raise ErasebenchError(f"{file}: its strength is written twice, in its metadata and in {CONFIG}")
        found = {"": Settings(parsed(config.read_bytes(), CONFIG), CONFIG)}
    for settings in found.values():
        settings.check(file)
    return found


def metadata_counts(metadata: Mapping[str, str]) -> bool:
    """Return whether metadata set more of an adapter's strength than lora_alpha."""
    try:
        values = json.loads(metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError):
        return False
    more = ("use_rslora", "alpha_pattern", "rank_pattern", "use_dora")
    return isinstance(values, dict) and any(value and key.endswith(more) for key, value in values.items())


@dataclass
class Layer:
    """Tensors that a file adds to one weight.

    `module`: its name in the file, without prefixes; the patterns of settings refer to it.
    """

    module: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    embedding: bool = False


def parse(
    tensors: Mapping[str, Tensor], names: Names, file: Path, remarks: Remarks, part: str
) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """Parse a file -> (layers, whole weights beside them).

    Both are keyed by the model's names of their weights.
    """
    layers, whole, adapters = {}, {}, set()
    for key, tensor in tensors.items():
        for pattern, family in FAMILIES:
            if re.search(pattern, key):
                raise ErasebenchError(f"{file}: {key}: an adapter of the kind {family}, which is not read (LoRA is)")
        match = next(filter(None, (pattern.fullmatch(key.replace(".processor.", ".")) for pattern in KEYS)), None)
        if match is None:
            name = names.find(key, part)
            if name is None and (reason := reason_to_ignore(key)):
                remarks.setdefault(reason, []).append(key)
            elif name is None or name in whole:
                raise ErasebenchError(
                    f"{file}: " + (f"{key} is no key of a LoRA file" if name is None else f"{name} twice")
                )
            else:
                whole[name] = as_weight(key, tensor, names.weights[name], file, remarks)
            continue
        fields = match.groupdict()
        adapters.add(fields.get("adapter") or "default")
        module = module_of(fields["module"], fields.get("projection"))
        name = names.kohya.get(module) or names.find(f"{module}.weight", part)
        if name is None:
            kind = foreign_kind([key])
            raise ErasebenchError(f"{file}: {key}: not of the base's architecture" + (f" ({kind})" if kind else ""))
        layer = layers.setdefault(name, Layer(module))
        half = HALVES.get(fields["half"], fields["half"])
        if half in layer.tensors:
            raise ErasebenchError(f"{file}: two adapters of {name} in one file (a second {half} in {key})")
        layer.tensors[half] = tensor
        layer.embedding |= fields["half"].startswith("embedding_")
    if len(adapters) > 1:
        raise ErasebenchError(f"{file}: several adapters in one file ({', '.join(sorted(adapters))})")
    if both := sorted(layers.keys() & whole.keys()):
        raise ErasebenchError(f"{file}: {both[0]} both whole and as an adapter: merge them first (merge_and_unload)")
    return layers, whole


def module_of(module: str, projection: str | None) -> str:
    """Return a module's name with its projection.

    Old files of diffusers write the projection into the name of the half.
    """
    if projection is None:
        return module
    if ".self_attn" in module:  # in a text encoder
        return f"{module}.{projection.removeprefix('to_')}_proj"
    return f"{module}.{ {'to_out': 'to_out.0'}.get(projection, projection) }"


def merged(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    model: Model,
    scale: float,
    file: Path,
    remarks: Remarks | None = None,
    part: str = "",
) -> dict[str, Tensor]:
    """Merge the layers of an adapter into the base's weights.

    Returns W + scale * strength * up down, by the model's names. strength is alpha / rank (or alpha / sqrt rank, if
    the settings say so); alpha is in the file, in its metadata, in adapter_config.json, or the rank.
    """
    remarks = {} if remarks is None else remarks
    names = Names.of(model)
    layers, made = parse(tensors, names, file, remarks, part)
    settings = settings_of(file, metadata) if layers else {}
    dims = {metadata.get("ss_network_alpha"), metadata.get("ss_network_dim")} - {None, "None"}
    silent = [name for name, layer in layers.items() if "alpha" not in layer.tensors]
    if silent and not settings and len(dims) == 2:
        raise ErasebenchError(
            f"{file}: its metadata has an alpha (ss_network_alpha), but {silent[0]} has no .alpha beside it"
        )
    if silent and not settings and any("base_model." in key for key in tensors):
        raise ErasebenchError(f"{file}: an adapter of peft without {CONFIG}, which says how strong it is")
    for name, layer in layers.items():
        own = settings.get(name.partition(".")[0], settings.get("", Settings()))
        if settings and not own.where:
            raise ErasebenchError(
                f"{file}: {METADATA} says nothing of {name.partition('.')[0]}, which it has layers of"
            )
        factor = scale * strength(name, layer, own, file, remarks)
        made[name] = with_layer(name, layer, factor, own, names.weights[name].cpu(), file)
        if (bias := layer.tensors.get("bias")) is not None:
            place = f"{name.removesuffix('.weight')}.bias"
            if place not in names.weights or bias.shape != names.weights[place].shape:
                raise ErasebenchError(f"{file}: {name} has no such bias in the base: not of the base's architecture")
            own_bias = names.weights[place].cpu()
            made[place] = own_bias + (factor * bias.float()).to(own_bias.dtype)
    return made


def strength(name: str, layer: Layer, settings: Settings, file: Path, remarks: Remarks) -> float:
    """Return alpha / rank, or alpha / sqrt rank.

    Raises ErasebenchError for contradictory values.
    """
    halves = {half: tensor for half, tensor in layer.tensors.items() if half in ("up", "down", "mid")}
    if not {"up", "down"} <= set(halves):
        raise ErasebenchError(f"{file}: {name} has only {', '.join(layer.tensors)} of up and down")
    if any(t.ndim < 2 or not t.numel() for t in halves.values()):
        raise ErasebenchError(f"{file}: the LoRA of {name} is empty or no matrix")
    rank = halves["down"].shape[0]
    spelt = layer.module
    while prefix := next((p for p in PREFIXES if p != "text_model." and spelt.startswith(p)), None):
        spelt = spelt.removeprefix(prefix)
    modules = (spelt, plain(name.removesuffix(".weight")).partition(".")[2])
    if (expected := settings.of("r", modules, rank)) != rank:
        raise ErasebenchError(f"{file}: {settings.where} says rank {expected} of {name}, its tensors have {rank}")
    alpha = layer.tensors.get("alpha")
    if alpha is not None and (alpha.numel() != 1 or not math.isfinite(float(alpha)) or float(alpha) == 0):
        raise ErasebenchError(f"{file}: alpha of {name} is not one number other than 0")  # kohya reads 0 as the rank
    if settings.where:
        value = settings.of("lora_alpha", modules, 8)  # peft's own default
        if alpha is not None and float(alpha) != value:
            raise ErasebenchError(f"{file}: alpha of {name} is {float(alpha):g}, {settings.where} says {value:g}")
        return value / (math.sqrt(rank) if settings.values.get("use_rslora") else rank)
    if alpha is None:
        remarks.setdefault("no strength written, so alpha = rank", []).append(name)
        return 1.0
    return float(alpha) / rank


def with_layer(name: str, layer: Layer, factor: float, settings: Settings, weight: Tensor, file: Path) -> Tensor:
    """Return the base's weight with one adapter layer merged into it."""
    up, down, mid = (
        as_weight(f"{half} of {name}", layer.tensors[half], torch.empty(0), file, {}) if half in layer.tensors else None
        for half in ("up", "down", "mid")
    )
    if layer.embedding and "magnitude" in layer.tensors:
        raise ErasebenchError(f"{file}: DoRA of an embedding, which is not read")
    rank = down.shape[0]
    if mid is not None:  # a convolution split into three: 1 x 1, its own size between ranks, 1 x 1
        fits = mid.ndim == 4 and mid.shape[:2] == (up.flatten(1).shape[1], rank)
        down = (
            torch.einsum("o i h w, i n -> o n h w", mid, down.flatten(1))
            if fits and down[0].numel() == down.shape[1]
            else down
        )
        rank = up.flatten(1).shape[1]
    up, down = up.flatten(1), down.flatten(1)
    delta = (up @ down if not layer.embedding else (up @ down).T) if up.shape[1] == down.shape[0] == rank else None
    if delta is None or delta.shape != weight.flatten(1).shape:
        raise ErasebenchError(f"{file}: the LoRA of {name} does not fit: not of the base's architecture")
    magnitude = layer.tensors.get("magnitude")
    if bool(settings.values.get("use_dora")) != (magnitude is not None) and (settings.where or magnitude is None):
        raise ErasebenchError(f"{file}: {settings.where}: use_dora and the magnitudes in the file do not go together")
    if magnitude is None:
        return weight + (factor * delta).view_as(weight).to(weight.dtype)
    if magnitude.numel() != len(weight) or not magnitude.is_floating_point():
        raise ErasebenchError(f"{file}: the magnitudes of {name} do not fit: not of the base's architecture")
    whole = weight.float().flatten(1) + factor * delta
    whole = whole * (magnitude.float().flatten()[:, None] / whole.norm(dim=1, keepdim=True))
    return whole.view_as(weight).to(weight.dtype)
