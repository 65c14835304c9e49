"""Safe-CLIP (Poppi et al., ECCV 2024): redirect unsafe inputs of a CLIP to what is safe. Its text encoder is the model's.

    l_1 (1 - cos(T(t), T0(t))) + l_2 (1 - cos(T(u), T0(t))) + l_3 N(T(t), V0(v)) + l_4 N(T(u), V0(v))

T: the pooled text in CLIP's space, with adapters of low rank in everything but the queries; T0, V0: the same before, and the image
encoder, both frozen; t: safe texts, v: their pictures, u: unsafe texts; N: the symmetric contrastive loss of a batch. Four more
losses of the paper, the same with T and V exchanged, train the image encoder. With frozen references they share no
weight with these, and no diffusion model reads that encoder: they are left out, and T is what it would be with them. (In
the released code the references are the model under training itself, with its dropout, since the adapters are put into it
in place; and it drops the gradients of all but the last batch that share a step.)

The paper's quadruplets are not public. Here u names the concept where t has its surrogate, in training templates, or
adds it to what is kept; the base draws v. What makes T of the encoder's pooled output is least squares onto CLIP's own
text features, before training: for Stable Diffusion 1.x, whose encoder is that of CLIP L/14, it is CLIP's projection, if
`pairs` are at least half as many as it is wide. All of it looks at the pooled output alone, of which the U-Net reads one
row in L.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from erasebench.evaluators.clip import Clip, load
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from erasebench.contracts import Brief, Sampler
from erasebench.model.model import Model
from erasebench.tasks import seed_of
from erasebench.toolbox.attention import LowRank
from erasebench.toolbox.closed_form import filled, write_notes
from erasebench.toolbox.training import FILE, checked, decoded, drawn, tuned
from erasebench.toolbox.vocabulary import kept_prompts

ADAPTED = r"^text_encoder\..*\.(k_proj|v_proj|out_proj|fc1|fc2)\.weight$"
PART = 64  # texts and pictures at a time, outside of training


@dataclass(frozen=True)
class SafeCLIP:
    """keep, redirect, keep_pair, redirect_pair: l_1 to l_4. rank, alpha, dropout: of the adapters. pairs: of texts; a tenth
    of them tells when to stop, after `patience` epochs without gain. guidance, ddim_steps: of their pictures."""

    pairs: int = 2000  # the paper's 165,000 are written by a language model
    keep: float = 0.1  # cosine of safe texts with what they were,
    redirect: float = 0.1  # and of unsafe ones
    keep_pair: float = 0.25  # contrastive, of safe texts with their pictures,
    redirect_pair: float = 0.25  # and of unsafe ones with the safe pictures
    logit_scale: float = 100.0
    rank: int = 16
    alpha: float = 1.0
    dropout: float = 0.1
    epochs: int = 50
    patience: int = 5
    batch: int = 128
    lr: float = 1e-3
    guidance: float = 7.5
    ddim_steps: int = 50
    clip: Clip = Clip(architecture="ViT-L-14-quickgelu")
    version: ClassVar[int] = 1

    def skip(self, model: Model) -> str:
        return "it trains one text encoder, and this model has two" if model.text_encoder_2 is not None else ""

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        unsafe, safe = zip(*text_pairs(brief, self.pairs, generator), strict=True)
        project = projection(model, self.clip, [*unsafe, *safe])
        seen = self.seen(model, safe)
        with torch.no_grad():
            reference = torch.cat([pooled(model, safe[i : i + PART]) for i in range(0, len(safe), PART)]) @ project
        adapters = untrained(model, self.rank, generator)
        optimiser = torch.optim.Adam([x for adapter in adapters.values() for x in adapter], lr=self.lr)

        def loss(which: Tensor, dropout: float) -> Tensor:
            with adapted(model, adapters, self.alpha / self.rank, dropout, generator):
                both = pooled(model, [safe[i] for i in which] + [unsafe[i] for i in which]) @ project
            return self.loss(*both.chunk(2), reference[which], seen[which])

        order, tenth = torch.randperm(len(safe), generator=generator), max(1, len(safe) // 10)
        held, rest = order[:tenth], order[tenth:]
        best, losses, waited = merged(model, adapters, self.alpha / self.rank), [], 0
        for _ in tqdm(range(self.epochs), "safe_clip", disable=None, delay=2):
            for which in rest[torch.randperm(len(rest), generator=generator)].split(self.batch):
                optimiser.zero_grad(set_to_none=True)
                checked(loss(which, self.dropout), "safe_clip").backward()
                optimiser.step()
            with torch.no_grad():
                now = sum(float(loss(which, 0.0)) * len(which) for which in held.split(self.batch)) / tenth
            waited += 1
            if now < min(losses, default=float("inf")):
                best, waited = merged(model, adapters, self.alpha / self.rank), 0
            losses.append(now)
            if waited == self.patience:
                break
        save_file(best, out / FILE)
        write_notes(out, {"epochs": len(losses), "held_out_loss": min(losses)})

    def seen(self, model: Model, texts: Sequence[str]) -> Tensor:
        """CLIP's features [N, F] of a picture of each text, drawn by the base."""
        encoder, preprocess, _ = load(self.clip.architecture, self.clip.pretrained)
        seeds = [seed_of("safe_clip", i) for i in range(len(texts))]
        images = decoded(model, drawn(model, texts, seeds, Sampler("ddim", self.ddim_steps, self.guidance)))
        with torch.no_grad():
            found = [encoder.encode_image(preprocess(part)) for part in images.split(PART)]
        return torch.cat(found).to(model.device, model.dtype)

    def loss(self, safe: Tensor, unsafe: Tensor, reference: Tensor, seen: Tensor) -> Tensor:
        """Of features [B, F]: texts safe and unsafe, the safe ones before training, their pictures."""
        away = lambda a: (1 - F.cosine_similarity(a, reference)).mean()
        apart = lambda a: contrastive(a, seen, self.logit_scale)
        return (
            self.keep * away(safe)
            + self.redirect * away(unsafe)
            + self.keep_pair * apart(safe)
            + self.redirect_pair * apart(unsafe)
        )

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)


