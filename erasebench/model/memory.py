"""As much at once as a GPU holds: work in slices, halved where memory is short, with the same result.

Sizes are given for Stable Diffusion 1 at 512 pixels in fp32, of which a protocol is to fit into 20 GiB, and follow the number of places
of a latent, so that nothing of the embedded world is ever cut. A size that proved too large is remembered for as long as the
model lives.
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
PLACES = 8 * 64 * 64  # of latents: eight pictures of 512 pixels, which take 6 GiB to decode and whose predictions' graph takes 12
UNGRAPHED = 2  # times as many are sampled at once, as sampling keeps no graph
SHORT = (torch.OutOfMemoryError, MemoryError, RuntimeError)  # what lack of memory is raised as, among other things
_sizes: WeakKeyDictionary[object, dict[Hashable, int]] = WeakKeyDictionary()


def at_once(shape: Sequence[int], times: int = 1) -> int:
    """How many latents of a shape [..., h, w] are worked on at once, at least one."""
    return max(1, times * PLACES // (shape[-2] * shape[-1]))


def size_of(model: Model, kind: Hashable, most: int) -> int:
    """`most`, or fewer where that proved too many for this kind of work."""
    return min(most, _sizes.get(model, {}).get(kind, most))


def halve(model: Model, kind: Hashable, size: int, error: BaseException) -> int:
    """Half of a size that was too large, for this and all later work of the kind.

    Raises the error itself if it is of something else, and ErasebenchError where the size was one."""
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
        raise error
    if size <= 1:
        raise ErasebenchError("out of memory even for one image at a time") from error
    _sizes.setdefault(model, {})[kind] = size // 2
    log.warning("out of memory: going on with batches of %d", size // 2)
    return size // 2


def in_slices(model: Model, kind: Hashable, work: Callable[[slice], T], count: int, most: int) -> list[T]:
    """work(rows) of slices of `count` rows, in order. Work must be repeatable: a slice for which memory is short is done again,
    in halves."""
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
    """Latents [N, C, h, w] as `Model.latents` gives them, of as many prompts as there are; `trace` as there."""

    def work(rows: slice) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        seen: list[tuple[Tensor, Tensor]] = []
        return model.latents(context.select(rows), seeds[rows], sampler, None if trace is None else seen), seen

    most = at_once(model.latent_shape(sampler.size), UNGRAPHED)
    latents, traces = zip(*in_slices(model, ("sample", sampler.size), work, len(seeds), most), strict=True)
    if trace is not None:
        trace += [(steps[0][0], torch.cat([z for _, z in steps])) for steps in zip(*traces, strict=True)]
    return torch.cat(latents)


def sampled_images(model: Model, texts: Sequence[str], seeds: Sequence[int], sampler: Sampler) -> Tensor:
    """Images uint8 [N, H, W, 3] as `Model.sample` gives them, of as many prompts as there are."""
    work = lambda rows: model.sample(texts[rows], seeds[rows], sampler).images
    most = at_once(model.latent_shape(sampler.size), UNGRAPHED)
    return torch.cat(in_slices(model, ("sample", sampler.size), work, len(texts), most))


# -- gradients --------------------------------------------------------------------------------------------------------


class Term(NamedTuple):
    """A summand of a loss: `of(rows)` is what some of `count` rows, a slice, add to it; each has `graphs` predictions with a
    graph. It must not draw random numbers, so that it can be asked again."""

    of: Callable[[slice], Tensor]
    count: int
    graphs: int = 1

    def times(self, scale: float) -> Term:
        return self._replace(of=lambda rows: scale * self.of(rows))

    def whole(self) -> Tensor:
        return self.of(slice(0, self.count))


def share(rows: slice, count: int) -> float:
    """The weight of the mean over some rows in the mean over all."""
    return len(range(count)[rows]) / count


def add_gradients(
    model: Model, terms: Sequence[Term], weights: Iterable[Tensor], check: Callable[[Tensor], Tensor], most: int | None = None
) -> None:
    """Set the gradients of the weights to those of the sum of the terms; of none before that is not None.

    At most `most` predictions (None: what fits) have their graph at the same time: of more, the gradients of micro-batches
    add up. `check` sees each loss before its backward pass."""
    weights, every = list(weights), sum(term.count * term.graphs for term in terms)
    if every > 1:  # a base need not say how large its latents are
        fits = at_once(model.latent_shape())
        if model.unet.is_gradient_checkpointing:  # the weights that are trained leave less room
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
