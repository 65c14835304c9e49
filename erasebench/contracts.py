"""The whole contract between the harness and its plugins. Plugins are frozen dataclasses; nobody inherits.

A method is an `Eraser`, a judge a `Judge`, an evaluator an `Evaluator`, an attack an `Attack`: that much each must have.
Everything else that a plugin may have is a capability, one small protocol each at the end of this file. The harness asks for
one by `isinstance` and in no other way.
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
    """A fault that the user can mend: the message says what, where and what to do, in one line."""


class Missing(ErasebenchError):
    """Weights or a package that nobody has brought yet; the message says how to get them. What needs them is skipped."""


class Undrawn(ErasebenchError):
    """The base does not draw the concept, as a judge sees it: that judge has no verdict on forgetting. It is skipped."""


class Unknown(ErasebenchError):
    """A name that the world does not have."""


@dataclass(frozen=True)
class Concept:
    """Something to forget or to keep. `surrogate` is what to draw instead; `kind` is object, person, style or
    explicit."""

    name: str
    kind: str
    surrogate: str = ""
    synonyms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """One image to make. `split` is target, synonym, retain, caption, implicit, composed, misspelt, paraphrase, language
    or attack:<name>;
    `concept` is the name that the image is judged by (for a synonym, the concept it stands for);
    `guidance` is the prompt's own, where its protocol gives one."""

    id: str
    text: str
    seed: int
    split: str
    concept: str = ""
    guidance: float | None = None


@dataclass(frozen=True)
class Brief:
    """What a task hands to a method. A method uses what it needs; all of it is part of the fit's identity.

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
    """A measured number with its interval. `value` is None where no image could be judged.

    n counts the images made, n_valid those that the judge gave a verdict on, both None for a cost; rates are in [0, 1].
    `base_value` is the same number for the base's images of the same prompts and seeds; value - base_value lies in
    [change_low, change_high]; p_value is McNemar's, for rates. `by_concept` says of what it is made: concept -> (rate,
    images judged).
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
    `apply` is quick and deterministic: entered, the model is erased; left, it is bit-equal to the base.
    Capabilities: Skips, Unlocks, LowRank, HasNeeds, HasPublishedSurrogates, HasFitCost, IsBase.
    """

    version: ClassVar[int]

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None: ...

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]: ...


@runtime_checkable
class Judge(Protocol):
    """Turns images into raw scores, once. `weights()` maps file name to sha256 and is part of the identity; it raises
    Missing where there are none. `licence` is that of the weights. Capabilities: HasNeeds, IsSparse, HasThreshold."""

    version: ClassVar[int]

    @property
    def name(self) -> str: ...

    @property
    def licence(self) -> str: ...

    def weights(self) -> dict[str, str]: ...

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """images uint8 [B, H, W, 3] -> arrays [B, ...]; NaN where the judge can give no verdict."""
        ...


@dataclass(frozen=True)
class Scored:
    """Raw scores of one split: arrays are [N, ...] in the order of `prompts`; `refused` is bool [N]."""

    prompts: tuple[Prompt, ...]
    arrays: dict[str, np.ndarray]
    refused: np.ndarray

    @property
    def concepts(self) -> list[str]:
        return [prompt.concept for prompt in self.prompts]


@runtime_checkable
class Evaluator(Protocol):
    """Metrics of a task as a pure function of a judge's raw scores.

    Capabilities: DecidesSuccess, RanksConcepts, Recognises, Calibrates, ChecksItself, HasNeeds. The first evaluator of a
    task that decides success says of every attack whether it succeeded."""

    @property
    def judge(self) -> Judge: ...

    @property
    def splits(self) -> tuple[str, ...]: ...

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure | Metric]:
        """`scores` and `base` hold one entry a split, paired by position (same prompts, same seeds). A Measure says
        what is a mean of which values, and the harness adds intervals and the change against the base; what is no
        such thing (a Frechet distance) comes as a Metric."""
        ...


@dataclass(frozen=True)
class Sampler:
    """How images are made. `size` in pixels; None is the model's own."""

    name: str = "ddim"
    steps: int = 50
    guidance: float = 7.5
    size: int | None = None


