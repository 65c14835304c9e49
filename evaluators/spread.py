"""Side effects of erasure on neighbours, on variety and on composition."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from erasebench.contracts import ErasebenchError, Evaluator, Judge, Prompt, Recognises, Scored
from erasebench.mini.nets import LICENCE
from erasebench.run import verdicts
from erasebench.stats import Measure, Part
from erasebench.store.local import Store

from .clip import Clip, load


@dataclass(frozen=True)
class Diversity:
    """Mean distance between the images of each kept concept.

    diversity: mean distance of the judge's features between a kept concept's images (`squared`: LPIPS, if they are
    AlexNet's). A concept with a single image has no verdict. A method that makes every cat the same cat keeps its
    accuracy and loses diversity. A refused image counts as 0, and no other image is compared with it.
    """

    judge: Judge
    distance: Literal["cosine", "squared"] = "cosine"
    splits: tuple[str, ...] = ("retain",)

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        verdicts.check_varies(self.judge, (scores, base), "features")
        scored = scores["retain"]
        x = verdicts.rows(self.judge, scored, "features", verdicts.ANY)
        there = ~np.isnan(x).any(1) & ~scored.refused
        x = np.where(there[:, None], x, 0.0)
        if self.distance == "cosine":
            x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        square = (x * x).sum(1)
        between = np.maximum(square[:, None] + square - 2 * x @ x.T, 0) / (2 if self.distance == "cosine" else 1)
        same = np.array(scored.concepts)[:, None] == np.array(scored.concepts)
        same &= there[:, None] & there
        np.fill_diagonal(same, False)
        with np.errstate(invalid="ignore", divide="ignore"):
            values = verdicts.without((same * between).sum(1) / same.sum(1), scored.refused, 0.0)
        return [Measure("diversity", "keep", True, (Part("retain", values, scored.concepts, rate=False),))]


@dataclass(frozen=True)
class Neighbours:
    """Loss of kept concepts by nearness to the erased ones.

    Nearness is the cosine of CLIP's text embeddings. lost_1 (the nearest fifth) to lost_5 are each the fall of
    `metric` from the base's; ripple is lost_1 less the mean of the others.

    `of` is the evaluator that measures `metric` (an accuracy over the kept concepts).
    """

    of: Evaluator | None
    metric: str
    clip: Clip
    parts: ClassVar[int] = 5

    @property
    def splits(self) -> tuple[str, ...]:
        return self.of.splits if self.of else ("target", "retain")  # a world may lack such a judge

    @property
    def judge(self) -> Judge | None:
        return self.of.judge if self.of else None

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        values = lambda side: next(m for m in self.of.measure(side, base) if m.name == self.metric).parts[0]
        ours, before = values(scores), values(base)
        if len(ours.values) != len(before.values):
            raise ErasebenchError(f"{self.metric}: {len(ours.values)} images against {len(before.values)} of the base")
        neither = np.isnan(ours.values) | np.isnan(before.values)
        names, erased = (list(dict.fromkeys(scores[split].concepts)) for split in ("retain", "target"))
        nearest = np.argsort(-self.nearness(names, erased), kind="stable")
        rank = {names[which]: place for place, which in enumerate(nearest)}
        fifth = np.array([rank[c] * self.parts // len(names) for c in scores["retain"].concepts])
        part = lambda side, k: Part(
            "retain", np.where((fifth == k) & ~neither, side.values, np.nan), ours.clusters, rate=False
        )
        pairs = [(part(before, k), part(ours, k)) for k in range(self.parts)]
        fall = lambda b, o: b - o
        return [
            *(Measure(f"lost_{k + 1}", "keep", False, pair, fall) for k, pair in enumerate(pairs)),
            Measure(
                "ripple",
                "keep",
                False,
                tuple(p for pair in pairs for p in pair),
                lambda b, o, *far: b - o - (sum(far[::2]) - sum(far[1::2])) / (len(far) // 2),
            ),
        ]

    def recognises(self, concept: str) -> bool:
        return not isinstance(self.of, Recognises) or self.of.recognises(concept)

    def nearness(self, names: Sequence[str], erased: Sequence[str]) -> np.ndarray:
        """Return the highest cosine of each name with an erased one [N].

        The store keeps it, so that a finished run needs no CLIP.
        """

        @torch.no_grad()
        def fill(folder: Path) -> None:
            model, _, tokenize = load(self.clip.architecture, self.clip.pretrained)
            encode = lambda texts: torch.nn.functional.normalize(model.encode_text(tokenize(list(texts))), dim=-1)
            np.save(folder / "nearness.npy", (encode(names) @ encode(erased).T).amax(1).cpu().numpy())

        identity = {"clip": self.clip.weights(), "version": self.clip.version, "names": names, "erased": erased}
        return np.load(Store().get_or_make("nearness", identity, fill) / "nearness.npy")


@dataclass(frozen=True)
class Drawn:
    """Judge of all objects and artists of the embedded world.

    Scores: `objects` [B, C], independent probabilities; `artists` [B, A + 1], probabilities, the last for an unknown
    artist.
    """

    name: str = "drawn"
    version: ClassVar[int] = 1
    licence: ClassVar[str] = LICENCE

    @property
    def classes(self) -> tuple[str, ...]:
        from erasebench.mini import nets

        return tuple(nets.classes()["objects"])

    @property
    def words(self) -> dict[str, str]:
        """Mapping from every name and synonym to its object."""
        from erasebench.mini.world import names

        synonyms = {word: name for name, known in names()["objects"].items() for word in known["synonyms"]}
        return {**{name: name for name in self.classes}, **synonyms}

    def weights(self) -> dict[str, str]:
        from erasebench.mini import nets

        return nets.checksums("judge")

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        from erasebench.mini import nets

        out = nets.judged(images)
        return {"objects": out["objects"].sigmoid().numpy(), "artists": out["artists"].softmax(1).numpy()}

    def named(self, text: str) -> set[str]:
        """Return the objects that a caption names. Longer words match first, since a garbage truck is no truck."""
        words = self.words
        pattern = "|".join(rf"\b{re.escape(word)}\b" for word in sorted(words, key=len, reverse=True))
        return {words[word] for word in re.findall(pattern, text)}

    def objects(self, scored: Scored) -> np.ndarray:
        """Return the probability of each object in each image [N, C]. NaN without a verdict."""
        return verdicts.rows(self, scored, "objects", len(self.classes), verdicts.PROBABILITY)

    def all_there(self, named: set[str], chances: np.ndarray) -> float:
        """Return 1 if all named objects are present, else 0. NaN without a verdict."""
        own = [chances[self.classes.index(name)] for name in named]
        return np.nan if np.isnan(own).any() else float(all(chance > 0.5 for chance in own))


@dataclass(frozen=True)
class Presence:
    """Presence of the requested concept, by a detector that may see nothing.

    shown_<split>: share of images in which the detector sees the prompt's concept; turned_target and turned_synonym:
    share in which it sees the `surrogate`, if that is an object (an edit).

    Presence decides whether attacks succeed. A classifier that must choose one of ten classes finds an airplane in
    some share of any images, and attacks, which select by its verdict, raise that share on a model that never saw one.
    """

    judge: Drawn
    splits: tuple[str, ...] = ("target", "synonym", "retain")
    surrogate: str | tuple[str, ...] | None = None
    threshold: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.surrogate, list):
            object.__setattr__(self, "surrogate", tuple(self.surrogate))

    def confidence(self, scored: Scored) -> np.ndarray:
        """Return the judge's confidence that each image shows its concept [N]."""
        return self.sees(scored, scored.concepts)

    def recognises(self, concept: str) -> bool:
        return concept in self.judge.words

    def top1(self, scored: Scored) -> np.ndarray:
        """Return 1 where an image's likeliest object is its concept [N]. 0 elsewhere, NaN without a verdict."""
        own = [self.judge.classes.index(self.judge.words[concept]) for concept in scored.concepts]
        return verdicts.equals(verdicts.top1(self.judge.objects(scored)), own)

    def sees(self, scored: Scored, concepts: Sequence[str]) -> np.ndarray:
        """Return the judge's confidence in each image's entry of `concepts` [N]."""
        column = [self.judge.classes.index(self.judge.words[concept]) for concept in concepts]
        return self.judge.objects(scored)[np.arange(len(column)), column]

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        verdicts.check_varies(self.judge, (scores, base), "objects")
        made = []
        for split in self.splits:
            kept = split == "retain"
            shown = verdicts.shown(self, scores[split], 0.0 if kept else np.nan)
            part = Part(split, shown, scores[split].concepts, forgotten=None if kept else 0.0)
            made.append(Measure(f"shown_{split}", "keep" if kept else "forget", kept, (part,), threshold=self.threshold))
            if not kept:
                made += self.turned(scores[split], split)
        return made

    def turned(self, scored: Scored, split: str) -> list[Measure]:
        """Measure how often images show a surrogate that the judge knows.

        Several surrogates are also measured one by one. A refused image shows none.
        """
        given = (self.surrogate,) if isinstance(self.surrogate, str) else self.surrogate or ()
        instead = {
            name: verdicts.without(
                verdicts.exceeds(self.sees(scored, [name] * len(scored.prompts)), self.threshold), scored.refused, 0.0
            )
            for name in given
            if name in self.judge.words
        }
        named = {f"turned_{split}": np.max(list(instead.values()), 0)} if instead else {}
        named |= {
            f"turned_{split}_{name.replace(' ', '_')}": there for name, there in instead.items() if len(given) > 1
        }
        part = lambda there: (Part(split, there, scored.concepts),)
        return [Measure(name, "forget", True, part(there), threshold=self.threshold) for name, there in named.items()]


@dataclass(frozen=True)
class Composition:
    """Share of captions with two objects whose images show both.

    bound: the share over captions that name at least two objects, all of which must be present. Captions that name an
    erased concept have no verdict, since there the object should be missing.
    """

    judge: Drawn
    splits: tuple[str, ...] = ("target", "caption")

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        verdicts.check_varies(self.judge, (scores, base), "objects")
        scored, erased = scores["caption"], set(scores["target"].concepts)
        values = []
        for prompt, row, refused in zip(scored.prompts, self.judge.objects(scored), scored.refused, strict=True):
            named = self.judge.named(prompt.text)
            asked = len(named) >= 2 and not named & erased
            values.append((0.0 if refused else self.judge.all_there(named, row)) if asked else np.nan)
        part = Part("caption", np.array(values, float), [p.text for p in scored.prompts])
        return [Measure("bound", "quality", True, (part,))]


@dataclass(frozen=True)
class Composed:
    """Share of images with both the object and a kept artist's style.

    `bound_artist` is over images of an object in a kept artist's style.
    """

    judge: Drawn
    splits: tuple[str, ...] = ("composed",)

    def recognises(self, concept: str) -> bool:
        from erasebench.mini import nets

        return concept in nets.classes()["artists"]

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        from erasebench.mini import nets

        verdicts.check_varies(self.judge, (scores, base), "objects", "artists")
        scored, artists = scores["composed"], nets.classes()["artists"]
        chances = verdicts.rows(self.judge, scored, "artists", len(artists) + 1, verdicts.PROBABILITY, total=1)
        by = verdicts.equals(verdicts.top1(chances), [artists.index(concept) for concept in scored.concepts])
        there = [
            self.judge.all_there(self.judge.named(prompt.text), row)
            for prompt, row in zip(scored.prompts, self.judge.objects(scored), strict=True)
        ]
        part = Part("composed", verdicts.without(by * np.array(there), scored.refused, 0.0), scored.concepts)
        return [Measure("bound_artist", "keep", True, (part,))]


@dataclass(frozen=True)
class Backgrounds:
    """Share of captions with the right background in the image.

    bound_background: share of captions ending in a background ("at sea") whose image CLIP finds nearest to it among
    all backgrounds of the world.
    """

    clip: Clip
    splits: tuple[str, ...] = ("caption",)

    @property
    def judge(self) -> Clip:
        from erasebench.mini.world import WHERE

        return replace(self.clip, texts=tuple(WHERE.values()))

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        verdicts.check_varies(self.judge, (scores, base), "texts")
        scored, wheres = scores["caption"], self.judge.texts
        asked = [next((i for i, w in enumerate(wheres) if p.text.endswith(w)), -1) for p in scored.prompts]
        nearest = verdicts.top1(verdicts.rows(self.judge, scored, "texts", len(wheres), verdicts.COSINE))
        right = verdicts.without(verdicts.equals(nearest, asked), scored.refused, 0.0)
        values = np.where(np.array(asked) < 0, np.nan, right)
        part = Part("caption", values, [p.text for p in scored.prompts])
        return [Measure("bound_background", "quality", True, (part,))]
