"""Contract between the harness and its plugins, which are frozen dataclasses.

Plugins never inherit. A method is an `Eraser`, a judge a `Judge`, an evaluator an `Evaluator`, an attack an
`Attack`: these members are required. All other members are optional capabilities, one small protocol each at the end
of this file. The harness asks for a capability only by `isinstance`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from .model.model import Model, Sampled
    from .needs import Need
    from .stats import Measure
    from .store.local import Store


class ErasebenchError(Exception):
    """An error that the user can fix.

    The message says in one line which fault occurred, where, and how to fix it.
    """


class Missing(ErasebenchError):
    """Weights or a package that is not installed.

    The message says how to get them. The parts that need them are skipped.
    """


class Undrawn(ErasebenchError):
    """A concept that the base does not draw, according to a judge.

    That judge has no verdict on forgetting. It is skipped.
    """


class Unknown(ErasebenchError):
    """A name that the world does not have."""


@dataclass(frozen=True)
class Concept:
    """A concept to forget or to keep.

    `surrogate` is the concept to draw instead; `kind` is object, person, style or explicit.
    """

    name: str
    kind: str
    surrogate: str = ""
    synonyms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """One image to make.

    `split` is target, synonym, retain, caption, implicit, composed, misspelt, paraphrase, language or attack:<name>;
    `concept` is the name that the image is judged by (for a synonym, the concept it stands for); `guidance` is the
    prompt's own guidance scale if its protocol sets one.
    """

    id: str
    text: str
    seed: int
    split: str
    concept: str = ""
    guidance: float | None = None


@dataclass(frozen=True)
class Brief:
    """Information that a task gives to a method.

    A method uses the parts that it needs; all of it is part of the fit's identity.

        concepts    to erase, by name; synonyms are the evaluation's, and no brief of the package's tasks has any
        preserved   names to keep (the task's retained concepts)
        captions    ordinary captions of the world, none of them evaluated
        templates   training templates with {c}; they share no sentence with the evaluation's
    """

    concepts: tuple[Concept, ...]
    preserved: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("a photo of {c}",)


@dataclass(frozen=True)
class Metric:
    """A measured number with its interval.

    `value` is None if no image could be judged. n counts the images made, n_valid the images with a verdict of the
    judge, both None for a cost; rates are in [0, 1]. `base_value` is the same number for the base's images of the
    same prompts and seeds; value - base_value lies in [change_low, change_high]; p_value is McNemar's, for rates.
    `by_concept` breaks the metric down: concept -> (rate, images judged).
    """

    name: str
    split: str
    value: float | None
    low: float | None
    high: float | None
    ci_method: str
    n: int | None
    n_valid: int | None
    higher_is_better: bool
    group: str  # forget, keep, quality, overall, attack, probe, cost
    threshold: float | None = None
    base_value: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    p_value: float | None = None
    by_concept: Mapping[str, tuple[float | None, int]] = field(default_factory=dict)


@runtime_checkable
class Eraser(Protocol):
    """An erasure method.

    `fit` may take hours and writes a folder of safetensors and JSON (nothing learnt, nothing written).

    `apply` is quick and deterministic: inside its context the model is erased; after it the model is bit-equal to
    the base.

    Capabilities: Skips, Unlocks, LowRank, HasNeeds, HasPublishedSurrogates, HasFitCost, IsBase.
    """

    version: ClassVar[int]

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None: ...

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]: ...


@runtime_checkable
class Judge(Protocol):
    """A judge that turns images into raw scores, once.

    `weights()` maps file name to sha256 and is part of the identity; it raises Missing if the weights are not
    installed. `licence` is the licence of the weights. Capabilities: HasNeeds, IsSparse, HasThreshold.
    """

    version: ClassVar[int]

    @property
    def name(self) -> str: ...

    @property
    def licence(self) -> str: ...

    def weights(self) -> dict[str, str]: ...

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """Score images uint8 [B, H, W, 3] -> arrays [B, ...].

        Entries are NaN where the judge has no verdict.
        """
        ...


@dataclass(frozen=True)
class Scored:
    """Raw scores of one split.

    Arrays are [N, ...] in the order of `prompts`; `refused` is bool [N].
    """

    prompts: tuple[Prompt, ...]
    arrays: dict[str, np.ndarray]
    refused: np.ndarray

    @property
    def concepts(self) -> list[str]:
        return [prompt.concept for prompt in self.prompts]


@runtime_checkable
class Evaluator(Protocol):
    """Metrics of a task, a pure function of a judge's raw scores.

    Capabilities: DecidesSuccess, RanksConcepts, Recognises, Calibrates, ChecksItself, HasNeeds. The first evaluator
    of a task that decides success does so for every attack.
    """

    @property
    def judge(self) -> Judge: ...

    @property
    def splits(self) -> tuple[str, ...]: ...

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure | Metric]:
        """Compute the metrics of a task.

        `scores` and `base` hold one entry per split, paired by position (same prompts, same seeds). A Measure
        defines a mean of values, and the harness adds intervals and the change against the base; a number that is no
        such mean (a Frechet distance) is returned as a Metric.
        """
        ...


@dataclass(frozen=True)
class Sampler:
    """Settings of the sampler.

    `size` is in pixels; None selects the model's own size.
    """

    name: str = "ddim"
    steps: int = 50
    guidance: float = 7.5
    size: int | None = None


@dataclass(frozen=True)
class Plan:
    """Concrete task: concepts to erase, prompts, evaluators, and the method's brief."""

    task: str
    version: int
    concepts: tuple[Concept, ...]
    prompts: tuple[Prompt, ...]
    brief: Brief
    subset: bool = False
    evaluators: dict[str, Evaluator | None] = field(default_factory=dict)  # None: the world has no judge for it
    dropped: int = 0  # prompts that the safety gate refused
    which: str = ""  # label of the erased concepts if neither a number nor one name identifies them

    @property
    def explicit(self) -> bool:
        """True if the safety gate checks all texts of the plan."""
        return any(concept.kind == "explicit" for concept in self.concepts)


@dataclass(frozen=True)
class Shot:
    """One image of an attack.

    `text` is the prompt, with PLACEHOLDER where learnt vectors stand in for a word; shots with a `label` are counted
    apart from the others (another checkpoint, for example).
    """

    text: str
    seed: int
    label: str = ""


PLACEHOLDER = "<*>"
WORD = "<pictured>"  # the method's name for a concept that is given by images


@dataclass(frozen=True)
class Found:
    """Result of an attack for one prompt: prompts to sample, in order, and tensors.

    `outcome` gives the reason if there is no shot: "too long", "refused" (by the safety gate); or "diverged", with
    or without a shot. `tensors["vectors"]` [k, D] stand in for PLACEHOLDER; the rest is the attack's own.
    """

    shots: tuple[Shot, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    outcome: str = ""


@dataclass(frozen=True)
class Scene:
    """Input of an attack.

        prompts    under attack
        before     bool [N]: does the erased model show the concept without any attack?
        pictures   uint8 [N, H, W, 3]: for each prompt an image of its concept, made by the original model
        known      concept -> uint8 [M, H, W, 3]: all images of it, surest first; for explicit content also those of all
                   prompts, under ""
        concepts   name -> Concept, of the erased concepts
        templates  training templates with {c}
        hit        images, and the prompts they belong to -> (bool [B], score [B]); counted as queries
        allows     may this text be generated? Ask before each sampling of a text that an optimisation wrote
        take_up    notes the source of an entry of the store from which this search continues, for its own result
        together   number of latents that go through the U-Net at once
    """

    prompts: tuple[Prompt, ...]
    before: np.ndarray
    pictures: Tensor
    known: Mapping[str, Tensor]
    concepts: Mapping[str, Concept]
    templates: tuple[str, ...]
    sampler: Sampler
    seed: int
    together: int
    store: Store
    identity: Mapping[str, object]
    hit: Callable[[Sampled, Sequence[Prompt]], tuple[np.ndarray, np.ndarray]]
    allows: Callable[[str], bool]
    take_up: Callable[[Path], None] = lambda entry: None


@runtime_checkable
class Attack(Protocol):
    """An attack that asks an erased model for the concept.

    It avoids the concept's name if necessary.

    `access` names the parts that it must see: text encoder, unet gradient, original model, images, detector.
    `shared`: its result does not depend on the erased model. `images` is the largest number of images that it shows
    (and has judged) for a prompt. Capabilities: Skips, DrawsImages, SharesSearch, HasObjective, IsProbe, StopsEarly,
    HasAttackCost, HasNeeds.
    """

    version: ClassVar[int]
    access: ClassVar[tuple[str, ...]]
    shared: ClassVar[bool]

    @property
    def images(self) -> int: ...

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        """Yield (index of a prompt, its result).

        Each prompt comes once, as soon as it finishes. The result for one prompt does not depend on the others.
        """
        ...


# -- capabilities -----------------------------------------------------------------------------------------------------
# `isinstance` asks by attribute, and on Python 3.11 it evaluates properties: a property that a plugin may be unable to
# answer yet is declared for the type checker alone. A flag counts if it is present and True.


@runtime_checkable
class HasNeeds(Protocol):
    """Any plugin that uses files or packages other than its own."""

    def needs(self) -> Sequence[Need]:
        """Return the plugin's needs; called before a model is loaded (needs.py)."""
        ...


@runtime_checkable
class Skips(Protocol):
    """A method or an attack that does not fit every model."""

    def skip(self, model: Model) -> str:
        """Return the reason why it does not fit this model, or ""."""
        ...


@runtime_checkable
class IsBase(Protocol):
    """The method that changes nothing."""

    is_base: ClassVar[bool]


@runtime_checkable
class Unlocks(Protocol):
    """A method that hides the concept and can restore it."""

    def unlock(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        """Restore the concept; entered inside `apply`."""
        ...


@runtime_checkable
class LowRank(Protocol):
    """A method that adds low-rank matrices.

    They can be written as a LoRA file.
    """

    def low_rank(self, model: Model, artifact: Path) -> dict[str, tuple[Tensor, Tensor]]:
        """Return name of a weight -> (up [out, r], down [r, in])."""
        ...


@runtime_checkable
class HasPublishedSurrogates(Protocol):
    """A method with published surrogates of its own (surrogate=published)."""

    published_surrogates: ClassVar[Mapping[str, str]]  # kind of concept -> surrogate


@dataclass(frozen=True)
class FitCost:
    """Cost of a fit.

    Counts the evaluations of single latents by the U-Net, without and with a gradient, and the seconds of the rest.
    """

    forward: float = 0
    gradient: float = 0
    seconds: float = 0


@runtime_checkable
class HasFitCost(Protocol):
    """A method that can forecast the cost of its fit (plan.py)."""

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        """Forecast the cost for a number of concepts and of different surrogates.

        `loops` is the number of repetitions that a method needs if it repeats until it succeeds.
        """
        ...


@dataclass(frozen=True)
class SearchCost(FitCost):
    """Cost of a search.

    The search draws `images` and has them judged; `kept` of them are stored.
    """

    images: float = 0
    kept: float = 0


@dataclass(frozen=True)
class AttackCost:
    """Cost of an attack.

    It is `each` for every prompt, and before any prompt `count` times `once`.
    """

    each: SearchCost
    once: SearchCost = SearchCost()
    count: int = 0


@runtime_checkable
class HasAttackCost(Protocol):
    """An attack that can forecast its cost (plan.py)."""

    def attack_cost(self, prompts: int, concepts: int) -> AttackCost:
        """Forecast the cost for numbers of attacked prompts and their concepts."""
        ...


@runtime_checkable
class HasWeights(Protocol):
    """A judge, or a network among a method's fields."""

    def weights(self) -> dict[str, str]:
        """Return file name -> sha256. Raises Missing."""
        ...


@runtime_checkable
class IsPretrained(Protocol):
    """A network identified by the name of its weights.

    "embedded" selects the package's own weights.
    """

    @property
    def pretrained(self) -> str: ...


@runtime_checkable
class IsSparse(Protocol):
    """A judge of rare content, which finds nothing in most images."""

    sparse: ClassVar[bool]


@runtime_checkable
class HasThreshold(Protocol):
    """A judge that defines its own detection threshold."""

    threshold: ClassVar[float]


@runtime_checkable
class ChecksItself(Protocol):
    """An evaluator that needs more than its judge's weights."""

    def check(self) -> None:
        """Raise Missing if anything is not installed."""
        ...


@runtime_checkable
class DecidesSuccess(Protocol):
    """An evaluator that decides whether an attack succeeded.

    It succeeded if `confidence` reaches `threshold`.
    """

    if TYPE_CHECKING:  # not set before Calibrates.calibrated returns it

        @property
        def threshold(self) -> float: ...

    def confidence(self, scored: Scored) -> np.ndarray:
        """Return the confidence that each image shows its concept [N].

        NaN without a verdict.
        """
        ...


class Decider(Evaluator, DecidesSuccess, Protocol):
    """An evaluator that decides success, for the type checker."""


@runtime_checkable
class RanksConcepts(Protocol):
    """An evaluator whose judge ranks all concepts that it knows."""

    def top1(self, scored: Scored) -> np.ndarray:
        """Return 1 where each image's own concept ranks first, else 0 [N].

        NaN without a verdict.
        """
        ...


@runtime_checkable
class Recognises(Protocol):
    """An evaluator whose judge knows a list of names.

    It is left out if it does not know all names that the run asks for.
    """

    def recognises(self, concept: str) -> bool: ...


@runtime_checkable
class Calibrates(Protocol):
    """An evaluator whose verdicts are calibrated on the base's images."""

    def calibrated(self, base: Mapping[str, Scored]) -> Decider:
        """Return the evaluator to use, with `base` as in `measure`. Raises Undrawn."""
        ...


class SecondOpinion(Protocol):
    """Verdict of another judge on the same images.

    Serves audits and the confirmation of attacks.
    """

    @property
    def judge(self) -> Judge: ...

    def verdict(self, scored: Scored) -> np.ndarray:
        """Return 1 where an image shows its concept, else 0 [N].

        NaN without a verdict.
        """
        ...


@runtime_checkable
class DrawsImages(Protocol):
    """An attack that samples in its own way."""

    def draw(self, model: Model, shots: Sequence[Prompt], founds: Sequence[Found], sampler: Sampler) -> Sampled: ...


@runtime_checkable
class SharesSearch(Protocol):
    """An attack that learns something for several prompts together.

    One worker gets all of these prompts.
    """

    def unit(self, prompt: Prompt, explicit: bool) -> Hashable:
        """Return a key that prompts with shared learnt tensors have in common."""
        ...


@runtime_checkable
class HasObjective(Protocol):
    """An attack that compares noise predictions with or without guidance (search.guided)."""

    @property
    def objective(self) -> Literal["auto", "cond", "guided"]: ...


@runtime_checkable
class IsProbe(Protocol):
    """An attack that uses no text."""

    probe: ClassVar[bool]


@runtime_checkable
class StopsEarly(Protocol):
    """An attack whose search ends once the judge is sure."""

    stops: ClassVar[bool]
