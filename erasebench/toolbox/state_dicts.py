"""Reader of one weight file -> its tensors by name.

Nothing in a file is executed, nothing of an impossible size is unpacked, and a file of another kind is refused with
its kind.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..contracts import ErasebenchError
from .layouts import foreign_kind

SAFE, PICKLED = (".safetensors",), (".bin", ".pt", ".pth", ".ckpt")
Remarks = dict[str, list[str]]  # reason -> the keys that it holds for
HEADS = (  # beginnings of files that are named like a checkpoint but are none
    (rb"version https://git-lfs", "a git-lfs pointer, not the weights: git lfs pull"),
    (rb"(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml)", "a web page, not the weights: download the file itself"),
    (rb"GGUF", "a GGUF file: quantised weights, dequantise them first"),
    (rb"\x89HDF", "a HDF5 file (Keras), which is not read"),
    (rb"\x93NUMPY", "a numpy array, not a state dict (names and their tensors)"),
    (rb"\x1f\x8b|BZh\d|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "a compressed archive: unpack it first"),
    (rb"\x08[\x01-\x1f]\x12[\x01-\x7f](pytorch|onnx|skl2onnx|tf2onnx)", "an ONNX graph, not a state dict"),
)
ENDS = {".onnx": "an ONNX graph, not a state dict", ".msgpack": "weights of Flax, which are not read"}
ENDS |= {".json": "no weights; give the weight file or its folder", ".npz": "numpy arrays, not a state dict"}
WRAPPED = re.compile(r"(unet|text_encoder|(down|up|input|output)_blocks|mid(dle)?_block|encoder|embeddings)$|.*\.")
TRAINING = re.compile(r"optim|(lr_)?sched|scaler|callbacks|loops|rng|random|args|config|hparams|hyper_param|amp$", re.I)
PACKED = 2  # limit of the unpacked size, in sizes on the disk; torch compresses nothing
DEPTH = 8


def read(
    file: Path, limit: int | None = None, remarks: Remarks | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file -> (tensors by the names in the file, metadata).

    Raises ErasebenchError for a file that is empty, broken, larger than `limit` bytes, or holds code or anything but
    tensors; `remarks` collects the other entries beside them.
    """
    metadata: dict[str, str] = {}
    try:
        safe = _recognise(file, limit)
        if safe:
            _refuse_duplicates(file)
            with safe_open(file, "pt") as opened:
                tensors, metadata = {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
        else:
            _refuse_bombs(file, limit)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of layouts that are refused below
                tensors = torch.load(file, map_location="cpu", weights_only=True)
    except ErasebenchError:
        raise
    except SafetensorError as error:
        raise ErasebenchError(f"{file}: not a safetensors file, or a broken one ({_line(error)})") from error
    except pickle.UnpicklingError as error:
        raise ErasebenchError(f"{file}: {_refusal(error)}") from error
    except Exception as error:  # zip, format, system and end-of-file errors have no common class
        raise ErasebenchError(f"{file}: not a checkpoint ({_line(error)})") from error
    tensors = _state_dict(tensors, file, {} if remarks is None else remarks)
    for name, tensor in tensors.items():
        _refuse_odd(name, tensor, file)
    if limit is not None and sum(t.numel() * t.element_size() for t in tensors.values()) > limit:
        raise ErasebenchError(f"{file}: its tensors are larger than any checkpoint of the base can be")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.element_size() > 1 and not torch.isfinite(tensor).all():
            raise ErasebenchError(f"{file}: {name} is not finite (NaN or infinity)")
    return {name: tensor.detach() for name, tensor in tensors.items()}, metadata


def _line(error: Exception) -> str:
    """Return the first line of another library's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def _recognise(file: Path, limit: int | None) -> bool:
    """Return whether a file is a safetensors file; otherwise it may be a pickle.

    Raises ErasebenchError for other kinds.
    """
    size = file.stat().st_size
    if size == 0:
        raise ErasebenchError(f"{file}: an empty file")
    with file.open("rb") as stream:
        head = stream.read(512)
    for pattern, kind in HEADS:
        if re.match(pattern, head, re.I):
            raise ErasebenchError(f"{file}: {kind}")
    if file.suffix in ENDS:
        raise ErasebenchError(f"{file}: {ENDS[file.suffix]}")
    if limit is not None and size > limit:
        raise ErasebenchError(f"{file}: {size:,} bytes, more than any checkpoint of the base has (at most {limit:,})")
    headed = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size  # whatever its suffix
    return headed or (file.suffix in SAFE and not head.startswith(b"PK"))


def _refuse_duplicates(file: Path) -> None:
    """Raise ErasebenchError if a safetensors header names a tensor twice.

    Readers differ in the one that they take.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(names) != len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise ErasebenchError(f"{file}: {twice} stands twice in it")
        return dict(pairs)

    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = stream.read(size) if size <= file.stat().st_size else b""
    try:
        json.loads(header, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ErasebenchError(f"{file}: not a safetensors file, or a broken one (its header is no JSON)") from error


def _refuse_bombs(file: Path, limit: int | None) -> None:
    """Raise ErasebenchError for a zip archive that is unsafe to unpack.

    It is not a checkpoint, or declares more data than a checkpoint can hold.
    """
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        raise ErasebenchError(f"{file}: a TorchScript archive, a program: save its state_dict()")
    if any(name.endswith(".npy") for name in names):
        raise ErasebenchError(f"{file}: {ENDS['.npz']}")
    if not any(name.endswith("data.pkl") for name in names):
        raise ErasebenchError(f"{file}: not a checkpoint (a zip archive without one in it)")
    declared, size = sum(entry.file_size for entry in entries), file.stat().st_size
    if declared > PACKED * size + 2**20 or (limit is not None and declared > limit):
        raise ErasebenchError(
            f"{file}: {size:,} bytes that unpack to {declared:,}: no checkpoint of the base, not read"
        )


def _refusal(error: pickle.UnpicklingError) -> str:
    """Return the reason why a pickle is not read."""
    if not re.search(r"Unsupported (global|class)", str(error)):
        return "not a checkpoint"
    found = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
    name = found[1] if found else "an object"
    if name.startswith("numpy"):
        return "holds numpy arrays, not tensors: save its tensors as safetensors"
    if name.startswith("torch._utils._rebuild_"):
        return f"holds a {name.removeprefix('torch._utils._rebuild_').replace('_', ' ')}, which is not read: save plain tensors"
    return (
        f"holds more than tensors ({name}); a pickle may run code when it is read, so it is not read: "
        "ask its author for safetensors"
    )


def _holds_tensors(value: Any, depth: int = DEPTH) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, Mapping) and depth > 0 and any(_holds_tensors(v, depth - 1) for v in value.values())


def _state_dict(held: Any, file: Path, remarks: Remarks, depth: int = DEPTH) -> dict[str, Any]:
    """Return the state dict in the content of a file.

    It stands alone, under one name beside others, or as one dict per module or part.
    """
    if not isinstance(held, Mapping) or depth == 0:
        raise ErasebenchError(f"{file}: not a state dict (names and their tensors) but a {type(held).__name__}")
    if not held:
        raise ErasebenchError(f"{file}: not a state dict (names and their tensors): it is empty")
    if not all(isinstance(key, str) for key in held):
        raise ErasebenchError(f"{file}: not a state dict (names and their tensors): a key is {_top(held)}")
    if {"param_groups", "state"} <= set(held) or {"string_to_param", "string_to_token"} & set(held):
        raise ErasebenchError(f"{file}: {foreign_kind(held)}")
    tensors = {key: value for key, value in held.items() if isinstance(value, Tensor)}
    dicts = {k: v for k, v in held.items() if isinstance(v, Mapping) and _holds_tensors(v) and not TRAINING.match(k)}
    beside = [key for key in held if key not in tensors and key not in dicts]
    if tensors and not dicts:
        found = tensors
    elif dicts and not tensors and all(_of_a_module(key, value) for key, value in dicts.items()):
        found = {}
        for key, value in dicts.items():
            inner = {f"{key}.{k}": t for k, t in _state_dict(value, file, remarks, depth - 1).items()}
            if twice := inner.keys() & found.keys():
                raise ErasebenchError(f"{file}: {min(twice)} stands twice in it")
            found |= inner
    elif len(dicts) == 1 and not tensors:
        key, value = next(iter(dicts.items()))
        found = _state_dict(value, file, remarks, depth - 1)
    elif dicts and not tensors:
        names = ", ".join(dicts)
        raise ErasebenchError(
            f"{file}: holds several state dicts ({names}): save the one that is meant in a file of its own"
        )
    else:
        raise ErasebenchError(
            f"{file}: not a state dict (names and their tensors); at its top are {_top(held)}: "
            "save the dict of tensors in it, alone, in a file of its own"
        )
    if beside:
        remarks.setdefault("beside the weights", []).extend(beside)
    return found


def _of_a_module(key: str, value: Mapping) -> bool:
    """Return whether an inner dict belongs to one module or part.

    Its key is then the prefix of the names in it.
    """
    return bool(WRAPPED.match(key)) or set(value) <= {"weight", "bias"}


def _top(held: Mapping) -> str:
    """Return a dict's first keys and the types of their values."""
    first = [f"{key!r} ({type(value).__name__})" for key, value in list(held.items())[:6]]
    return ", ".join(first)[:300] + (f" and {len(held) - 6} more" if len(held) > 6 else "")


def _refuse_odd(name: str, tensor: Tensor, file: Path) -> None:
    """Raise ErasebenchError for anything but a plain array of numbers."""
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        odd = f"a {type(tensor).__name__}, a tensor of a class of its own"
    elif tensor.is_nested:
        odd = "a nested tensor"
    elif tensor.layout != torch.strided:
        odd = f"a sparse tensor ({str(tensor.layout).removeprefix('torch.')})"
    elif tensor.device.type == "meta":
        odd = "a tensor on the meta device, which has no values"
    elif tensor.is_quantized:
        odd = f"{str(tensor.dtype).removeprefix('torch.')}: quantised weights, dequantise them first"
    else:
        return
    raise ErasebenchError(f"{file}: {name} is {odd}")


def as_weight(name: str, tensor: Tensor, like: Tensor, file: Path, remarks: Remarks) -> Tensor:
    """Convert a tensor to the number format of the base's weight.

    Raises ErasebenchError for numbers that are not weights, or are beyond its range.
    """
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        quantised = "int" in kind or "float8" in kind or "float4" in kind
        reason = "quantised weights, dequantise them first" if quantised else "no number format of weights"
        raise ErasebenchError(f"{file}: {name} is {kind}: {reason}")
    cast = tensor.to("cpu", like.dtype)
    if not torch.isfinite(cast).all():
        base = str(like.dtype).removeprefix("torch.")
        raise ErasebenchError(f"{file}: {name} holds values beyond the range of the base's {base}")
    if tensor.dtype == torch.float64 and not torch.equal(cast.double(), tensor):
        remarks.setdefault(f"rounded from float64 to the base's {str(like.dtype).removeprefix('torch.')}", []).append(
            name
        )
    return cast
