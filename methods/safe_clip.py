"""Safe-CLIP (Poppi et al., ECCV 2024): redirect CLIP's unsafe inputs to safe ones.

The diffusion model uses its text encoder.

    l_1 (1 - cos(T(t), T0(t))) + l_2 (1 - cos(T(u), T0(t))) + l_3 N(T(t), V0(v)) + l_4 N(T(u), V0(v))

T: the pooled text in CLIP's space, with low-rank adapters in every projection but the queries. T0, V0: the text encoder
before training and the image encoder, both frozen. t: safe texts, v: their images, u: unsafe texts. N: the symmetric
contrastive loss of a batch. The paper has four more losses, the same with T and V exchanged, to train the image
encoder. With frozen references they share no weight with these, and no diffusion model reads that encoder. They are
omitted, which leaves T unchanged. (In the released code the references are the model in training itself, with its
dropout, since the adapters are inserted in place; it also drops the gradients of all but the last batch that share a
step.)

The paper's quadruplets are not public. Here u names the concept where t has its surrogate, in training templates, or
adds it to a retained prompt; the base draws v. Before training, least squares fits the map from the encoder's pooled
output to CLIP's own text features. For Stable Diffusion 1.x, whose encoder is that of CLIP L/14, this is CLIP's
projection, if `pairs` is at least half of its width. All losses read the pooled output alone; the U-Net reads it as one
row of L.
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

from erasebench.contracts import Brief, Sampler
from erasebench.model.model import Model
from erasebench.progress import track
from erasebench.tasks import seed_of
from erasebench.toolbox.attention import LowRank
from erasebench.toolbox.closed_form import filled, write_notes
from erasebench.toolbox.training import FILE, checked, decoded, drawn, tuned
from erasebench.toolbox.vocabulary import kept_prompts

ADAPTED = r"^text_encoder\..*\.(k_proj|v_proj|out_proj|fc1|fc2)\.weight$"
PART = 64  # texts or images at a time, outside of training


@dataclass(frozen=True)
class SafeCLIP:
    """Text encoder trained to map unsafe texts to safe ones.

    keep, redirect, keep_pair, redirect_pair: l_1 to l_4. rank, alpha, dropout: of the adapters. pairs: number of text
    pairs; a tenth of them is held out to stop training after `patience` epochs without gain. guidance, ddim_steps: of
    the images.
    """

    pairs: int = 2000  # a language model wrote the paper's 165,000
    keep: float = 0.1  # cosine of safe texts with their features before training
    redirect: float = 0.1  # cosine of unsafe texts with the same features
    keep_pair: float = 0.25  # contrastive, of safe texts with their images
    redirect_pair: float = 0.25  # contrastive, of unsafe texts with the safe images
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
        for _ in track(range(self.epochs), "safe_clip"):
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
        """Draw an image of each text with the base: CLIP's features [N, F]."""
        encoder, preprocess, _ = load(self.clip.architecture, self.clip.pretrained)
        seeds = [seed_of("safe_clip", i) for i in range(len(texts))]
        images = decoded(model, drawn(model, texts, seeds, Sampler("ddim", self.ddim_steps, self.guidance)))
        with torch.no_grad():
            found = [encoder.encode_image(preprocess(part)) for part in images.split(PART)]
        return torch.cat(found).to(model.device, model.dtype)

    def loss(self, safe: Tensor, unsafe: Tensor, reference: Tensor, seen: Tensor) -> Tensor:
        """Return the weighted sum of the four losses of features [B, F].

        safe, unsafe: of the texts. reference: of safe texts before training. seen: of their images.
        """
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
    """Return at most `count` (unsafe, safe) texts.

    Training templates with a concept and with its surrogate, at most half of all, and retained prompts with a concept
    added and without.
    """
    named = [(filled(t, c.name), filled(t, c.surrogate)) for t in brief.templates for c in brief.concepts]
    named = [named[i] for i in torch.randperm(len(named), generator=generator)[: count // 2]]
    kept = kept_prompts(brief, count - len(named), generator)
    added = [brief.concepts[i % len(brief.concepts)].name for i in range(len(kept))]
    return named + [(f"{text} and {name}", text) for text, name in zip(kept, added, strict=True)]


def pooled(model: Model, texts: Sequence[str]) -> Tensor:
    """Return the encoder's outputs at EOS [B, D].

    Positions after the last EOS of the batch do not affect them and are not computed.
    """
    ids = model.tokenize(texts)
    length = int((ids == model.tokenizer.eos_token_id).int().argmax(1).max()) + 1
    context = model.encode(ids=ids[:, :length])
    return context.hidden[torch.arange(len(ids), device=ids.device), context.ends]


@torch.no_grad()
def projection(model: Model, clip: Clip, texts: Sequence[str]) -> Tensor:
    """Fit a linear map [D, F] from the base's pooled texts.

    It maps to CLIP's features of the texts, as the least-squares solution of minimum norm.
    """
    encoder, _, tokenize = load(clip.architecture, clip.pretrained)
    parts = [list(texts[i : i + PART]) for i in range(0, len(texts), PART)]
    ours = torch.cat([pooled(model, part) for part in parts]).double()
    theirs = torch.cat([encoder.encode_text(tokenize(part)) for part in parts]).to(ours)
    return (torch.linalg.pinv(ours) @ theirs).to(model.dtype)


def contrastive(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the symmetric InfoNCE of paired features [B, F] (CLIP's own loss)."""
    logits = scale * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    own = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def untrained(model: Model, rank: int, generator: torch.Generator) -> dict[str, LowRank]:
    """Return adapters that change nothing yet: weight -> adapter."""
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
    """Put the adapters beside the text encoder's projections.

    Dropout acts on the adapters' inputs.
    """

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
    """Return the projections with the adapters added to their weights."""
    sums = {name: model.weight(name) + scale * (x.up @ x.down)[0] for name, x in adapters.items()}
    return {name: weight.detach().contiguous().cpu() for name, weight in sums.items()}
