"""Work in slices, halved if memory runs out, with the same result.

Sizes are chosen so that a protocol of Stable Diffusion 1 at 512 pixels in fp32 fits into 20 GiB. They scale with the
number of positions of a latent, so that work in the embedded world is never cut. A size that proved too large is
remembered for as long as the model lives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..contracts import ErasebenchError, Sampler

if TYPE_CHECKING:
    from .context import Context
    from .model import Model

log = logging.getLogger("erasebench")
T = TypeVar("T")
PLACES = 8 * 64 * 64  # of latents: eight 512-pixel images, 6 GiB to decode, 12 GiB of graph
UNGRAPHED = 2  # times as many are sampled at once, since sampling keeps no graph
SHORT = (torch.OutOfMemoryError, MemoryError, RuntimeError)  # raised for lack of memory, and for other reasons
_sizes: WeakKeyDictionary[object, dict[Hashable, int]] = WeakKeyDictionary()


def at_once(shape: Sequence[int], times: int = 1) -> int:
    """Return how many latents [..., h, w] to process at once; at least one."""
    return max(1, times * PLACES // (shape[-2] * shape[-1]))


def size_of(model: Model, kind: Hashable, most: int) -> int:
    """Return `most`, or less if that proved too large for this kind."""
    return min(most, _sizes.get(model, {}).get(kind, most))


def halve(model: Model, kind: Hashable, size: int, error: BaseException) -> int:
    """Halve a size that was too large.

    The new size holds for all later work of the kind. Raises the error itself if it is not about memory, and
    ErasebenchError if the size was one."""
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
        raise error
    if size <= 1:
        raise ErasebenchError("out of memory even for one image at a time") from error
    _sizes.setdefault(model, {})[kind] = size // 2
    log.warning("out of memory: going on with batches of %d", size // 2)
    return size // 2


def in_slices(model: Model, kind: Hashable, work: Callable[[slice], T], count: int, most: int) -> list[T]:
    """Return work(rows) for slices of `count` rows, in order.

    Work must be repeatable: a slice that runs out of memory is repeated in halves."""
    done: list[T] = []
    start = 0
    while start < count or not done:
        size = min(size_of(model, kind, most), max(count - start, 1))
        try:
            done.append(work(slice(start, start + size)))
            start += size
        except SHORT as error:
            halve(model, kind, size, error)
    return done


def sampled(
    model: Model, context: Context, seeds: Sequence[int], sampler: Sampler, trace: list[tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """Sample latents [N, C, h, w] of any number of prompts; `trace` as in `Model.latents`."""

    def work(rows: slice) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        seen: list[tuple[Tensor, Tensor]] = []
        return model.latents(context.select(rows), seeds[rows], sampler, None if trace is None else seen), seen

    most = at_once(model.latent_shape(sampler.size), UNGRAPHED)
    latents, traces = zip(*in_slices(model, ("sample", sampler.size), work, len(seeds), most), strict=True)
    if trace is not None:
        trace += [(steps[0][0], torch.cat([z for _, z in steps])) for steps in zip(*traces, strict=True)]
    return torch.cat(latents)


def sampled_images(model: Model, texts: Sequence[str], seeds: Sequence[int], sampler: Sampler) -> Tensor:
    """Sample images uint8 [N, H, W, 3] of any number of prompts.

    Each slice of prompts goes through `Model.sample`."""
    work = lambda rows: model.sample(texts[rows], seeds[rows], sampler).images
    most = at_once(model.latent_shape(sampler.size), UNGRAPHED)
    return torch.cat(in_slices(model, ("sample", sampler.size), work, len(texts), most))


# -- gradients --------------------------------------------------------------------------------------------------------


class Term(NamedTuple):
    """Summand of a loss.

    `of(rows)` is the contribution of a slice of the `count` rows; each row has `graphs` predictions with a graph. It
    must not draw random numbers, so that it can be computed again."""

    of: Callable[[slice], Tensor]
    count: int
    graphs: int = 1

    def times(self, scale: float) -> Term:
        return self._replace(of=lambda rows: scale * self.of(rows))

    def whole(self) -> Tensor:
        return self.of(slice(0, self.count))


def share(rows: slice, count: int) -> float:
    """Return the weight of a slice's mean in the overall mean."""
    return len(range(count)[rows]) / count


def add_gradients(
    model: Model, terms: Sequence[Term], weights: Iterable[Tensor], check: Callable[[Tensor], Tensor], most: int | None = None
) -> None:
    """Set the gradients of the weights to those of the terms' sum.

    The gradients must be None before. At most `most` predictions (None: as many as fit) have their graph at the same
    time; beyond that, the gradients of micro-batches are accumulated. Each loss passes through `check` before its
    backward pass."""
    weights, every = list(weights), sum(term.count * term.graphs for term in terms)
    if every > 1:  # a base's configuration may lack the size of its latents
        fits = at_once(model.latent_shape())
        if model.unet.is_gradient_checkpointing:  # trained weights leave less room
            fits = max(1, fits // 2)
        most = fits if most is None else min(most, fits)
    else:
        most = 1
    while True:
        size = min(size_of(model, "graph", most), every)
        try:
            if every <= size:
                check(sum(term.whole() for term in terms)).backward()
                return
            for term in terms:
                step = max(1, size // term.graphs)
                for start in range(0, term.count, step):
                    check(term.of(slice(start, min(start + step, term.count)))).backward()
            return
        except SHORT as error:
            for weight in weights:
                weight.grad = None
            halve(model, "graph", size, error)
