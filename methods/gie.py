"""Growth inhibitors (GIE): suppress a concept in the cross-attention at inference.

No weight changes. With M* = softmax(Q K(c*)^T) the map of the concept's own prompt c*, and j its tokens strictly
between BOS and EOS,

    attention(Q, c)  becomes  M V + sum_j w_j m*_j v*_j                                              (Eq. 7, 8)

in the prompt's half of guidance. Columns of M* weighted by w (negative suppresses, 0 is no change) stand before EOS;
since the softmax is not recomputed, their position does not matter. A small network computes w_j from m*_j, averaged
over heads and pixels in every cross-attention layer, at the first step with w = 1. Its inputs are the layers, in the
order of execution.

A search provides the network's training data: every prompt with every w of a grid. The label is the largest w (the
least suppression) at which CLIP no longer sees the concept and still sees the rest of the prompt. (In the paper GPT-4o
chose, and its labels are not public.)

variant=p2p does the same as the released code, a Prompt-to-Prompt edit. A second image is drawn from the plain prompt
beside each image. Until 80% of the steps the image takes the second image's map, with its own values of "prompt
concept" and the weighted columns. Until 40% it takes the second image's self-attention too. In the last 20% it attends
to the concept unsuppressed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from erasebench.evaluators.clip import Clip
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from erasebench.contracts import Brief, ErasebenchError, FitCost, Prompt, Sampler
from erasebench.model.context import Context, join
from erasebench.model.guidance import ClassifierFree
from erasebench.model.memory import UNGRAPHED, at_once, in_slices, sampled_images
from erasebench.model.model import Model
from erasebench.progress import track
from erasebench.run import verdicts
from erasebench.tasks import seed_of, spread
from erasebench.toolbox.attention import attend, layers, project, split_heads
from erasebench.toolbox.closed_form import filled
from erasebench.toolbox.training import checked


@dataclass(frozen=True)
class GIE:
    """Suppression of a concept's columns in the cross-attention.

    scale: None, from the adapter; or one w for every token and prompt (the ablation; p2p supports no other).

    near        if two concepts' prompts have EOS embeddings with 1 - cos below it, only the stronger is injected
                (Eq. 11; the value is not published)
    prompts, kept, captions   numbers of labelled prompts with the concepts, with retained names, and with neither (the
                paper: with the concepts alone)
    scales      the grid
    shown       CLIP sees the concept above this probability, among the concepts, retained names and surrogates
    floor       maximum loss of cosine with the rest of the prompt
    """

    variant: Literal["paper", "p2p"] = "paper"  # p2p: the released code's edit, with a fixed scale
    scale: float | None = None
    near: float = 0.1
    prompts: int = 60
    kept: int = 0
    captions: int = 0
    scales: tuple[float, ...] = (1.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -9.0, -10.0, -11.0, -12.0, -13.0, -14.0, -15.0)
    shown: float = 0.5
    floor: float = 0.02
    epochs: int = 2000
    lr: float = 1e-3
    guidance: float = 7.5
    ddim_steps: int = 50
    clip: Clip = Clip(architecture="ViT-L-14-quickgelu")
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(sorted(map(float, self.scales), reverse=True)))
        if self.variant == "p2p" and self.scale is None:
            raise ErasebenchError("method.variant=p2p has no adapter (none was released): give method.scale=")

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        # on average half of the grid is tried before a scale succeeds (ours: 0.3 to 0.5)
        prompts = 0 if self.scale is not None else self.prompts + self.kept + self.captions
        return FitCost(prompts * (1 + len(self.scales) * self.ddim_steps), seconds=20)

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        names = [concept.name for concept in brief.concepts]
        (out / "concepts.json").write_text(json.dumps(names))
        if self.scale is None:
            prompts = self.labelled_prompts(brief)
            labels = self.labels(model, brief, prompts)
            save_file(self.train(model, names, prompts, labels, seed), out / "adapter.safetensors")
            pairs = [(prompt.text, float(w)) for prompt, w in zip(prompts, labels, strict=True)]
            (out / "labels.json").write_text(json.dumps(pairs))

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        names = json.loads((artifact / "concepts.json").read_text())
        if self.variant == "p2p":
            concept = model.encode([", ".join(names)])
            processors = {
                name: Following(concept, name.endswith("attn2.processor")) for name in model.unet.attn_processors
            }
            return model.changed(processors=processors, guidance=Beside(concept=concept, scale=self.scale))
        inhibitors = Inhibitors.of(model, names, self.near)
        scale = self.scale
        if scale is None:
            adapter = network(len(layers(model))).to(model.device, model.dtype)
            adapter.load_state_dict(load_file(artifact / "adapter.safetensors"))
            scale = adapter.requires_grad_(False)
        return self.inhibited(model, inhibitors, scale)

    def inhibited(self, model: Model, inhibitors: Inhibitors, scale: float | nn.Module) -> AbstractContextManager[None]:
        processors = {name: Inhibiting(inhibitors) for name in layers(model)}
        return model.changed(processors=processors, guidance=Inhibited(inhibitors=inhibitors, scale=scale))

    # -- the adapter ----------------------------------------------------------------------------------------------

    def labelled_prompts(self, brief: Brief) -> list[Prompt]:
        """Return training prompts of concepts and retained names, and captions.

        Concepts and retained names use training templates. The `concept` of the latter two kinds is empty.
        """
        prompts = spread("gie", {c.name: c.name for c in brief.concepts}, brief.templates, self.prompts)
        kept = spread(
            "gie kept", dict.fromkeys(brief.preserved, ""), brief.templates, self.kept if brief.preserved else 0
        )
        captions = enumerate(brief.captions[: self.captions])
        return prompts + kept + [Prompt(f"gie/{i}", text, seed_of("gie", text), "gie") for i, text in captions]

    def labels(self, model: Model, brief: Brief, prompts: Sequence[Prompt]) -> Tensor:
        """Return the label w [N] of each prompt, found by `search`.

        Raises ErasebenchError if CLIP gives no verdict on an image.
        """
        inhibitors = Inhibitors.of(model, [c.name for c in brief.concepts], self.near)
        say = lambda name: filled(brief.templates[0], name)
        erased = [say(concept.name) for concept in brief.concepts]
        others = [say(name) for name in dict.fromkeys([*(c.surrogate for c in brief.concepts), *brief.preserved])]
        judge = Clip(self.clip.name, self.clip.architecture, self.clip.pretrained, (*erased, *others))
        rest = [Prompt(p.id, " ".join(p.text.replace(p.concept, "").split()), p.seed, p.split) for p in prompts]

        def seen(scale: float, which: Tensor) -> tuple[Tensor, Tensor]:
            with self.inhibited(model, inhibitors, scale):
                images = drawn(model, [prompts[i] for i in which], Sampler("ddim", self.ddim_steps, self.guidance))
            scores = verdicts.check(judge, judge.score(images, [rest[i] for i in which]), len(which))
            if any(
                np.isnan(scores[key]).any() for key in ("texts", "own")
            ):  # NaN would pass for an image without the concept
                raise ErasebenchError("gie: CLIP gives no verdict on a picture that the fit is to learn from")
            chances = (100 * torch.tensor(scores["texts"])).softmax(1)[:, : len(erased)].sum(1)
            return chances.float(), torch.tensor(scores["own"]).float()

        return search(self.scales, seen, len(prompts), self.shown, self.floor)

    def train(
        self, model: Model, names: Sequence[str], prompts: Sequence[Prompt], labels: Tensor, seed: int
    ) -> dict[str, Tensor]:
        """Train the adapter and return its weights.

        Inputs: maps' means of a concept's tokens in its own prompts (of all tokens in a caption). Targets: w.
        """
        inhibitors = Inhibitors.of(model, names, self.near)
        rows, aims = [], []
        with torch.no_grad(), self.inhibited(model, inhibitors, 0.0):
            for i in range(0, len(prompts), 64):
                part = prompts[i : i + 64]
                context, z = model.encode([p.text for p in part]), model.noise([p.seed for p in part])
                look = lambda rows, c=context, z=z: probe(model, c.select(rows), z[rows], inhibitors)
                seen = torch.cat(in_slices(model, "probe", look, len(part), at_once(z.shape, UNGRAPHED)))
                for prompt, row, label in zip(part, seen, labels[i : i + 64].tolist(), strict=True):
                    own = inhibitors.owner == names.index(prompt.concept) if prompt.concept else slice(None)
                    rows.append(row[own])
                    aims.append(torch.full((len(rows[-1]), 1), label, device=row.device, dtype=row.dtype))
        rows, aims = torch.cat(rows), torch.cat(aims)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapter = network(rows.shape[1]).to(rows)
        optimiser = torch.optim.Adam(adapter.parameters(), lr=self.lr)
        for _ in range(self.epochs):
            loss = F.mse_loss(adapter(rows), aims)
            optimiser.zero_grad(set_to_none=True)
            checked(loss, "gie").backward()
            optimiser.step()
        return {name: weight.detach().cpu().contiguous() for name, weight in adapter.state_dict().items()}


def search(
    scales: Sequence[float],
    seen: Callable[[float, Tensor], tuple[Tensor, Tensor]],
    count: int,
    most: float,
    floor: float,
) -> Tensor:
    """Return the label [count] of each prompt.

    It is the first of the descending scales at which the concept is gone and the rest is kept. If there is none, it is
    the scale that shows least of the concept and most of the rest. A prompt with a label is not drawn again. seen(w,
    which [N]) -> the concept's probability and the rest's cosine, each [N].
    """
    left = torch.arange(count)
    plain = seen(0.0, left)
    labels, least = torch.zeros(count), torch.full((count,), torch.inf)
    for scale in track(scales, "gie labels"):
        if not len(left):
            break
        shown, kept = (x[left] for x in plain) if scale == 0 else seen(scale, left)
        done = (shown < most) & (kept >= plain[1][left] - floor)
        better = done | (shown - kept < least[left])
        labels[left[better]], least[left[better]] = scale, (shown - kept)[better]
        left = left[~done]
    return labels


def drawn(model: Model, prompts: Sequence[Prompt], sampler: Sampler, batch: int = 64) -> Tensor:
    """Draw images of the prompts with the current model: uint8 [N, H, W, 3]."""
    parts = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    return torch.cat(
        [sampled_images(model, [p.text for p in part], [p.seed for p in part], sampler) for part in parts]
    )


def network(inputs: int) -> nn.Sequential:
    """Build the adapter: layers -> 64 -> 32 -> 1.

    It has one input for each cross-attention layer of the model (Stable Diffusion: 16).
    """
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))


# -- the paper's injection ----------------------------------------------------------------------------------------------


class Inhibitors(NamedTuple):
    """Encoded concept prompts with their tokens and neighbours.

    hidden: prompts [K, L, D]. own: positions of the concept's own tokens [K, L]. owner: concept of each of these T
    tokens [T]. near: pairs of nearly identical concepts [K, K].
    """

    hidden: Tensor
    own: Tensor
    owner: Tensor
    near: Tensor

    @classmethod
    def of(cls, model: Model, names: Sequence[str], near: float) -> Inhibitors:
        with torch.no_grad():
            context = model.encode(list(names))
        place = torch.arange(context.ids.shape[1], device=model.device)
        own = (place > 0) & (place < context.ends[:, None])
        last = F.normalize(context.hidden[torch.arange(len(names)), context.ends], dim=1)
        close = (1 - last @ last.T < near) & ~torch.eye(len(names), dtype=torch.bool, device=model.device)
        return cls(context.hidden, own, own.nonzero()[:, 0], close)


@dataclass
class Inhibiting:
    """Processor of a cross-attention layer that adds the concepts' weighted columns.

    growth: weights [B, T]. `seen` receives the columns' means over heads and pixels [B, T]. Without growth it is plain
    attention.
    """

    inhibitors: Inhibitors

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask=None,
        temb=None,
        growth: Tensor | None = None,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        if growth is None:
            return attend(attn, hidden_states, key, value)
        columns, values = own_columns(attn, hidden_states, self.inhibitors.hidden, self.inhibitors.own)
        if seen is not None:
            seen.append(columns.mean((1, 2)))
        return attend(attn, hidden_states, key, value, (columns * growth[:, None, None]) @ values)


def own_columns(attn, hidden_states: Tensor, hidden: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns m* and values v* of the own tokens.

    hidden: prompts [K, L, D]. own: tokens [K, L]. Returns m* [B, heads, pixels, T] and v* [heads, T, width].
    """
    query = split_heads(attn, attn.to_q(hidden_states))
    key, value = split_heads(attn, attn.to_k(hidden)), split_heads(attn, attn.to_v(hidden))
    maps = (torch.einsum("bhpd,khld->bhpkl", query, key) * attn.scale).softmax(-1)
    return maps[..., own], value.transpose(0, 1)[:, own]