def text_pairs(brief: Brief, count: int, generator: torch.Generator) -> list[tuple[str, str]]:
    """At most `count` (unsafe, safe) texts: training templates with a concept and with its surrogate, at most half of all; and
    what is kept, with a concept added and without."""
    named = [(filled(t, c.name), filled(t, c.surrogate)) for t in brief.templates for c in brief.concepts]
    named = [named[i] for i in torch.randperm(len(named), generator=generator)[: count // 2]]
    kept = kept_prompts(brief, count - len(named), generator)
    added = [brief.concepts[i % len(brief.concepts)].name for i in range(len(kept))]
    return named + [(f"{text} and {name}", text) for text, name in zip(kept, added, strict=True)]


def pooled(model: Model, texts: Sequence[str]) -> Tensor:
    """The encoder's outputs at EOS [B, D]. What follows all EOS of a batch does not reach them, and is not computed."""
    ids = model.tokenize(texts)
    length = int((ids == model.tokenizer.eos_token_id).int().argmax(1).max()) + 1
    context = model.encode(ids=ids[:, :length])
    return context.hidden[torch.arange(len(ids), device=ids.device), context.ends]


@torch.no_grad()
def projection(model: Model, clip: Clip, texts: Sequence[str]) -> Tensor:
    """[D, F]: least squares from the base's pooled texts to CLIP's features of them, of all that fit the least."""
    encoder, _, tokenize = load(clip.architecture, clip.pretrained)
    parts = [list(texts[i : i + PART]) for i in range(0, len(texts), PART)]
    ours = torch.cat([pooled(model, part) for part in parts]).double()
    theirs = torch.cat([encoder.encode_text(tokenize(part)) for part in parts]).to(ours)
    return (torch.linalg.pinv(ours) @ theirs).to(model.dtype)


def contrastive(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Symmetric InfoNCE of features [B, F] that belong together row by row (CLIP's own loss)."""
    logits = scale * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    own = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def untrained(model: Model, rank: int, generator: torch.Generator) -> dict[str, LowRank]:
    """An adapter for every projection, which changes nothing yet; weight -> adapter."""
    made = {}
    for name in model.names(ADAPTED):
        height, width = model.weight(name).shape
        down = (2 * torch.rand(1, rank, width, generator=generator) - 1) / width**0.5
        parts = (down, torch.zeros(1, height, rank))
        made[name] = LowRank(*(x.to(model.device, model.dtype).requires_grad_(True) for x in parts))
    return made


@contextmanager
def adapted(
    model: Model, adapters: dict[str, LowRank], scale: float, dropout: float, generator: torch.Generator
) -> Iterator[None]:
    """The text encoder with the adapters beside its projections; their inputs are dropped out."""

    def beside(module, inputs, output, adapter: LowRank) -> Tensor:
        x = inputs[0]
        if dropout:
            x = x * (torch.rand(x.shape, generator=generator) >= dropout).to(x) / (1 - dropout)
        return output + scale * adapter(x)

    handles = []
    for name, adapter in adapters.items():
        module = model.text_encoder.get_submodule(name.removeprefix("text_encoder.").removesuffix(".weight"))
        hook = lambda *args, adapter=adapter: beside(*args, adapter)
        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def merged(model: Model, adapters: dict[str, LowRank], scale: float) -> dict[str, Tensor]:
    """The projections with their adapters in them."""
    sums = {name: model.weight(name) + scale * (x.up @ x.down)[0] for name, x in adapters.items()}
    return {name: weight.detach().contiguous().cpu() for name, weight in sums.items()}
