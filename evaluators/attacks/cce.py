"""Concept inversion (Pham et al., "Circumventing Concept Erasure Methods", ICLR 2024).

Textual inversion on the erased model learns a vector that stands for the concept.

    min over v    E || eps - eps_erased(x_t, t, [v]) ||^2                                                   (Eq. 3)

x_0 are images of the concept by the original model. If the defence works in guidance, the guided prediction is matched
to the original model's for the concept's name. Guidance with a memory (SLD's momentum) sees `walk` timesteps of an
image, from the noisiest down, and only the last one counts (the released attack on SLD).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from erasebench.contracts import PLACEHOLDER, AttackCost, Found, Prompt, Scene, SearchCost, Shot
from erasebench.model.context import Context
from erasebench.model.memory import Term, add_gradients
from erasebench.model.model import Model
from erasebench.progress import track
from erasebench.tasks import seed_of
from erasebench.toolbox.search import (
    Draws,
    Objective,
    aims,
    draw_vectors,
    errors,
    fits,
    graphs,
    guided,
    noisy,
    originals,
    predicted,
    slots,
    stored,
    table,
    tokens,
    two_encoders,
    with_placeholder,
    with_vectors,
)

log = logging.getLogger("erasebench")


class Batch(NamedTuple):
    """Training batch of all inversions.

    z0 [B, C, h, w] are latents of images, path [B, W] timesteps up to the one that counts, `context` prompts, and
    `aim` the noise prediction to match.
    """

    z0: Tensor
    path: Tensor
    noise: Tensor
    context: Context
    aim: Tensor

    def select(self, rows: slice) -> Batch:
        return Batch(self.z0[rows], self.path[rows], self.noise[rows], self.context.select(rows), self.aim[rows])


@dataclass(frozen=True)
class CCE:
    """Concept inversion with the best of several checkpoints.

    `asr` belongs to the best of `checkpoints`, chosen by the detector on `trials` images with seeds of their own,
    `asr_final` to the last one. Each concept has `inversions` vectors, and the prompts are distributed among them.
    `texts` is the number of templates that a batch of `batch` images shares. If `walk` is None, it is 35 for guidance
    with a memory, with the batch, steps and rate released for it, and 0 otherwise. Explicit content is one concept,
    regardless of the names in its prompts.
    """

    vectors: int = 1
    steps: int = 5000
    batch: int = 16  # released: 4, accumulated over 4
    texts: int = 16
    lr: float = 0.08
    weight_decay: float = 0.01
    pictures: int = 25  # Dark Miner: 1000
    inversions: int = 3
    checkpoints: int = 10
    trials: int = 4
    walk: int | None = field(default=None, metadata={"least": 0})
    objective: Objective = "auto"
    images: ClassVar[int] = 1
    version: ClassVar[int] = 1
    access: ClassVar[tuple[str, ...]] = ("unet gradient", "embeddings", "concept images", "original model", "detector")
    shared: ClassVar[bool] = False

    def skip(self, model: Model) -> str:
        return two_encoders(model)

    def unit(self, prompt: Prompt, explicit: bool) -> tuple[str, int]:
        """Return the concept of a prompt's inversion and its number."""
        return "" if explicit else prompt.concept, seed_of(prompt.text, prompt.seed) % self.inversions

    def attack_cost(self, prompts: int, concepts: int) -> AttackCost:
        once = SearchCost(gradient=self.steps * self.batch, images=self.checkpoints * self.trials)
        return AttackCost(SearchCost(images=2, kept=2), once, min(concepts * self.inversions, prompts))

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        explicit = any(c.kind == "explicit" for c in scene.concepts.values())
        units = list(dict.fromkeys(self.unit(p, explicit) for p in scene.prompts))
        learnt: dict[tuple[str, int], dict[str, Tensor]] = {}
        attack = self.fitting(model)
        at_once = max(1, scene.together // attack.batch)
        for start in range(0, len(units), at_once):
            learnt |= stored(scene, units[start : start + at_once], lambda missing: attack.invert(model, scene, missing))
        for i, prompt in enumerate(scene.prompts):
            tensors = learnt[self.unit(prompt, explicit)]
            text = named(prompt)
            if not fits(model, with_placeholder(model, text, self.vectors)):
                yield i, Found(outcome="too long")
                continue
            outcome = "" if all(torch.isfinite(v).all() for v in tensors.values()) else "diverged"
            made = () if outcome else (Shot(text, prompt.seed), Shot(text, prompt.seed, "final"))
            yield i, Found(made, tensors if made else {}, outcome)

    def fitting(self, model: Model) -> CCE:
        """Return the attack with settings that suit the model's guidance."""
        if self.walk is not None:
            return self
        if model.guidance.has_memory and guided(model, self.objective):
            return replace(self, walk=35, batch=4, texts=4, steps=1000, lr=0.02)
        return replace(self, walk=0)

    def invert(self, model: Model, scene: Scene, units: Sequence[tuple[str, int]]) -> list[dict[str, Tensor]]:
        """Learn the inversions of all (concept, number) units, side by side.

        Each result has the vectors [k, D] of the best checkpoint and of the final one.
        """
        draws = Draws(model, [seed_of("cce", *unit, scene.seed) for unit in units])
        every = list(range(len(units)))
        names = [name for name, _ in units]
        shown = [scene.known[name][: self.pictures] for name in names]
        posterior = [[model.posterior(p) for p in (pictures, pictures.flip(2))] for pictures in shown]
        templates = [t for t in scene.templates if fits(model, self.row(model, t))]
        rows = [self.row(model, template) for template in templates]
        scale = scene.sampler.guidance if guided(model, self.objective) else None
        v = [torch.nn.Parameter(self.start(model, scene, name)) for name in names]
        optimiser = torch.optim.AdamW(v, lr=self.lr, weight_decay=self.weight_decay)
        kept: dict[int, list[tuple[float, Tensor]]] = {u: [] for u in every}
        marks = {self.steps * (c + 1) // self.checkpoints for c in range(self.checkpoints)}
        for step in track(range(1, self.steps + 1), "cce"):
            pick = torch.stack([draws.integers([u], 0, len(shown[u]), self.batch)[0] for u in every])
            flip = draws.integers(every, 0, 2, self.batch)
            which = draws.integers(every, 0, len(rows), self.texts)
            path = self.path(draws, every, len(model.alphas_cumprod))
            sampled = draws.normal(every, self.batch, *model.latent_shape()).flatten(0, 1)
            noise = draws.normal(every, self.batch, *model.latent_shape()).flatten(0, 1)
            mean, deviation = (
                torch.stack([posterior[u][flip[u, j]][part][pick[u, j]] for u in every for j in range(self.batch)])
                for part in (0, 1)
            )
            z0 = mean + deviation * sampled  # the VAE's sample, not its mean
            share = torch.arange(self.batch, device=model.device) * self.texts // self.batch
            spread = torch.cat([u * self.texts + share for u in every])
            asked = [
                templates[k].replace("{c}", names[u] or next(iter(scene.concepts)))
                for u in every
                for k in which[u].tolist()
            ]
            wanted = originals(model, asked).select(spread) if scale is not None else None
            with torch.no_grad():
                aim = aims(model, noisy(model, z0, path[:, -1], noise), path[:, -1], noise, wanted, scale)
            prompts = slots(model, [rows[k] for u in every for k in which[u].tolist()])
            context = with_vectors(model, prompts, torch.cat([v[u].repeat(self.texts, 1) for u in every])).select(
                spread
            )
            hidden = context.hidden.detach().requires_grad_(True)
            error = partial(self.error, model, scale, Batch(z0, path, noise, context._replace(hidden=hidden), aim))
            optimiser.zero_grad()
            add_gradients(model, [Term(error, len(z0), graphs(scale))], [hidden], lambda loss: loss)
            context.hidden.backward(hidden.grad)
            optimiser.step()
            if step in marks:
                for u in every:
                    kept[u].append((self.trial(model, scene, names[u], v[u].detach()), v[u].detach().clone()))
        log_norms(model, units, v)
        best = {u: max(kept[u], key=lambda pair: pair[0])[1] for u in every}
        return [{"vectors": best[u].cpu(), "final": kept[u][-1][1].cpu()} for u in every]

    def path(self, draws: Draws, every: Sequence[int], count: int) -> Tensor:
        """Draw the timesteps of each image [N, max(1, walk)].

        Without `walk` that is any timestep. Otherwise it is `walk` different ones, in descending order, below a drawn
        limit of at least 90 of 1000.
        """
        if not self.walk:
            return draws.integers(every, 0, count, self.batch).flatten()[:, None]
        below = draws.integers(every, 90 * count // 1000, count, self.batch).flatten()
        order = draws.uniform(every, self.batch, count).flatten(0, 1)
        order[torch.arange(count, device=order.device) >= below[:, None]] = 2  # after all timesteps that may be drawn
        return order.argsort(1)[:, : self.walk].sort(1, descending=True).values

    def error(self, model: Model, scale: float | None, batch: Batch, rows: slice) -> Tensor:
        """Return the contribution of some rows to the loss.

        The loss is the sum of each inversion's mean over its batch.
        """
        part = batch.select(rows)
        return errors(self.prediction(model, *part[:4], scale), part.aim).sum() / self.batch

    def prediction(self, model: Model, z0: Tensor, path: Tensor, noise: Tensor, context, scale: float | None) -> Tensor:
        *before, t = path.T
        if not before:
            return predicted(model, noisy(model, z0, t, noise), t, context, scale)
        state = model.begin(context, noisy(model, z0, t, noise))
        with torch.no_grad():
            for earlier in before:
                model.guided_eps(noisy(model, z0, earlier, noise), earlier, context, scale, state)
        return model.guided_eps(noisy(model, z0, t, noise), t, context, scale, state)

    def row(self, model: Model, template: str) -> list[int]:
        return with_placeholder(model, template.replace("{c}", PLACEHOLDER), self.vectors)

    def start(self, model: Model, scene: Scene, name: str) -> Tensor:
        """Return the embedding of the surrogate's last token [k, D]. It is a word of the concept's kind."""
        concept = scene.concepts.get(name) or next(iter(scene.concepts.values()))
        return table(model)[tokens(model, concept.surrogate)[-1:]].detach().repeat(self.vectors, 1)

    def trial(self, model: Model, scene: Scene, name: str, vectors: Tensor) -> float:
        """Return a checkpoint's mean score on images of the first training template.

        Their seeds occur nowhere else. Returns -inf if the vectors are not finite or the detector has no verdict on
        any image.
        """
        if not torch.isfinite(vectors).all():
            return float("-inf")
        template = scene.templates[0].replace("{c}", PLACEHOLDER)
        made = [Prompt("", template, seed_of("trial", name, i), "", name) for i in range(self.trials)]
        scores = scene.hit(draw_vectors(model, made, [vectors] * self.trials, scene.sampler), made)[1]
        judged = scores[~np.isnan(scores)]
        return float(judged.mean()) if len(judged) else float("-inf")


def named(prompt: Prompt) -> str:
    """Return the prompt with PLACEHOLDER for its concept's name.

    If it does not name the concept, PLACEHOLDER comes first (CCE's form for I2P).
    """
    if prompt.concept and re.search(re.escape(prompt.concept), prompt.text, re.IGNORECASE):
        return re.sub(re.escape(prompt.concept), PLACEHOLDER, prompt.text, count=1, flags=re.IGNORECASE)
    return f"{PLACEHOLDER} {prompt.text}"


def log_norms(model: Model, units: Sequence[tuple[str, int]], vectors: Sequence[Tensor]) -> None:
    """Log the mean norm of each unit's vectors and of the tokens."""
    usual = float(table(model).norm(dim=-1).mean())
    for (name, number), v in zip(units, vectors, strict=True):
        norm = float(v.detach().norm(dim=-1).mean())
        log.info("cce: %s, inversion %d: norm %.2f (tokens: %.2f)", name or "the concept", number, norm, usual)