def probe(model: Model, context: Context, z: Tensor, inhibitors: Inhibitors) -> Tensor:
    """Return the adapter's input [B, T, layers].

    It holds the columns' means at the first step with w = 1.
    """
    seen: list[Tensor] = []
    ones = torch.ones(len(z), len(inhibitors.owner), device=z.device, dtype=z.dtype)
    model.eps(z, len(model.alphas_cumprod) - 1, context, {"attention": {"growth": ones, "seen": seen}})
    return torch.stack(seen, -1)


@dataclass(frozen=True)
class Inhibited(ClassifierFree):
    """Classifier-free guidance that inhibits the prompt's half.

    w [B, T] is fixed at the beginning of a trajectory.
    """

    inhibitors: Inhibitors | None = None
    scale: float | nn.Module = 0.0

    def begin(self, model: Model, context: Context, z: Tensor) -> dict[str, Any]:
        if isinstance(self.scale, nn.Module):
            growth = self.scale(probe(model, context, z, self.inhibitors))[..., 0]
        else:
            growth = torch.full((len(z), len(self.inhibitors.owner)), self.scale, device=z.device, dtype=z.dtype)
        return super().begin(model, context, z) | {"attention": {"growth": stronger(growth, self.inhibitors)}}

    def predictions(self, model: Model, z: Tensor, t: Tensor, context: Context, state: dict) -> tuple[Tensor, ...]:
        if state["negative"].hidden.shape[1] != context.hidden.shape[1]:
            return model.predict(z, t, state["negative"]), model.predict(z, t, context, state)
        growth = state["attention"]["growth"]
        halves = {**state, "attention": {"growth": torch.cat([torch.zeros_like(growth), growth])}}
        return super().predictions(model, z, t, context, halves)


