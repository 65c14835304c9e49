"""SPM (Lyu et al., CVPR 2024): prompt-gated rank-1 membranes, one for each concept.

The membranes lie beside the modules of the U-Net's transformers:

    W x + sum over concepts i   gamma_i(p) u_i (d_i . x)
    min over u, d   || eps_M(x_t, c) - [eps(x_t) - eta (eps(x_t, c) - eps(x_t))] ||^2
                    + lambda || eps_M(x_t, c_an) - eps(x_t, c_an) ||^2
    gamma_i(p) = max( cos(p, c_i),  share of c_i's tokens that are in p )          (facilitated transport)

eps is the base, and M is one membrane with gamma = 1. Each concept's membrane is trained alone; x_t is sampled with it.
Anchors c_an are noise in place of encodings. Their norm is 0.8 to 1.2 times that of c, and each is kept with
probability 1 - cos(c_an, c). gamma is computed for every row of the U-Net's batch, so the empty prompt of guidance has
its own (the released code uses the prompt's).

composition=released composes like the released code: gamma scales both u and d, and each is summed over concepts, (sum
gamma_i u_i) (sum gamma_j d_j . x). One concept then counts by gamma^2, and several concepts mix. Departures from that
code: all anchors of a step enter the loss (there half of them, with the empty prompt in place of the others), AdamW is
not 8-bit, images have the model's own size (there a random smaller one), and t lies between any step and the next, as
in ESD (there exactly at a step after the first).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from diffusers.models import Transformer2DModel
from diffusers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup as cosine_with_restarts
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from erasebench.contracts import Brief, FitCost, Sampler
from erasebench.model.context import Context, join
from erasebench.model.model import Model
from erasebench.progress import track
from erasebench.toolbox.training import checked, erased_noise_target
from erasebench.toolbox.trajectory import Along, count_evaluations


class Membrane(NamedTuple):
    """Membranes of N concepts beside one module: d [N, in] and u [N, out]."""

    d: Tensor
    u: Tensor


@dataclass(frozen=True)
class SPM:
    """Concept-wise membranes with facilitated transport.

    anchor_scale: lambda. anchors: number for each latent of a step. warmup, restarts: of the cosine schedule. eta,
    trajectories: as in AP.
    """

    composition: Literal["separate", "released"] = "separate"
    steps: int = 3000  # for each concept
    batch: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup: int = 500
    restarts: int = 3
    eta: float = 1.0
    anchors: int = 4
    anchor_scale: float = 1000.0
    start_guidance: float = 3.0
    ddim_steps: int = 30
    trajectories: int | None = None
    version: ClassVar[int] = 1

    def skip(self, model: Model) -> str:
        return "its anchors have no pooled output, which it asks for" if model.text_encoder_2 is not None else ""

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        once, each = count_evaluations(self.ddim_steps, self.trajectories)
        samples = self.steps * self.batch
        return FitCost(concepts * (once + samples * (2 + self.anchors + each)), concepts * samples * (1 + self.anchors))

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        names = [concept.name for concept in brief.concepts]
        with torch.no_grad():
            concepts = [model.encode([name]) for name in names]
        each = [self.membrane(model, concept, generator) for concept in concepts]
        stacked = {
            f"{module}.{half}": torch.cat([getattr(one[module], half) for one in each]).detach().contiguous().cpu()
            for module in each[0]
            for half in Membrane._fields
        }
        save_file(stacked, out / "membranes.safetensors")
        (out / "concepts.json").write_text(json.dumps(names))

    def membrane(self, model: Model, concept: Context, generator: torch.Generator) -> dict[str, Membrane]:
        """Train the membrane of one concept: module -> its part."""
        made = untrained(model, generator)
        weights = [half for one in made.values() for half in one]
        optimiser = torch.optim.AdamW(weights, lr=self.lr, weight_decay=self.weight_decay)
        schedule = cosine_with_restarts(optimiser, self.warmup, self.steps, self.restarts)
        c, empty = concept.repeat(self.batch), model.unconditional().repeat(self.batch)
        sampler = Sampler("ddim", self.ddim_steps, self.start_guidance)
        with beside(model, Membranes(made, lambda context: context.hidden.new_ones(len(context.ids), 1))):
            towards = Along(model, concept, sampler, generator, self.trajectories)
            for _ in track(range(self.steps), "spm"):
                with torch.no_grad():
                    z, t = towards(c, torch.zeros(self.batch, dtype=torch.long))
                others = anchors(concept, self.batch * self.anchors, generator)
                z_an, t_an = z.repeat_interleave(self.anchors, 0), t.repeat_interleave(self.anchors)
                both, times = torch.cat([z, z_an]), torch.cat([t, t_an])
                with model.teacher():
                    free = model.eps(z, t, empty)
                    text, before = model.eps(both, times, join(c, others)).split([len(z), len(z_an)])
                erased, kept = model.eps(both, times, join(c, others)).split([len(z), len(z_an)])
                loss = (erased - erased_noise_target(free, text, self.eta)).square().mean()
                loss = loss + self.anchor_scale * (kept - before).square().mean()
                optimiser.zero_grad(set_to_none=True)
                checked(loss, "spm").backward()
                optimiser.step()
                schedule.step()
        return made

    @contextmanager
    def apply(self, model: Model, artifact: Path) -> Iterator[None]:
        tensors = load_file(artifact / "membranes.safetensors")
        names = json.loads((artifact / "concepts.json").read_text())
        place = lambda key: tensors[key].to(model.device, model.dtype)
        made = {module: Membrane(place(f"{module}.d"), place(f"{module}.u")) for module in adapted(model)}
        with torch.no_grad():
            concepts = model.encode(names)
        words = [torch.tensor(model.tokenizer(name).input_ids[1:-1], device=model.device) for name in names]
        with beside(model, Membranes(made, Transport(concepts.hidden, words), self.composition)):
            yield


class Now(threading.local):
    """Gate of the current U-Net call, one for each thread.

    gamma is None outside of the U-Net's call.
    """

    gamma: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Membranes:
    """Sum of all membranes, gated by the prompts of the U-Net's call.

    gamma of the prompts [B, N] scales each concept's membrane.
    """

    made: dict[str, Membrane]
    gamma: Callable[[Context], Tensor]
    composition: Literal["separate", "released"] = "separate"
    now: Now = field(default_factory=Now)  # several threads generate images

    @contextmanager
    def __call__(self, model: Model, context: Context) -> Iterator[None]:
        self.now.gamma = self.gamma(context)
        try:
            yield
        finally:
            self.now.gamma = None

    def added(self, module: str, x: Tensor) -> Tensor | None:
        """Return the addition to a module's output for its input x.

        x is [B, ..., in]. Returns None outside of the U-Net's call.
        """
        if (gamma := self.now.gamma) is None:
            return None
        d, u = self.made[module]
        if self.composition == "released":
            return torch.einsum("b...i,bi,bo->b...o", x, gamma @ d, gamma @ u)
        return torch.einsum("b...i,ni,bn,no->b...o", x, d, gamma, u)


@dataclass(frozen=True, eq=False)
class Transport:
    """Facilitated transport: gamma of prompts [B, N].

    concepts: encodings [N, L, D]. words: the concepts' token ids.
    """

    concepts: Tensor
    words: list[Tensor]

    def __call__(self, context: Context) -> Tensor:
        length = min(context.hidden.shape[1], self.concepts.shape[1])  # a mined embedding may have any length
        flat = lambda hidden: F.normalize(hidden[:, :length].flatten(1), dim=1)
        cosine = flat(context.hidden) @ flat(self.concepts).T
        held = [(context.ids[:, :, None] == words).any(1).to(cosine).mean(1) for words in self.words]
        return cosine.maximum(torch.stack(held, 1))


@contextmanager
def beside(model: Model, membranes: Membranes) -> Iterator[None]:
    """Put the membranes beside the model's modules; the teacher runs without them."""

    def hook(name: str):
        def add(module, inputs, output):
            conv = isinstance(module, torch.nn.Conv2d)
            more = membranes.added(name, inputs[0].movedim(1, -1) if conv else inputs[0])
            return output if more is None else output + (more.movedim(-1, 1) if conv else more)

        return add

    handles = [module.register_forward_hook(hook(name)) for name, module in adapted(model).items()]
    try:
        with model.changed(around=membranes):
            yield
    finally:
        for handle in handles:
            handle.remove()


