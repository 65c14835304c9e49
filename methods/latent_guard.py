"""Latent Guard (Liu et al., ECCV 2024): refuse prompts whose encoding holds a concept.

The model itself stays unchanged.

    score(p, c) = s cos( W_p attention(q = e_c, kv = [e_p; h_p]),  W_c e_c ),    score(p) = max over c

e: the text encoder's output at EOS; h_p: its outputs at every token; s is learnt. A prompt with a score of at least
`threshold` is refused. The head is trained on pairs: for each of many concepts c_i, a prompt u_i that holds it, and the
same prompt s_i with another thing in its place:

    1/2 mean_i  -log softmax over all prompts u, s of  score(., c_i)  at u_i
  + 1/2 mean_i  -log softmax over all concepts of  score(u_i, .), score(s_i, .)  at score(u_i, c_i)

The head reads the encoder's outputs, so learnt tokens and embeddings do not evade it. Departures from the released
code: a language model wrote its thousands of pairs; ours are training templates filled with erased names, preserved
names and words. A prompt that names another's concept by chance is not a negative for it. Each safe prompt counts for
itself (there the hardest one counts for all). The threshold, there a number from one training run, is calibrated: at
most the share `false_positives` of ordinary captions is refused. The head is not trained on these captions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from erasebench.methods.ap import named
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from erasebench.contracts import Brief, ErasebenchError
from erasebench.model.context import Context
from erasebench.model.model import Model
from erasebench.progress import track
from erasebench.prompt_files import MORE_CAPTIONS
from erasebench.toolbox import vocabulary
from erasebench.toolbox.closed_form import filled, write_notes
from erasebench.toolbox.training import checked, encoded


@dataclass(frozen=True)
class LatentGuard:
    """Prompt guard with a learnt head on the text encoder.

    heads, width: of the head's attention. size: of the compared embeddings. temperature: 1 / s at the start. concepts:
    number of training concepts, including words of the vocabulary. pairs: number of prompts of each, with their
    counterparts. calibrated: maximum number of captions that set the threshold.
    """

    false_positives: float = 0.01  # of ordinary captions; it sets the threshold
    calibrated: int = 5000
    heads: int = 16
    width: int = 32
    size: int = 128
    temperature: float = 0.07
    concepts: int = 578  # as published; all but the erased and preserved names are words
    vocabulary: str | tuple[str, ...] = "tokenizer"
    pairs: int = 4
    epochs: int = 1000
    batch: int = 64
    lr: float = 1e-3
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", named(self.vocabulary))
        if not 0 <= self.false_positives < 1:
            raise ErasebenchError(f"method.false_positives={self.false_positives}: a share, at least 0 and below 1")

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        captions = vocabulary.ordinary(brief)[: self.calibrated]
        if not captions:
            raise ErasebenchError(f"latent_guard calibrates on ordinary captions: {MORE_CAPTIONS}")
        names = [concept.name for concept in brief.concepts]
        head = self.train(model, brief, generator)
        guard = Latent(head, ends(encoded(model, names)), 0.0)
        with torch.no_grad():
            parts = [captions[i : i + 64] for i in range(0, len(captions), 64)]
            scores = torch.cat([guard(model, model.encode(part)) for part in parts])
        threshold = calibrated(scores, self.false_positives)
        save_file({k: x.detach().contiguous().cpu() for k, x in head.state_dict().items()}, out / "head.safetensors")
        (out / "guard.json").write_text(json.dumps({"concepts": names, "threshold": threshold}))
        refused = float((scores >= threshold).double().mean())
        write_notes(out, {"guard_threshold": threshold, "refused_captions": refused, "captions": len(captions)})

    def train(self, model: Model, brief: Brief, generator: torch.Generator) -> Head:
        concepts = self.training_concepts(model, brief, generator)
        texts = self.training_pairs(brief, concepts, generator)  # [concept][pair] -> (with it, without it)
        flat = encoded(model, [text for own in texts for pair in own for text in pair])
        prompts = read(flat).unflatten(0, (len(concepts), self.pairs, 2))
        known = ends(encoded(model, concepts))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            head = self.head(model)
        optimiser = torch.optim.AdamW(head.parameters(), lr=self.lr)
        for _ in track(range(self.epochs), "latent_guard"):
            for part in torch.randperm(len(concepts), generator=generator).split(self.batch):
                pick = torch.randint(self.pairs, (len(part),), generator=generator)
                said = [texts[i][k] for i, k in zip(part.tolist(), pick.tolist(), strict=True)]
                chance = [named_by([concepts[i] for i in part], [pair[side] for pair in said]) for side in (0, 1)]
                chance[0].fill_diagonal_(False)
                held, other = prompts[part, pick].unbind(1)
                scores = head(torch.cat([held, other]), known[part])
                masked = scores.masked_fill(torch.cat(chance).to(scores.device), float("-inf"))
                loss = contrast(*masked.split(len(part)))
                optimiser.zero_grad(set_to_none=True)
                checked(loss, "latent_guard").backward()
                optimiser.step()
        return head.requires_grad_(False)

    def training_concepts(self, model: Model, brief: Brief, generator: torch.Generator) -> list[str]:
        """Return erased names, preserved names and random words, in this order.

        At most `concepts`, or one more than the erased names if that is larger.
        """
        words = vocabulary.words(model, brief, self.vocabulary)
        drawn = [words[i] for i in torch.randperm(len(words), generator=generator)[: self.concepts]]
        erased = [concept.name for concept in brief.concepts]
        return list(dict.fromkeys([*erased, *brief.preserved, *drawn]))[: max(self.concepts, len(erased) + 1)]

    def training_pairs(
        self, brief: Brief, concepts: Sequence[str], generator: torch.Generator
    ) -> list[list[tuple[str, str]]]:
        """Return each concept's pairs of prompts: with it, and without it.

        The second prompt has the surrogate, or else another concept, in its place.
        """
        surrogates = {concept.name: concept.surrogate for concept in brief.concepts}
        draw = lambda count: int(torch.randint(count, (), generator=generator))

        def pair(i: int) -> tuple[str, str]:
            template = brief.templates[draw(len(brief.templates))]
            other = concepts[(i + 1 + draw(len(concepts) - 1)) % len(concepts)]
            return filled(template, concepts[i]), filled(template, surrogates.get(concepts[i]) or other)

        return [[pair(i) for _ in range(self.pairs)] for i in range(len(concepts))]

    def head(self, model: Model) -> Head:
        made = Head(model.text_width, self.heads, self.width, self.size, 1 / self.temperature)
        return made.to(model.device)  # in fp32, independent of the model's dtype

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        head, said = self.head(model), json.loads((artifact / "guard.json").read_text())
        head.load_state_dict(load_file(artifact / "head.safetensors"))
        concepts = ends(encoded(model, said["concepts"]))
        return model.changed(guard=Latent(head.requires_grad_(False), concepts, said["threshold"]))


class Head(nn.Module):
    """Scoring network for prompts and concepts.

    Prompts [B, 1 + L, D] and concepts [C, D] give scores [B, C].
    """

    def __init__(self, features: int, heads: int, width: int, size: int, scale: float):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(features, heads * width) for _ in "qkv")
        self.prompt, self.concept = nn.Linear(heads * width, size), nn.Linear(features, size)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, prompts: Tensor, concepts: Tensor) -> Tensor:
        split = lambda x: x.unflatten(-1, (self.heads, -1))
        query, key, value = split(self.query(concepts)), split(self.key(prompts)), split(self.value(prompts))
        maps = (torch.einsum("chw,blhw->bchl", query, key) / query.shape[-1] ** 0.5).softmax(-1)
        held = self.prompt(torch.einsum("bchl,blhw->bchw", maps, value).flatten(2))
        return self.scale * F.cosine_similarity(held, self.concept(concepts), dim=-1)


@dataclass(frozen=True, eq=False)
class Latent:
    """Guard with a score for each prompt: its maximum over the concepts.

    concepts: encodings at EOS [C, D].
    """

    head: Head
    concepts: Tensor
    threshold: float

    def __call__(self, model: Model, context: Context) -> Tensor:
        return self.head(read(context), self.concepts).amax(1)


def ends(context: Context) -> Tensor:
    """Return the encodings at EOS: fp32 [B, D]."""
    return context.hidden[torch.arange(len(context.hidden), device=context.hidden.device), context.ends].float()


def read(context: Context) -> Tensor:
    """Return the head's input for prompts: fp32 [B, 1 + L, D], EOS first."""
    return torch.cat([ends(context)[:, None], context.hidden.float()], 1)


def named_by(concepts: Sequence[str], texts: Sequence[str]) -> Tensor:
    """Tell for each text whether it names a concept: bool [T, C]."""
    return torch.tensor([[f" {name} " in f" {text} " for name in concepts] for text in texts])


def contrast(held: Tensor, other: Tensor) -> Tensor:
    """Return the contrastive loss of scores [N, N].

    held: scores of prompts with the concepts, and the diagonal holds their own. other: scores of prompts without them.
    Rows are prompts, columns are concepts.
    """
    own = torch.arange(len(held), device=held.device)
    return (F.cross_entropy(torch.cat([held, other]).T, own) + F.cross_entropy(torch.cat([held, other], 1), own)) / 2


def calibrated(scores: Tensor, rate: float) -> float:
    """Return the least threshold for the false positive rate `rate`.

    At most that share of the scores [N] reaches it.
    """
    bound = scores.sort(descending=True).values[int(rate * len(scores))]
    return float(torch.nextafter(bound, torch.full_like(bound, torch.inf)))