@dataclass(frozen=True)
class Plan:
    """A task made concrete: what to erase, what to show, how, and what the method may see."""

    task: str
    version: int
    concepts: tuple[Concept, ...]
    prompts: tuple[Prompt, ...]
    brief: Brief
    subset: bool = False
    evaluators: dict[str, Evaluator | None] = field(default_factory=dict)  # None: this world has no judge for it
    dropped: int = 0  # prompts that the safety gate refused
    which: str = ""  # what is erased, where neither a number nor one name says it

    @property
    def explicit(self) -> bool:
        """Whether the safety gate stands before all of its texts."""
        return any(concept.kind == "explicit" for concept in self.concepts)


@dataclass(frozen=True)
class Shot:
    """One image of an attack. `text` is what is asked, with PLACEHOLDER where learnt vectors stand in for a word; shots
    with a `label` are counted apart from the others (another checkpoint, say)."""

    text: str
    seed: int
    label: str = ""


PLACEHOLDER = "<*>"
WORD = "<pictured>"  # what a method calls a concept that it is given by pictures


@dataclass(frozen=True)
class Found:
    """What an attack has for one prompt: its shots, in the order in which they are shown, and what is no text.

    `outcome` says why there is no shot: "too long", "refused" (by the safety gate); or "diverged", with or without one.
    `tensors["vectors"]` [k, D] stand in for PLACEHOLDER; the rest is the attack's own.
    """

    shots: tuple[Shot, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    outcome: str = ""


@dataclass(frozen=True)
class Scene:
    """What the harness hands to an attack.

    prompts    under attack
    before     bool [N]: does the erased model show the concept without any attack?
    pictures   uint8 [N, H, W, 3]: for each prompt a picture of its concept, the original model's
    known      concept -> uint8 [M, H, W, 3]: all of them, surest first; where the task is explicit content, those of all
               prompts under "" too
    concepts   name -> Concept, of what is erased
    templates  training templates with {c}
    hit        images, and the prompts they are of -> (bool [B], score [B]); counted as queries
    allows     may this text be generated? Ask before each sampling of what an optimisation wrote
    take_up    notes the source of an entry of the store that this search goes on with, for what it finds
    together   how many latents go through the U-Net at once
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
    """Asks an erased model for the concept, without its name if need be.

    `access` is what it must see: text encoder, unet gradient, original model, images, detector. `shared`: what it finds
    does not depend on the erased model. `images` is the most that it shows (and has judged) for a prompt.
    Capabilities: Skips, DrawsImages, SharesSearch, HasObjective, IsProbe, StopsEarly, HasAttackCost, HasNeeds.
    """

    version: ClassVar[int]
    access: ClassVar[tuple[str, ...]]
    shared: ClassVar[bool]

    @property
    def images(self) -> int: ...

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        """(index of a prompt, what was found for it), each prompt once, as soon as it is finished. What is found for
        one prompt does not depend on the others."""
        ...


# -- capabilities -----------------------------------------------------------------------------------------------------
# `isinstance` asks by attribute, and on Python 3.11 it evaluates properties: what a plugin may be unable to answer yet is
# declared for the type checker alone. A flag counts where it is there and True.


@runtime_checkable
class HasNeeds(Protocol):
    """Any plugin that reads files or uses packages that are not its own."""

    def needs(self) -> Sequence[Need]:
        """Asked for before a model is loaded (needs.py)."""
        ...


@runtime_checkable
class Skips(Protocol):
    """A method or an attack that does not fit every model."""

    def skip(self, model: Model) -> str:
        """Why it does not fit this one, or nothing."""
        ...


@runtime_checkable
class IsBase(Protocol):
    """The method that changes nothing."""

    is_base: ClassVar[bool]


@runtime_checkable
class Unlocks(Protocol):
    """A method that hides the concept, and can give it back."""

    def unlock(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        """Entered inside `apply`."""
        ...


@runtime_checkable
class LowRank(Protocol):
    """A method that adds matrices of low rank, which can be written as a LoRA file."""

    def low_rank(self, model: Model, artifact: Path) -> dict[str, tuple[Tensor, Tensor]]:
        """Name of a weight -> (up [out, r], down [r, in])."""
        ...


@runtime_checkable
class HasPublishedSurrogates(Protocol):
    """A method whose authors draw something of their own in a concept's place (surrogate=published)."""

    published_surrogates: ClassVar[Mapping[str, str]]  # kind of concept -> surrogate


@dataclass(frozen=True)
class FitCost:
    """What a fit takes: evaluations of single latents by the U-Net, such with a gradient, and seconds of the rest."""

    forward: float = 0
    gradient: float = 0
    seconds: float = 0


@runtime_checkable
class HasFitCost(Protocol):
    """A method that can tell beforehand what its fit takes (plan.py)."""

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        """Of so many concepts with so many different surrogates; `loops` are those until a method has succeeded that
        goes on until then."""
        ...


@dataclass(frozen=True)
class SearchCost(FitCost):
    """What a search takes; of the `images` that it draws and has judged, `kept` are stored."""

    images: float = 0
    kept: float = 0


@dataclass(frozen=True)
class AttackCost:
    """What an attack takes for a prompt, and before any prompt `count` times `once`."""

    each: SearchCost
    once: SearchCost = SearchCost()
    count: int = 0


@runtime_checkable
class HasAttackCost(Protocol):
    """An attack that can tell beforehand what it takes (plan.py)."""

    def attack_cost(self, prompts: int, concepts: int) -> AttackCost:
        """Of so many prompts under attack, which ask for so many concepts."""
        ...


@runtime_checkable
class HasWeights(Protocol):
    """A judge, or a network among a method's fields."""

    def weights(self) -> dict[str, str]:
        """File name -> sha256. Raises Missing."""
        ...


@runtime_checkable
class IsPretrained(Protocol):
    """A network by the name of its weights; "embedded" are the package's own."""

    @property
    def pretrained(self) -> str: ...


@runtime_checkable
class IsSparse(Protocol):
    """A judge of what is rare, which says the same of most pictures: nothing found."""

    sparse: ClassVar[bool]


@runtime_checkable
class HasThreshold(Protocol):
    """A judge that says itself from which score on it has found something."""

    threshold: ClassVar[float]


@runtime_checkable
class ChecksItself(Protocol):
    """An evaluator that needs more than its judge's weights."""

    def check(self) -> None:
        """Raises Missing."""
        ...


@runtime_checkable
class DecidesSuccess(Protocol):
    """An evaluator that decides whether an attack succeeded: where `confidence` reaches `threshold`."""

    if TYPE_CHECKING:  # there is none before Calibrates.calibrated gave it

        @property
        def threshold(self) -> float: ...

    def confidence(self, scored: Scored) -> np.ndarray:
        """How sure it is that each image shows its concept [N]; NaN without a verdict."""
        ...


class Decider(Evaluator, DecidesSuccess, Protocol):
    """An evaluator that decides success, to the type checker."""


@runtime_checkable
class RanksConcepts(Protocol):
    """An evaluator whose judge tells all that it knows apart."""

    def top1(self, scored: Scored) -> np.ndarray:
        """1 where each image's own concept comes first, 0 where another does, NaN without a verdict [N]."""
        ...


@runtime_checkable
class Recognises(Protocol):
    """An evaluator whose judge knows a list of names; it is left out where it does not know all that is asked for."""

    def recognises(self, concept: str) -> bool: ...


@runtime_checkable
class Calibrates(Protocol):
    """An evaluator whose verdicts are held against the base's pictures."""

    def calibrated(self, base: Mapping[str, Scored]) -> Decider:
        """The evaluator to use, with `base` as in `measure`. Raises Undrawn."""
        ...


class SecondOpinion(Protocol):
    """Another judge's opinion on the same images, for audits and to confirm attacks."""

    @property
    def judge(self) -> Judge: ...

    def verdict(self, scored: Scored) -> np.ndarray:
        """1 where an image shows its concept, 0 where not, NaN without a verdict [N]."""
        ...


@runtime_checkable
class DrawsImages(Protocol):
    """An attack that samples in its own way."""

    def draw(self, model: Model, shots: Sequence[Prompt], founds: Sequence[Found], sampler: Sampler) -> Sampled: ...


@runtime_checkable
class SharesSearch(Protocol):
    """An attack that learns something for several prompts together; one worker gets them all."""

    def unit(self, prompt: Prompt, explicit: bool) -> Hashable:
        """Equal for prompts that share what is learnt."""
        ...


@runtime_checkable
class HasObjective(Protocol):
    """An attack that looks at the noise with or without guidance (search.guided)."""

    @property
    def objective(self) -> Literal["auto", "cond", "guided"]: ...


@runtime_checkable
class IsProbe(Protocol):
    """An attack that uses no text."""

    probe: ClassVar[bool]


@runtime_checkable
class StopsEarly(Protocol):
    """An attack whose search ends where the judge is sure."""

    stops: ClassVar[bool]