def stronger(growth: Tensor, inhibitors: Inhibitors) -> Tensor:
    """Return growth [B, T] without the weaker of similar concepts (Eq. 11).

    growth is zero for concepts that are nearly identical to a stronger one.
    """
    count = len(inhibitors.near)
    if not inhibitors.near.any():
        return growth
    member = F.one_hot(inhibitors.owner, count).to(growth)
    strength = growth.abs() @ member / member.sum(0)
    first = torch.arange(count, device=growth.device)
    mine, theirs = strength[:, :, None], strength[:, None, :]
    beaten = (theirs > mine) | ((theirs == mine) & (first[None, :] < first[:, None]))
    left_out = (beaten & inhibitors.near).any(2)
    return growth * ~left_out[:, inhibitors.owner]


# -- the released code's edit ------------------------------------------------------------------------------------------


@dataclass
class Following:
    """Attention processor for images that follow a second image.

    Rows are [other | image] without and then with the prompt. cross: growth [B, T], and columns of the other's map that
    stay [B, L]; None in the last steps. copied: take the other's self-attention in layers with at most 16 x 16 pixels.
    """

    concept: Context
    crossing: bool

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask=None,
        temb=None,
        cross: tuple[Tensor, Tensor] | None = None,
        copied: bool = False,
    ) -> Tensor:
        context = encoder_hidden_states if self.crossing else hidden_states
        key, value = attn.to_k(context), attn.to_v(context)
        if (cross is None) if self.crossing else (not copied or hidden_states.shape[1] > 256):
            return attend(attn, hidden_states, key, value)
        query, key, value = (split_heads(attn, x) for x in (attn.to_q(hidden_states), key, value))
        read = F.scaled_dot_product_attention(query, key, value)
        quarter = len(read) // 4
        other, image = slice(2 * quarter, 3 * quarter), slice(3 * quarter, None)
        maps = (query[other] @ key[other].mT * attn.scale).softmax(-1)
        if self.crossing:
            growth, stays = cross
            own = torch.arange(self.concept.ids.shape[1], device=growth.device)[None]
            own = (own > 0) & (own < self.concept.ends[:, None])
            columns, values = own_columns(attn, hidden_states[image], self.concept.hidden, own)
            followed = (maps * stays[:, None, None]) @ value[image] + (columns * growth[:, None, None]) @ values
        else:
            followed = maps @ value[image]
        return project(attn, torch.cat([read[: 3 * quarter], followed]))


