"""Source of a base model, and strict loading of its components."""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..contracts import ErasebenchError
from ..store.local import digest, sha256_file
from . import bases

log = logging.getLogger("erasebench")

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SECOND = ("text_encoder_2", "tokenizer_2")  # of SDXL
WEIGHTS = {  # part -> library and class; neither library is imported before a model is loaded
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}


@cache
def quiet(library: str) -> Any:
    """Import diffusers or transformers, without its progress bars and remarks."""
    module = importlib.import_module(library)
    module.logging.set_verbosity_error()
    importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
    return module


@dataclass(frozen=True)
class Source:
    """Source of a base model: a local diffusers folder, or a hub id.

    A hub id has a pinned revision."""

    name: str
    path: Path | None = None
    hub: str = ""
    revision: str = ""
    dtype: str = "float32"

    def identity(self) -> dict[str, str]:
        """Return the identity of the base, for keys.

        It is the content of a local folder (not its path), or hub id and revision; and the number format."""
        if self.path is None:
            return {"hub": self.hub, "revision": self.revision, "dtype": self.dtype}
        try:
            stamps = tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in self.files())
            return {"content": _content(Path(self.path), stamps), "dtype": self.dtype}
        except OSError as error:
            raise ErasebenchError(f"cannot read {error.filename}: {error.strerror}") from error

    def files(self) -> list[Path]:
        """Return the files of a local folder that loading reads.

        They define the content of the folder. Raises ErasebenchError if it is not a pipeline."""
        folder = Path(self.path)
        if folder.is_file():
            raise ErasebenchError(bases.single_file(folder))
        if not folder.is_dir():
            raise ErasebenchError(f"model folder {folder} does not exist: give a diffusers folder with model.path=")
        missing = [part for part in PARTS if not (folder / part).is_dir()]
        if missing:
            what = bases.describe(folder) or f"it has no {', '.join(missing)} folder"
            raise ErasebenchError(f"{folder} is not a Stable Diffusion pipeline: {what}")
        kinds = (".json", ".safetensors", ".txt", ".model")
        second = [part for part in SECOND if (folder / part).is_dir()]
        found = [folder / "model_index.json"] if second else []  # defines how SDXL encodes the empty prompt
        for part in (*PARTS, *second):
            variant = bases.variant_of(folder, part) if part in WEIGHTS else None
            every = sorted(f for f in (folder / part).rglob("*") if f.suffix in kinds)
            found += [f for f in every if bases.is_read(f, part, variant)]
        return found

    def check(self) -> bases.Base:
        """Read and check the configuration of the base.

        Raises ErasebenchError, with a description of the model, if it is not a usable base."""
        where = str(self.path or self.hub)
        if self.dtype not in bases.DTYPES:
            raise ErasebenchError(f"model.dtype={self.dtype}: choose from {', '.join(bases.DTYPES)}")
        if not where:
            raise ErasebenchError("no base: give a diffusers folder with model.path=")
        if self.path is not None:
            self.files()  # raises if the folder is not a pipeline
            for part in (part for part in WEIGHTS if (Path(self.path) / part).is_dir()):
                bases.check_pointers(Path(self.path), part)
        try:
            return bases.check(self._find)
        except ErasebenchError as error:
            raise ErasebenchError(f"{where}: {error}") from error

    def _find(self, name: str) -> Path:
        """Return the path of a file of the base.

        It is downloaded from the hub if the base is not a folder."""
        if self.path is not None:
            return Path(self.path) / name
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.hub, name, revision=self.revision or None))


@cache
def _content(folder: Path, stamps: tuple[tuple[Path, int, int], ...]) -> str:
    """Return a hash of the files.

    A process reads them once, as long as their sizes and modification times stay the same."""
    return digest({str(file.relative_to(folder)): sha256_file(file) for file, *_ in stamps})


def weights_digest(*modules: torch.nn.Module) -> str:
    """Return a hash of every parameter of the modules, bit by bit."""
    raw = lambda p: p.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    hashed = hashlib.sha256()
    for module in modules:
        for name, parameter in module.named_parameters():
            hashed.update(name.encode())
            hashed.update(raw(parameter))
    return hashed.hexdigest()


