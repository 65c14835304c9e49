"""Sampling of shards of prompts into shards of images, in the store."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from .. import provenance
from ..contracts import ErasebenchError, Prompt, Sampler
from ..model.memory import SHORT, halve, size_of
from ..model.model import Model, Sampled
from ..store.local import Store
from .specification import shard_identity

log = logging.getLogger("erasebench")
SHARD = 64
Draw = Callable[[Model, Sequence[Prompt], Sampler], Sampled]


@dataclass(frozen=True)
class Shard:
    """Stored shard of images, with the cost of making them."""

    path: Path
    prompts: tuple[Prompt, ...]

    def of(self, store: Store) -> Shard:
        """Return the same shard in another machine's store."""
        return replace(self, path=store.find("images", self.path.name))

    def images(self) -> torch.Tensor:
        """Load the images: -> uint8 [B, H, W, 3]."""
        with np.load(self.path / "images.npz", allow_pickle=False) as file:
            return torch.from_numpy(file["images"])

    def meta(self) -> dict:
        """Load the metadata of the shard.

        Entries: refused (list of bool), seconds, unet_samples, batch, peak_memory_mb; and for its origin device,
        commit, dirty and packages."""
        return json.loads((self.path / "shard.json").read_text())


def shards(prompts: Sequence[Prompt]) -> list[tuple[Prompt, ...]]:
    """Cut prompts into shards at every split and every SHARD prompts.

    Their order is fixed, so a run with a smaller cap shares whole shards."""
    parts: list[tuple[Prompt, ...]] = []
    for split in dict.fromkeys(prompt.split for prompt in prompts):
        members = [prompt for prompt in prompts if prompt.split == split]
        parts += [tuple(members[i : i + SHARD]) for i in range(0, len(members), SHARD)]
    return parts


@dataclass(frozen=True)
class ShardRequest:
    """Everything that a shard's images depend on; `identity` identifies the erased model."""

    identity: Mapping[str, Any]
    sampler: Sampler
    prompts: tuple[Prompt, ...]

    @property
    def key(self) -> dict[str, Any]:
        return shard_identity(self.identity, self.sampler, self.prompts)

    def shard(self, store: Store) -> Shard | None:
        """Return the shard, or None if it has not been made."""
        path = store.get("images", self.key)
        return Shard(path, self.prompts) if path else None


@dataclass(frozen=True)
class Resources:
    """Resources of a shard that is made concurrently with others.

    batch: images per batch; 0: as many as fit into memory. beside: number of shards made concurrently; each is charged
    its share of the seconds. turn: context manager entered while the shard samples."""

    batch: int
    beside: int = 1
    turn: AbstractContextManager | None = None


def make(
    store: Store,
    model: Callable[[], Model],
    request: ShardRequest,
    resources: Resources,
    draw: Draw | None = None,
    wait: bool = True,
) -> bool:
    """Sample one shard into the store.

    Returns False if another process holds this shard and `wait` is False. `model()` is called only if images are
    missing. `draw` replaces the way of sampling; the request's identity must then name it too."""
    sampler = request.sampler

    def fill(folder: Path) -> None:
        here = model()
        fast = "speed" in request.identity
        with resources.turn or nullcontext():
            most = resources.batch or room(here, sampler)  # before compilation, since each batch size is compiled anew
            provenance.reset_peak_memory(str(here.device))
            start, before = time.perf_counter(), here.unet_samples
            with here.fast() if fast else nullcontext():
                pad = fast and here.device.type == "cuda"
                sampled, used = sample(here, request.prompts, sampler, most, draw or plain, pad)
            seconds, calls = time.perf_counter() - start, here.unet_samples - before
            peak = provenance.peak_memory_mb(str(here.device))
        np.savez_compressed(folder / "images.npz", images=sampled.images.numpy())
        commit, dirty = provenance.git()
        meta = {
            "refused": sampled.refused.tolist(),
            "seconds": seconds / resources.beside,
            "unet_samples": calls,
            "batch": used,
            "peak_memory_mb": peak,
            "device": provenance.device(str(here.device)),
            "commit": commit,
            "dirty": dirty,
            "packages": provenance.packages(),
        }
        (folder / "shard.json").write_text(json.dumps(meta))

    return store.get_or_make("images", request.key, fill, wait) is not None


def plain(model: Model, prompts: Sequence[Prompt], sampler: Sampler) -> Sampled:
    """Sample the prompts unmodified."""
    return model.sample([p.text for p in prompts], [p.seed for p in prompts], sampler, scales(prompts, sampler))


def scales(prompts: Sequence[Prompt], sampler: Sampler) -> list[float]:
    """Return the guidance scale of each image: the prompt's own, or the sampler's."""
    return [sampler.guidance if p.guidance is None else p.guidance for p in prompts]


def room(model: Model, sampler: Sampler, most: int = SHARD) -> int:
    """Return the number of images that fit into GPU memory at once.

    It is extrapolated from the memory that a second image adds to the first, with a tenth to spare."""

    def peak(count: int) -> int:
        torch.cuda.reset_peak_memory_stats(model.device)
        model.sample([""] * count, range(count), replace(sampler, steps=1))
        return torch.cuda.max_memory_allocated(model.device)

    known = _rooms.setdefault(model, {})
    if sampler not in known:
        held, one, two = torch.cuda.memory_allocated(model.device), peak(1), peak(2)
        left = torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_reserved(model.device) - held
        known[sampler] = fitting(left, one - held, two - one, most)
        log.info("batch: %d images", known[sampler])
    return known[sampler]


_rooms: WeakKeyDictionary[Model, dict[Sampler, int]] = WeakKeyDictionary()


def fitting(left: int, first: int, next_one: int, most: int) -> int:
    """Return how many images fit into nine tenths of `left` bytes; at least one."""
    return min(most, 1 + max(0, int(0.9 * left - first) // max(1, next_one)))


def sample(
    model: Model, prompts: Sequence[Prompt], sampler: Sampler, batch: int, draw: Draw = plain, pad: bool = False
) -> tuple[Sampled, int]:
    """Sample all prompts -> images and the batch size used.

    If memory runs out, the batch is halved, down to one, for later shards too. With `pad` the last batch is filled up,
    since a compiled model accepts only one shape."""
    done: list[Sampled] = []
    kind = "sample", sampler.size
    position, batch = 0, size_of(model, kind, batch)
    while position < len(prompts):
        part = prompts[position : position + batch]
        try:
            filled = [*part, *part[-1:] * (batch - len(part))] if pad else part
            made = draw(model, filled, sampler)
            if made.images.dtype != torch.uint8 or len(made.images) != len(filled) or len(made.refused) != len(filled):
                raise ErasebenchError(
                    f"{len(made.images)} images of {made.images.dtype} were made for {len(filled)} prompts, not as many of uint8"
                )
            done.append(Sampled(*(x[: len(part)] for x in made)))
            position += len(part)
        except SHORT as error:
            batch = halve(model, kind, batch, error)
    return Sampled(*(torch.cat(parts) for parts in zip(*done, strict=True))), batch
