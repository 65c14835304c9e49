"""Candidate words of a world, and the search for the worst one.

An erasure would hurt that word most (AP and AGE, Bui et al.).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from ..contracts import Brief, ErasebenchError
from ..model.context import Context, join
from ..model.model import Model
from ..prompt_files import MORE_CAPTIONS
from .closed_form import filled


def words(model: Model, brief: Brief, source: str | Sequence[str]) -> list[str]:
    """Return the candidate words of a source.

    The source is the `tokenizer`'s whole words, the words of the brief's `captions`, or a list as given. Of the
    first two only words of at least three letters a to z are taken. The erased names, the synonyms in the brief (the
    package's tasks tell none), the words of either, and words that the safety gate refuses are left out. Raises
    ErasebenchError if nothing remains.
    """
    found = source
    if source == "tokenizer":
        found = [token.removesuffix("</w>") for token in model.tokenizer.get_vocab() if token.endswith("</w>")]
    elif source == "captions":
        found = re.findall(r"[a-z]+", " ".join(brief.captions).lower())
    if isinstance(source, str):
        found = sorted({word for word in found if re.fullmatch(r"[a-z]{3,}", word)})
    erased = [text.lower() for concept in brief.concepts for text in (concept.name, *concept.synonyms)]
    forgotten = {part for text in erased for part in (text, *text.split())}
    left = [word for word in dict.fromkeys(found) if word.lower() not in forgotten and model.allows(word)]
    if not left:
        raise ErasebenchError(
            f"vocabulary={source}: no word but those to erase; give a list, or a file with one a line"
        )
    return left


def ordinary(brief: Brief) -> list[str]:
    """Return the brief's captions without any erased name or synonym."""
    names = [text for concept in brief.concepts for text in (concept.name, *concept.synonyms)]
    erased = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b", re.IGNORECASE)
    return [caption for caption in dict.fromkeys(brief.captions) if not erased.search(caption)]


def kept_prompts(brief: Brief, count: int, generator: torch.Generator) -> list[str]:
    """Return at most `count` prompts of the retain set.

    They alternate between a preserved name in a training template and an ordinary caption, as far as there are both.
    Raises ErasebenchError if there is neither.
    """
    shuffled = lambda texts: [texts[i] for i in torch.randperm(len(texts), generator=generator)]
    named = shuffled([filled(t, name) for t in brief.templates for name in brief.preserved])
    both = [text for pair in zip_longest(named, shuffled(ordinary(brief))) for text in pair if text is not None]
    if not both:
        raise ErasebenchError(f"nothing is named that is kept: {MORE_CAPTIONS}")
    return both[:count]


@torch.no_grad()
def distances(model: Model, texts: Sequence[str], name: str, batch: int = 256) -> Tensor:
    """Return each text's Euclidean distance from the name, fp64 [N].

    The distance is between whole encodings (all L x D numbers).
    """
    centre = model.encode([name]).hidden.double()
    parts = [texts[i : i + batch] for i in range(0, len(texts), batch)]
    return torch.cat([(model.encode(part).hidden.double() - centre).flatten(1).norm(dim=1) for part in parts]).cpu()


def candidates(model: Model, texts: Sequence[str], name: str, nearest: int, centres: int) -> list[str]:
    """Return the `nearest` texts to a name, thinned to `centres`.

    1-D K-means on their distance; of each cluster the text closest to its mean (AP's released code). Nearest first;
    never one twice.
    """
    far = distances(model, texts, name)
    order = far.argsort(stable=True)[:nearest]
    if centres >= len(order):
        return [texts[i] for i in order]
    values, free, picked = far[order], list(range(len(order))), []
    for mean in means(values, centres).tolist():
        picked.append(free.pop(int((values[free] - mean).abs().argmin())))
    return [texts[order[i]] for i in sorted(picked)]


def means(values: Tensor, count: int, rounds: int = 100) -> Tensor:
    """Return ascending cluster means of sorted numbers [N].

    Uses Lloyd's algorithm, starting from their quantiles.
    """
    centre = values[((torch.arange(count) + 0.5) * len(values) / count).long()]
    for _ in range(rounds):
        label = torch.bucketize(values, (centre[1:] + centre[:-1]) / 2)
        total = torch.zeros(count, dtype=values.dtype).index_add_(0, label, values)
        size = torch.bincount(label, minlength=count)
        moved = torch.where(size > 0, total / size.clamp(min=1), centre)
        if torch.equal(moved, centre):
            break
        centre = moved
    return centre


class Choice:
    """Distributions pi over candidate words, optimised by Adam.

    Each of N concepts has a distribution over its R candidate words, uniform at first.

    draw() mixes the `mixed` likeliest words of a Gumbel-softmax sample (Jang et al., 2017): with 1 it is a word as
    it stands, and gradients pass straight through to pi. `contexts` are the encodings of all words, each once.
    """

    def __init__(
        self,
        model: Model,
        lists: Sequence[Sequence[str]],
        generator: torch.Generator,
        temperature: float,
        mixed: int = 1,
        lr: float = 1e-2,
    ):
        self.lists, self.generator, self.temperature, self.mixed = lists, generator, temperature, mixed
        known = list(dict.fromkeys(word for some in lists for word in some))
        parts = [known[i : i + 256] for i in range(0, len(known), 256)]
        with torch.no_grad():
            self.contexts = join(*(model.encode(part) for part in parts))
        self.index = torch.tensor([[known.index(word) for word in some] for some in lists])
        self.logits = torch.zeros(self.index.shape, requires_grad=True)
        self.optimiser = torch.optim.Adam([self.logits], lr=lr)

    def draw(self, which: Tensor) -> tuple[Context, Tensor]:
        """Draw for the concepts number `which` [B] -> (context, word numbers [B]).

        The numbers are the indices in `contexts` of the likeliest words.
        """
        uniform = torch.rand(len(which), self.logits.shape[1], generator=self.generator).clamp(1e-20, 1 - 1e-7)
        soft = ((self.logits[which] - (-uniform.log()).log()) / self.temperature).softmax(1)
        top, place = soft.topk(min(self.mixed, soft.shape[1]), 1)
        if self.mixed == 1:  # straight-through estimator: the value of one word, the gradient of all
            weights = soft + (torch.zeros_like(soft).scatter(1, place, 1.0) - soft).detach()
        else:
            weights = torch.zeros_like(soft).scatter(1, place, top / top.sum(1, keepdim=True))
        number = self.index[which]
        weights = weights.to(self.contexts.hidden)
        mix = lambda rows: torch.einsum("br,br...->b...", weights, rows[number])
        picked = number.gather(1, place[:, :1]).flatten()
        drawn = self.contexts.select(picked)
        pooled = None if drawn.pooled is None else mix(self.contexts.pooled)
        return drawn._replace(hidden=mix(self.contexts.hidden), pooled=pooled), picked

    def climb(self, loss: Tensor) -> None:
        """Take one step of pi towards a greater loss.

        Nothing else receives a gradient.
        """
        (gradient,) = torch.autograd.grad(loss, self.logits)
        self.logits.grad = -gradient
        self.optimiser.step()

    def found(self) -> list[list[tuple[str, float]]]:
        """Return each concept's words with their probabilities, the likeliest first."""
        chances = self.logits.detach().softmax(1)
        ranked = [zip(some, row.tolist(), strict=True) for some, row in zip(self.lists, chances, strict=True)]
        return [sorted(pairs, key=lambda pair: -pair[1]) for pairs in ranked]


class Free(Choice):
    """Continuous control: an embedding of no word.

    It starts at the nearest word's embedding and climbs by the sign of the gradient (PGD), kept within the box that
    the concept's candidate words span.
    """

    def __init__(self, model: Model, lists: Sequence[Sequence[str]], generator: torch.Generator, lr: float):
        super().__init__(model, lists, generator, 1.0)
        self.lr = lr
        rows = [self.contexts.hidden[index] for index in self.index]
        self.low, self.high = (
            torch.stack([bound(r) for r in rows]) for bound in (lambda r: r.amin(0), lambda r: r.amax(0))
        )
        self.embedding = torch.stack([r[0] for r in rows]).requires_grad_(True)

    def draw(self, which: Tensor) -> tuple[Context, Tensor]:
        nearest = self.index[which, 0]
        return self.contexts.select(nearest)._replace(hidden=self.embedding[which]), nearest

    def climb(self, loss: Tensor) -> None:
        (gradient,) = torch.autograd.grad(loss, self.embedding)
        with torch.no_grad():
            moved = self.embedding + self.lr * gradient.sign()
            self.embedding.copy_(moved.maximum(self.low).minimum(self.high))
