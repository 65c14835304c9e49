"""Fine-tuning, as most methods do it: some weights, an optimiser, a loss a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from .contracts import Sampler
from .model import Context, Model, NotFinite, is_finite, join

FILE = "weights.safetensors"
TOGETHER = 64  # pictures drawn at a time
TRAINED = {  # ESD's released parameter groups: norms included; the output, time embedding and input convolution are not
    "x": r"^unet\..*attn2\.",
    "u": r"^unet\.(?!.*attn2\.)(?!conv_out|conv_norm_out|time_embedding)",
    "full": r"^unet\.",
}


class Pictures(NamedTuple):
    """Clean latents z [N, C, h, w] with a prompt each."""

    z: Tensor
    context: Context

    def select(self, which: Tensor) -> Pictures:
        return Pictures(self.z[which], self.context.select(which))


@torch.no_grad()
def drawn(model: Model, texts: Sequence[str], seeds: Sequence[int] | torch.Generator, sampler: Sampler) -> Pictures:
    """A picture of each text and seed (or of seeds that a generator draws), by the model as it stands; its latents are
    the sampler's own."""
    if isinstance(seeds, torch.Generator):
        seeds = torch.randint(2**31, (len(texts),), generator=seeds).tolist()
    made = []
    for i in range(0, len(texts), TOGETHER):
        context = model.encode_distinct(texts[i : i + TOGETHER])
        made.append(Pictures(model.latents(context, seeds[i : i + TOGETHER], sampler), context))
    z, contexts = zip(*made, strict=True)
    return Pictures(torch.cat(z), join(*contexts))


def decoded(model: Model, pictures: Pictures) -> Tensor:
    """Images uint8 [N, H, W, 3] of pictures."""
    return torch.cat([model.decode(z) for z in pictures.z.split(TOGETHER)])


def shuffled(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of indices [batch] below `count` without end, each index once before any comes again."""
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < batch:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:batch]
        left = left[batch:]


def denoising(model: Model, pictures: Pictures, generator: torch.Generator) -> Tensor:
    """What diffusion models are trained on: mean squared error of the noise in noisy pictures (Ho et al., 2020, Eq. 14)."""
    z, t, noise = noised(model, pictures.z, generator)
    return (model.eps(z, t, pictures.context) - noise).square().mean()


def erased_noise_target(free: Tensor, text: Tensor, eta: float) -> Tensor:
    """What an erased model is to predict of a concept's prompt, from the base's predictions without it and with it,
    [B, C, h, w]: the opposite direction of guidance (ESD, Eq. 6, and all that builds on it)."""
    return free - eta * (text - free)


def noised(model: Model, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t [B], the noise in it) of clean latents [B, C, h, w], each at a t of its own."""
    t = torch.randint(len(model.alphas_cumprod), (len(latents),), generator=generator).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    alpha = model.alphas_cumprod[t].to(latents.dtype).view(-1, 1, 1, 1)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, t, noise


def fine_tune(
    model: Model,
    trained: str,
    loss: Callable[[int], Tensor],
    steps: int,
    optimiser: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    out: Path,
    title: str,
    adjust: Callable[[Mapping[str, Tensor]], None] = lambda weights: None,
) -> None:
    """Train the weights whose names match `trained` on loss(step) and write them into the folder `out`, for `apply`.

    The model is the student while a loss is computed; `with model.teacher()` is the base. `adjust` sees the weights, with
    their gradients, before each step of the optimiser (a mask, a clipped norm, a penalty's own gradient)."""
    with model.training(model.names(trained)) as weights:
        stepper = optimiser(weights.values())
        for step in tqdm(range(steps), title, disable=None, delay=2):
            value = checked(loss(step), title)
            stepper.zero_grad(set_to_none=True)
            value.backward()
            adjust(weights)
            stepper.step()
        save_file({name: w.data.contiguous().cpu() for name, w in weights.items()}, out / FILE)


def checked(loss: Tensor, title: str) -> Tensor:
    """The loss of a step of training. Raises NotFinite where it is not finite: what comes of it is no result."""
    if not is_finite(loss.detach()):
        raise NotFinite(f"{title}: the loss is not finite (diverged: a lower learning rate, or fp32)")
    return loss


def tuned(model: Model, artifact: Path) -> AbstractContextManager[None]:
    """The model with the weights that `fine_tune` wrote."""
    return model.changed(weights=load_file(artifact / FILE))
