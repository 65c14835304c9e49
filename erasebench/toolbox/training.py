"""Fine-tuning: some weights, an optimiser, one loss per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..contracts import Sampler
from ..model.context import Context, join
from ..model.finite import NotFinite, is_finite
from ..model.memory import Term, add_gradients, sampled, share
from ..model.model import Model
from ..progress import track

FILE = "weights.safetensors"
TOGETHER = 64  # texts encoded at a time
HEAVY = 2**30  # bytes of trained weights above which activations are recomputed rather than kept
TRAINED = {  # ESD's released parameter groups: norms included; the output, time embedding and input convolution are not
    "x": r"^unet\..*attn2\.",
    "u": r"^unet\.(?!.*attn2\.)(?!conv_out|conv_norm_out|time_embedding)",
    "full": r"^unet\.",
}


class Pictures(NamedTuple):
    """Clean latents z [N, C, h, w] with a prompt each."""

    z: Tensor
    context: Context

    def select(self, which: Tensor | slice) -> Pictures:
        return Pictures(self.z[which], self.context.select(which))

    def to(self, device: torch.device | str) -> Pictures:
        """Move to another device.

        Thousands of latents need not lie on the GPU that trains on a few of them.
        """
        return Pictures(self.z.to(device), self.context.to(device))


@torch.no_grad()
def drawn(model: Model, texts: Sequence[str], seeds: Sequence[int] | torch.Generator, sampler: Sampler) -> Pictures:
    """Sample an image of each text and seed.

    The model samples as it stands. A generator may draw the seeds. Latents are the sampler's own.
    """
    if isinstance(seeds, torch.Generator):
        seeds = torch.randint(2**31, (len(texts),), generator=seeds).tolist()
    made = []
    for i in range(0, len(texts), TOGETHER):
        context = model.encode_distinct(texts[i : i + TOGETHER])
        made.append(Pictures(sampled(model, context, seeds[i : i + TOGETHER], sampler), context))
    z, contexts = zip(*made, strict=True)
    return Pictures(torch.cat(z), join(*contexts))


@torch.no_grad()
def encoded(model: Model, texts: Sequence[str]) -> Context:
    """Apply `Model.encode` to any number of texts, without a graph."""
    return join(*(model.encode(texts[i : i + TOGETHER]) for i in range(0, len(texts), TOGETHER)))


def decoded(model: Model, pictures: Pictures) -> Tensor:
    """Decode latents into images uint8 [N, H, W, 3]."""
    return torch.cat([model.decode(z.to(model.device)) for z in pictures.z.split(TOGETHER)])


def shuffled(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of indices [batch] below `count` without end.

    Each index comes once before any comes again.
    """
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < batch:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:batch]
        left = left[batch:]


def denoising(model: Model, pictures: Pictures, generator: torch.Generator) -> Term:
    """Return the denoising loss of diffusion models.

    It is the mean squared error of the noise in noisy images (Ho et al., 2020, Eq. 14).
    """
    z, t, noise = noised(model, pictures.z, generator)
    return mean_square(len(z), lambda rows: model.eps(z[rows], t[rows], pictures.context.select(rows)) - noise[rows])


def mean_square(count: int, error: Callable[[slice], Tensor]) -> Term:
    """Return the mean of error(rows)^2 over `count` rows, as a loss term."""
    return Term(lambda rows: share(rows, count) * error(rows).square().mean(), count)


def erased_noise_target(free: Tensor, text: Tensor, eta: float) -> Tensor:
    """Return the target noise of an erased model [B, C, h, w].

    Computed from the base's predictions without the concept's prompt and with it: the opposite direction of guidance
    (ESD, Eq. 6, and the methods built on it).
    """
    return free - eta * (text - free)


def noised(model: Model, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Add noise to clean latents.

    Latents [B, C, h, w] -> (x_t, t [B], noise). Each latent has its own t.
    """
    t = torch.randint(len(model.alphas_cumprod), (len(latents),), generator=generator).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    alpha = model.alphas_cumprod[t].to(latents.dtype).view(-1, 1, 1, 1)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, t, noise


class Optimisation(NamedTuple):
    """Steps of an optimiser, which is created for the weights.

    `adjust` gets the weights with their gradients before each step (a mask, a clipped norm, a penalty's own
    gradient).
    """

    steps: int
    optimiser: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    adjust: Callable[[Mapping[str, Tensor]], None] = lambda weights: None


def fine_tune(
    model: Model,
    trained: str,
    loss: Callable[[int], Tensor | Sequence[Term]],
    how: Optimisation,
    out: Path,
    title: str,
) -> None:
    """Train the weights matching `trained` on loss(step).

    Writes them into the folder `out`, for `apply`. The model is the student while a loss is computed; `with
    model.teacher()` is the base. A loss of many rows is given as terms, whose micro-batches add up to it if a GPU
    cannot hold all of them.
    """
    with model.training(model.names(trained)) as weights:
        stepper = how.optimiser(weights.values())
        for group in stepper.param_groups:
            group["foreach"] = False  # foreach would hold the roots of all second moments at once
        for step in track(range(how.steps), title):
            stepper.zero_grad(set_to_none=True)
            with light(model, weights.values()):
                add_gradients(model, as_terms(loss(step)), weights.values(), partial(checked, title=title))
            how.adjust(weights)
            stepper.step()
        save_file({name: w.data.contiguous().cpu() for name, w in weights.items()}, out / FILE)


def light(model: Model, weights: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Return the model's training context, with checkpointing for many trained weights.

    Recomputing activations then saves memory.
    """
    heavy = sum(w.numel() * w.element_size() for w in weights) > HEAVY
    return model.checkpointing() if heavy else nullcontext()


def as_terms(loss: Tensor | Sequence[Term]) -> Sequence[Term]:
    """Return a loss as terms; a computed loss is one indivisible term."""
    return [Term(lambda rows: loss, 1)] if isinstance(loss, Tensor) else loss


def checked(loss: Tensor, title: str) -> Tensor:
    """Return the loss of a training step.

    Raises NotFinite if it is not finite: training cannot continue from it.
    """
    if not is_finite(loss.detach()):
        raise NotFinite(f"{title}: the loss is not finite (diverged: a lower learning rate, or fp32)")
    return loss


def tuned(model: Model, artifact: Path) -> AbstractContextManager[None]:
    """Load the weights that `fine_tune` wrote into the model.

    Returns the model's context manager.
    """
    return model.changed(weights=load_file(artifact / FILE))