@dataclass(frozen=True)
class Beside(ClassifierFree):
    """Guidance that draws the plain prompt's image beside each image.

    Both use DDIM from the same noise. `state["other"]` holds that image's latents, its noise prediction and t of the
    previous step.
    """

    concept: Context | None = None
    scale: float = 0.0
    crossed: float = 0.8  # share of the steps, measured by t
    copied: float = 0.4

    def begin(self, model: Model, context: Context, z: Tensor) -> dict[str, Any]:
        count, length = int(self.concept.ends[0]) - 1, context.ids.shape[1]
        end = context.ends.clamp(max=length - 1 - count)
        place = torch.arange(length, device=z.device)[None]
        inserted = (place >= end[:, None]) & (place < end[:, None] + count)
        words = self.concept.ids[0, 1 : 1 + count]
        ids = torch.where(place < end[:, None], context.ids, model.tokenizer.pad_token_id)
        ids = ids.masked_scatter(inserted, words.repeat(len(ids)))
        ids = ids.masked_fill(place == end[:, None] + count, model.tokenizer.eos_token_id)
        # as in the released mapper: the prompt and its EOS, then a gap of as many columns as the concept has tokens
        stays = ~((place > end[:, None]) & (place <= end[:, None] + count))
        growth = torch.full((len(z), count), self.scale, device=z.device, dtype=z.dtype)
        return super().begin(model, context, z) | {
            "named": model.encode(ids=ids),
            "cross": (growth, stays.to(z.dtype)),
            "other": (z, None, None),
        }

    def __call__(
        self, model: Model, z: Tensor, t: Tensor, context: Context, scale: float | Tensor, state: dict
    ) -> Tensor:
        other, noise, before = state["other"]
        if noise is not None:  # DDIM's step to the current t
            now, then = (model.alphas_cumprod[x].to(z.dtype).reshape(-1, 1, 1, 1) for x in (t, before))
            other = now.sqrt() * (other - (1 - then).sqrt() * noise) / then.sqrt() + (1 - now).sqrt() * noise
        done = 1 - float(t.float().max()) / len(model.alphas_cumprod)
        attention = {"cross": state["cross"] if done < self.crossed else None, "copied": done < self.copied}
        joined = join(state["negative"], state["negative"], context, state["named"])
        t_all = t if t.ndim == 0 else t.repeat(4)
        out = model.predict(torch.cat([other, z, other, z]), t_all, joined, {"attention": attention})
        free_other, free, text_other, text = out.chunk(4)
        state["other"] = other, model.as_noise(free_other + scale * (text_other - free_other), other, t), t
        return free + scale * (text - free)