def adapted(model: Model) -> dict[str, torch.nn.Module]:
    """Return the linear layers and 1x1 convolutions in the U-Net's transformers."""
    found = {}
    for name, transformer in model.unet.named_modules():
        if isinstance(transformer, Transformer2DModel):
            inside = {f"{name}.{inner}": module for inner, module in transformer.named_modules()}
            found |= {n: m for n, m in inside.items() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    return found


def untrained(model: Model, generator: torch.Generator) -> dict[str, Membrane]:
    """Return a membrane that changes nothing yet."""
    made = {}
    for name, module in adapted(model).items():
        height, width = module.weight.shape[:2]
        d = (2 * torch.rand(1, width, generator=generator) - 1) * (3 / width) ** 0.5
        halves = (d, torch.zeros(1, height))
        made[name] = Membrane(*(x.to(model.device, model.dtype).requires_grad_(True) for x in halves))
    return made


def anchors(concept: Context, count: int, generator: torch.Generator) -> Context:
    """Return `count` noise encodings near the concept's norm and unlike it."""
    c, found = concept.hidden[0], []
    while len(found) < count:
        noise = torch.randn(c.shape, generator=generator).to(c)
        length = 0.8 + 0.4 * float(torch.rand((), generator=generator))
        like = F.cosine_similarity(noise.flatten(), c.flatten(), dim=0)
        if float(torch.rand((), generator=generator)) < 1 - float(like):
            found.append(noise * (length * c.norm() / noise.norm()))
    return concept.repeat(count)._replace(hidden=torch.stack(found))