def unfetched(error: Exception) -> str:
    """Return advice about a base that the hub does not provide."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    kinds, cause = [], error
    while cause is not None:  # diffusers raises an OSError from the hub's own error
        kinds.append(type(cause))
        cause = cause.__cause__ or cause.__context__
    named = "give another with model.hub=<owner>/<name> model.revision=<commit>, or a folder with model.path="
    if any(issubclass(kind, GatedRepoError) for kind in kinds):
        return "the hub gives it to those who have agreed to its terms: agree on its page, then `hf auth login`"
    if any(issubclass(kind, RepositoryNotFoundError) for kind in kinds):
        return f"the hub has no such repository, or not any more: {named}"
    if any(issubclass(kind, RevisionNotFoundError) for kind in kinds):
        return f"the hub's repository has no such revision: {named}"
    return "it could not be fetched: download it once and pass the folder with model.path="


def load_part(source: Source, part: str, dtype: torch.dtype) -> torch.nn.Module:
    """Load the U-Net, VAE or a text encoder strictly.

    Raises ErasebenchError unless every weight is in its place and finite."""
    library, name = WEIGHTS[part]
    where, kind = str(source.path or source.hub), getattr(quiet(library), name)
    keywords: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if source.path is None:
        keywords["revision"] = source.revision or None
    else:
        keywords["variant"] = bases.variant_of(Path(source.path), part)
    try:
        module, info = kind.from_pretrained(where, subfolder=part, **keywords)
    except OSError:
        if source.path is not None:
            raise
        module, info = kind.from_pretrained(
            where, subfolder=part, variant="fp16", **keywords
        )  # a repository with a single variant
    # diffusers fills missing weights with noise, drops unexpected ones, and only warns
    absent = [k for k in info["missing_keys"] if not k.endswith("position_ids")]
    if absent or info["mismatched_keys"]:
        raise ErasebenchError(
            f"{where}/{part}: weights are missing or misshapen, e.g. {(absent or list(info['mismatched_keys']))[0]}"
        )
    if left := sorted(k for k in info["unexpected_keys"] if not k.endswith("position_ids")):
        line = f"{where}/{part}: {len(left)} weights that {kind.__name__} has no place for, e.g. {left[0]}"
        if part in ("unet", "vae"):
            raise ErasebenchError(f"{line}: another network than its configuration says")
        log.warning("%s: left out", line)  # text encoders are extracted from whole CLIP models
    broken = next((n for n, p in module.named_parameters() if not torch.isfinite(p).all()), None)
    if broken:
        raise ErasebenchError(f"{where}/{part}: weight {broken} is not finite (NaN or infinity)")
    if hasattr(module.config, "return_dict"):
        module.config.return_dict = True  # a folder's config may say otherwise
    return module


@dataclass(frozen=True)
class Components:
    """Components of a pipeline, as loaded by diffusers and transformers."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler_config: Mapping[str, Any]
    text_encoder_2: Any = None  # SDXL's; reads the same tokens with another padding token
    second_padding: int = 0
    zeros: bool = True  # guidance uses all-zero embeddings for SDXL's empty prompt

    @classmethod
    def load(cls, source: Source) -> Components:
        """Load every part strictly.

        Raises ErasebenchError for a missing, truncated or non-finite model, and for one that does not draw from text
        alone."""
        try:
            return cls._load(source)
        except ErasebenchError:
            raise
        except Exception as error:  # safetensors, JSON, network and key errors have no common class
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            advice = "the folder is damaged or not a diffusers pipeline" if source.path else unfetched(error)
            where = source.path or source.hub
            raise ErasebenchError(f"cannot load model {where}: {advice} ({reason[:200]})") from error

    @classmethod
    def _load(cls, source: Source) -> Components:
        where, base, dtype = str(source.path or source.hub), source.check(), getattr(torch, source.dtype)
        loaded = {part: load_part(source, part, dtype) for part in WEIGHTS if part in base.parts}
        if base.xl and dtype == torch.float16 and base.parts["vae"]["force_upcast"]:
            loaded["vae"].float()  # as SDXL's pipeline does: this VAE gives NaN in half precision
        revision = {"revision": source.revision or None} if source.path is None else {}
        tokenizers = {
            part: quiet("transformers").CLIPTokenizer.from_pretrained(where, subfolder=part, **revision)
            for part in ("tokenizer", "tokenizer_2")[: 1 + base.xl]
        }
        for number, (part, tokenizer) in enumerate(tokenizers.items()):
            bases.check_tokenizer(tokenizer, base.parts[("text_encoder", "text_encoder_2")[number]], part)
        if base.xl and len({digest(tokenizer.get_vocab()) for tokenizer in tokenizers.values()}) > 1:
            raise ErasebenchError(f"{where}: its two tokenizers do not know the same words")
        return cls(
            **loaded,
            tokenizer=tokenizers["tokenizer"],
            scheduler_config=base.parts["scheduler"],
            second_padding=tokenizers["tokenizer_2"].pad_token_id if base.xl else 0,
            zeros=base.zeros,
        )
