"""Contract of an attack."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..contracts import PLACEHOLDER, Attack, Brief, Concept, DrawsImages, Found, Prompt, Scene, SharesSearch, Shot
from ..gate import refuses
from ..model.model import Model, Sampled
from ..store.local import Store
from ..toolbox.search import draw_vectors
from . import SAMPLER, Clause, Openings, disturb, gives_reason, has_text, has_version, is_frozen, is_sent, says_needs

OUTCOMES = ("", "too long", "refused", "diverged", "not in the source")
APART = 1e-3  # tolerance for a prompt's tensors when others are searched with it: networks round differently
Search = dict[int, Found]


@dataclass(frozen=True)
class Attacking:
    """Attack under examination, with a model and prompts under attack.

    The model is erased if `erases`; `folder` holds the stores.
    """

    plugin: Attack
    model: Model
    prompts: Sequence[Prompt]
    brief: Brief
    folder: Path
    erases: bool = False

    @cached_property
    def openings(self) -> Openings:
        return Openings(self.model)

    @cached_property
    def pictures(self) -> Tensor:
        with self.model.teacher() if self.erases else nullcontext():
            texts, seeds = [p.text for p in self.prompts], [p.seed for p in self.prompts]
            return self.model.sample(texts, seeds, SAMPLER).images

    @cached_property
    def queries(self) -> list[str]:
        """Prompt ids of the images that the search had judged."""
        return []

    def hit(self, sampled: Sampled, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        """Judge images without ever deciding success.

        Every search therefore runs to its end.
        """
        self.queries.extend(p.id for p in prompts)
        return np.zeros(len(prompts), bool), sampled.images.double().mean((1, 2, 3)).numpy() / 255 / 2

    def scene(self, which: Sequence[int], name: str) -> Scene:
        concepts = dict.fromkeys(p.concept for p in self.prompts)
        of = lambda concept: [i for i, p in enumerate(self.prompts) if p.concept == concept]
        known = {concept: self.pictures[of(concept)] for concept in concepts}
        return Scene(
            prompts=tuple(self.prompts[i] for i in which),
            before=np.zeros(len(which), bool),
            pictures=self.pictures[list(which)],
            known={**known, "": self.pictures},
            concepts={c.name: c for c in self.brief.concepts} or {c: Concept(c, "object") for c in concepts},
            templates=self.brief.templates,
            sampler=SAMPLER,
            seed=0,
            together=len(self.prompts),
            store=Store(self.folder / name, url=""),
            identity={"attack": self.plugin, "version": type(self.plugin).version},
            hit=self.hit,
            allows=lambda text: not refuses(text),
        )

    def search(self, name: str, which: Sequence[int] | None = None) -> list[tuple[int, Found]]:
        """Return the findings by prompt number, from a store of its own."""
        chosen = list(range(len(self.prompts)) if which is None else which)
        return [(chosen[i], found) for i, found in self.plugin.run(self.model, self.scene(chosen, name))]

    @cached_property
    def first(self) -> list[tuple[int, Found]]:
        disturb(0)
        self.queries.clear()
        return self.search("first")

    @property
    def found(self) -> Search:
        return dict(self.first)

    @property
    def shots(self) -> list[tuple[Prompt, Found, Shot]]:
        return [(self.prompts[i], found, shot) for i, found in self.first for shot in found.shots]


def differs(one: Search, other: Search, apart: float) -> str:
    """Return the first difference between the results of two searches, in words."""
    for i, found in one.items():
        if i not in other or found.shots != other[i].shots or found.outcome != other[i].outcome:
            return f"prompt {i}: other shots"
        if set(found.tensors) != set(other[i].tensors):
            return f"prompt {i}: other tensors"
        for key, values in found.tensors.items():
            same = values.shape == other[i].tensors[key].shape
            if not same or not torch.allclose(values, other[i].tensors[key], rtol=apart, atol=apart, equal_nan=True):
                return f"prompt {i}: {key} differs"
    return ""


def has_run(attacking: Attacking) -> str | None:
    return None if isinstance(attacking.plugin, Attack) else "version, access, shared, images or run is missing"


def says_what_it_sees(attacking: Attacking) -> str | None:
    access, shared = type(attacking.plugin).access, type(attacking.plugin).shared
    if not isinstance(access, tuple) or not all(isinstance(name, str) for name in access):
        return "access is no tuple of words"
    return None if isinstance(shared, bool) else "shared is neither True nor False"


def says_its_budget(attacking: Attacking) -> str | None:
    images = attacking.plugin.images
    return None if isinstance(images, int) and images >= 0 else f"images is {images!r}, no number of images"


def searches(attacking: Attacking) -> str | None:
    _ = attacking.pictures, attacking.openings
    for item in attacking.first:
        if not (isinstance(item[0], int) and isinstance(item[1], Found)):
            return f"run() gives {type(item[1]).__name__}, not (number of a prompt, Found)"
    return None


def finds_each_once(attacking: Attacking) -> str | None:
    numbers = sorted(i for i, _ in attacking.first)
    wanted = list(range(len(attacking.prompts)))
    return None if numbers == wanted else f"of prompts {wanted} it gives {numbers}"


def shows_shots(attacking: Attacking) -> str | None:
    for _, _, shot in attacking.shots:
        if not isinstance(shot.text, str) or type(shot.seed) is not int or not isinstance(shot.label, str):
            return f"a shot is of {type(shot.text).__name__}, {type(shot.seed).__name__}, {type(shot.label).__name__}"
        shot.text.encode()  # raises for lone surrogates, which are no valid text
    return None


def says_why_not(attacking: Attacking) -> str | None:
    odd = [found.outcome for found in attacking.found.values() if found.outcome not in OUTCOMES]
    if odd:
        return f"outcome {odd[0]!r} is none of {', '.join(map(repr, OUTCOMES))}"
    silent = [i for i, found in attacking.found.items() if not found.shots and not found.outcome]
    return f"prompt {silent[0]} has neither a shot nor an outcome" if silent else None


def finds_finite(attacking: Attacking) -> str | None:
    for i, found in attacking.found.items():
        for key, values in found.tensors.items():
            if not torch.isfinite(values).all():
                return f"prompt {i}: {key} is not finite"
    return None


def gives_vectors(attacking: Attacking) -> str | None:
    """Require vectors for every placeholder word.

    They have one row per token, as wide as the text encoder's embeddings.
    """
    if isinstance(attacking.plugin, DrawsImages):
        return None
    width = attacking.model.text_encoder.get_input_embeddings().weight.shape[1]
    for _, found, shot in attacking.shots:
        vectors = found.tensors.get(shot.label or "vectors")
        if PLACEHOLDER in shot.text and vectors is None:
            return f"a shot holds {PLACEHOLDER}, and there are no vectors for it"
        if PLACEHOLDER in shot.text and vectors is not None and (vectors.ndim != 2 or vectors.shape[1] != width):
            return f"vectors are {list(vectors.shape)}, expected [k, {width}]"
    return None


def keeps_budget(attacking: Attacking) -> str | None:
    budget = attacking.plugin.images
    for i, found in attacking.found.items():
        labels = [shot.label for shot in found.shots]
        most = max(map(labels.count, labels), default=0)
        judged = attacking.queries.count(attacking.prompts[i].id)
        if max(most, judged) > budget:
            return f"prompt {i}: {most} shots and {judged} images judged in the search, of images={budget}"
    return None


def passes_gate(attacking: Attacking) -> str | None:
    refused = [p for p, _, shot in attacking.shots if refuses(shot.text) and not refuses(p.text)]
    return f"prompt {refused[0].id}: a text that the safety gate refuses (ask scene.allows)" if refused else None


def repeats(attacking: Attacking) -> str | None:
    disturb(1)
    return differs(attacking.found, dict(attacking.search("again")), 0.0)


def leaves_model(attacking: Attacking) -> str | None:
    return attacking.openings.problem()


def stops_halfway(attacking: Attacking) -> str | None:
    search = iter(attacking.plugin.run(attacking.model, attacking.scene(range(len(attacking.prompts)), "half")))
    next(search)
    if isinstance(search, Generator):  # any other iterator has nothing to undo
        search.close()
    return attacking.openings.problem()


def goes_on(attacking: Attacking) -> str | None:
    """Require that a resumed search finds the same for the remaining prompts.

    The remaining prompts are searched without the finished ones; the results must be the same.
    """
    rest = list(range(1, len(attacking.prompts)))
    if not rest:
        return None
    whole = {i: attacking.found[i] for i in rest if i in attacking.found}
    return differs(whole, dict(attacking.search("rest", rest)), APART)


def is_shared(attacking: Attacking) -> str | None:
    if not attacking.plugin.shared or not attacking.erases:
        return None
    base: AbstractContextManager[None] = attacking.model.teacher()
    with base:
        other = dict(attacking.search("base"))
    if problem := differs(attacking.found, other, APART):
        return f"it says that it does not depend on the erased model, but on the base finds otherwise: {problem}"
    return None


def shares(attacking: Attacking) -> str | None:
    plugin = attacking.plugin
    if not isinstance(plugin, SharesSearch):
        return None
    for prompt in attacking.prompts:
        unit = plugin.unit(prompt, False)
        if not isinstance(unit, Hashable) or unit != plugin.unit(prompt, False):
            return "unit() does not give the same hashable value for the same prompt"
    return None


def draws(attacking: Attacking) -> str | None:
    """Draw the first shot of each prompt as the harness does, twice."""
    plugin, split = attacking.plugin, "attack:examined"
    drawn = [(p, found, found.shots[0]) for p, found in zip(attacking.prompts, ordered(attacking), strict=True) if found.shots]
    asked = [Prompt(f"{split}/{p.id}/0", s.text, s.seed, split, p.concept, p.guidance) for p, _, s in drawn]
    if not asked:
        return None

    def sampled() -> Tensor:
        if isinstance(plugin, DrawsImages):
            return plugin.draw(attacking.model, asked, [found for _, found, _ in drawn], SAMPLER).images
        if any(found.tensors for _, found, _ in drawn):
            vectors = [found.tensors[shot.label or "vectors"] for _, found, shot in drawn]
            return draw_vectors(attacking.model, asked, vectors, SAMPLER).images
        return attacking.model.sample([p.text for p in asked], [p.seed for p in asked], SAMPLER).images

    images = sampled()
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(asked):
        return f"{list(images.shape)} of {images.dtype} for {len(asked)} shots, expected uint8 [B, H, W, 3]"
    disturb(2)
    return None if torch.equal(images, sampled()) else "two drawings of the same shots differ"


def ordered(attacking: Attacking) -> list[Found]:
    return [attacking.found.get(i, Found()) for i in range(len(attacking.prompts))]


CLAUSES: tuple[Clause[Attacking], ...] = (
    Clause("is a frozen dataclass", is_frozen, essential=True),
    Clause("has a version, a whole number of its class", has_version),
    Clause("its parameters have a canonical text", has_text),
    Clause("has access, shared, images and run", has_run, essential=True),
    Clause("says what it sees, and whether it depends on the erased model", says_what_it_sees),
    Clause("says how many images it shows at most", says_its_budget),
    Clause("can be sent to another process", is_sent),
    Clause("says what it needs, if anything", says_needs),
    Clause("skips a model with a reason, if at all", gives_reason),
    Clause("run runs", searches, essential=True),
    Clause("every prompt is given once", finds_each_once),
    Clause("every shot is a text and a seed", shows_shots, essential=True),
    Clause("a prompt without a shot has an outcome that says why", says_why_not),
    Clause("what is learnt is finite", finds_finite),
    Clause("vectors stand in for every placeholder", gives_vectors),
    Clause("no prompt is shown or judged more often than it says", keeps_budget),
    Clause("no text is found that the safety gate refuses", passes_gate),
    Clause("the search leaves the model as it was", leaves_model),
    Clause("a search that is stopped leaves the model as it was", stops_halfway),
    Clause("the search is deterministic in its seed", repeats),
    Clause("a search goes on where it was stopped: no prompt depends on the others", goes_on),
    Clause("what is shared does not depend on the erased model", is_shared),
    Clause("prompts that share a search are told by a hashable value", shares),
    Clause("drawing the shots gives an image each, and the same again", draws),
)
