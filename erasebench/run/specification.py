"""Fully specified runs and the keys under which their results are stored.

Keys are plain values that `store.digest` hashes (sha256): of a fit, of a shard of images, of raw scores, of an attack's
search, of a run's file of rows. The schedule and the forecast of a run use the same keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import needs
from ..contracts import (
    Attack,
    ChecksItself,
    Decider,
    Eraser,
    Evaluator,
    HasThreshold,
    HasWeights,
    IsBase,
    IsPretrained,
    Judge,
    Missing,
    Plan,
    Prompt,
    Recognises,
    Sampler,
    SecondOpinion,
    StopsEarly,
)
from ..executors.local import Executor, Local
from ..store.local import digest

if TYPE_CHECKING:
    from ..model.source import Source
    from ..toolbox.inversion import Pictured

SAMPLING = 2  # version of the sampling code: raise it when images change
SAMPLERS = {"pndm": 3}  # overrides for single samplers: 3 combines the predicted v, not its noise
TRANSPORT = {  # field that no key depends on -> reason
    "Run.method": "a name; the eraser is the method",
    "Run.world": "a name; its prompts and judges are the world",
    "Run.target": "a name for files; the brief has the concepts",
    "Run.batch": "images do not depend on it",
    "Run.device": "where it is computed; rows name it",
    "Run.judges": "where judges compute",
    "Run.results": "where rows are written",
    "Run.second": "audits alone ask it",
    "Run.given": "for the conformance check",
    "Run.together": "what is found for a prompt does not depend on those beside it",
    "Run.executor": "where work is done",
    "Run.overrides": "the command line, of which all that counts is composed",
    "Plan.concepts": "the brief has them, and the prompts their synonyms",
    "Plan.subset": "a remark on the prompts",
    "Plan.dropped": "a count of what is no prompt",
    "Plan.which": "a name for files",
    "Source.name": "a name; weights are known by content, or by id and revision",
}


@dataclass(frozen=True)
class Run:
    """Fully specified run; `identity` selects the fields that are hashed.

    TRANSPORT gives the reason for each field that is not."""

    method: str
    eraser: Eraser
    source: Source
    world: str
    plan: Plan
    sampler: Sampler
    seed: int = 0
    target: str = ""  # the concept's name if there is only one
    batch: int = 32  # images per batch; 0: as many as fit into GPU memory
    speed: Literal["exact", "fast"] = "exact"  # applies to sampling; fits and attacks are always exact
    device: str = "cpu"
    judges: str = "cpu"  # device of the judges' networks
    results: Path = Path("results")
    second: SecondOpinion | None = None  # second judge of the target images, for audits
    given: tuple[str, ...] = ()  # hyperparameters set in the config, for the conformance check
    attacks: Mapping[str, Attack] = field(default_factory=dict)
    attacked: int = 20  # number of prompts under attack: the first of the target split
    together: int = 32  # prompts attacked together
    executor: Executor = Local()
    pictured: Pictured | None = None  # reference images given to the method in place of the concept's name
    overrides: tuple[str, ...] = ()  # command-line overrides, recorded in the rows only
    own: Mapping[str, Any] | None = None  # user-defined concept: name, kind, keep, synonyms, reference images

    @property
    def is_base(self) -> bool:
        return isinstance(self.eraser, IsBase) and self.eraser.is_base

    @property
    def id(self) -> str:
        """Name of the run's files."""
        which = self.target or f"n{len(self.plan.concepts)}"
        return "-".join(
            [*map(slug, (self.method, self.plan.task, which, self.source.name)), digest(self.identity())[:10]]
        )

    def identity(self) -> dict[str, Any]:
        """Return everything that the run's rows depend on."""
        under = {"attacks": [(n, a, type(a).version) for n, a in self.attacks.items()], "attacked": self.attacked}
        prompts = zip(self.plan.prompts, requests(self.plan.prompts), strict=True)
        return {
            **(under if self.attacks else {}),
            **({} if self.speed == "exact" else {"speed": self.speed}),
            **({} if self.own is None else {"own": self.own}),
            "fit": self.fit_identity(),
            "plan": [self.plan.task, self.plan.version, [(p.id, p.split, *what, p.concept) for p, what in prompts]],
            "sampler": self.sampler,
            "evaluators": [
                (name, e, type(e.judge).version, e.judge.weights())
                for name, e in self.plan.evaluators.items()
                if e is not None and not self.skips(e)
            ],
        }

    def fit_identity(self) -> dict[str, Any]:
        """Return everything that the method's artifact depends on."""
        judges = {name: judge for name, judge in vars(self.eraser).items() if isinstance(judge, HasWeights)}
        # weights are identified by content, not by path; embedded ones belong to the package's own models
        embedded = lambda judge: isinstance(judge, IsPretrained) and judge.pretrained == "embedded"
        outside = {name: judge.weights() for name, judge in judges.items() if not embedded(judge)}
        return {
            **({"weights": outside} if outside else {}),
            "eraser": self.eraser,
            "version": self.eraser.version,
            "brief": self.plan.brief,
            "seed": self.seed,
            "base": self.source.identity(),
            **({"pictured": self.pictured.identity()} if self.pictured else {}),
            **sampling(),
        }

    @property
    def plugins(self) -> list[Any]:
        """Plugins of the run, any of which may need external files."""
        judges = [e.judge for e in self.plan.evaluators.values() if e is not None]
        return [self.eraser, *self.plan.evaluators.values(), *judges, *self.attacks.values(), self.second]

    def skips(self, evaluator: Evaluator | None) -> str:
        """Return the reason to skip an evaluator, or an empty string."""
        if evaluator is None or evaluator.judge is None:
            return f"world {self.world} has no judge for it"
        try:
            evaluator.judge.weights()
            if isinstance(evaluator, ChecksItself):
                evaluator.check()
        except Missing as error:
            return str(error)
        if reason := needs.lacking(evaluator, evaluator.judge):
            return reason
        absent = set(evaluator.splits) - set(self.concepts)
        missing = f"the world {self.world} gives no {', '.join(sorted(absent))} prompts" if absent else ""
        return self.unknown_to(evaluator) or missing

    @cached_property
    def concepts(self) -> dict[str, list[str]]:
        """Concept names by which prompts are judged, by split."""
        found: dict[str, dict[str, None]] = {}
        for prompt in self.plan.prompts:
            found.setdefault(prompt.split, {})[prompt.concept] = None
        return {split: list(filter(None, names)) for split, names in found.items()}

    def unknown_to(self, evaluator: Evaluator) -> str:
        """Name the concepts unknown to an evaluator, or return an empty string."""
        if not isinstance(evaluator, Recognises):
            return ""
        asked_for = dict.fromkeys(name for split in evaluator.splits for name in self.concepts.get(split, ()))
        unknown = [name for name in asked_for if not evaluator.recognises(name)]
        and_more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        return f"{evaluator.judge.name} does not know {', '.join(unknown[:3])}{and_more}" if unknown else ""


def slug(text: str) -> str:
    """Return the text in a form safe for file names.

    Hostile names cannot leave the folder, and the run's hash, appended to them, prevents collisions."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40] or "x"


def sampling() -> dict[str, Any]:
    """Return the versions of the sampling code.

    They are for the keys of fits and attacks, which sample but are not images."""
    return {"sampling": [SAMPLING, SAMPLERS]}


def requests(prompts: Sequence[Prompt]) -> list[tuple]:
    """Return text, seed and (if set) guidance scale of each prompt.

    They distinguish the images of one model and sampler."""
    return [(p.text, p.seed) if p.guidance is None else (p.text, p.seed, guidance_of(p.guidance)) for p in prompts]


def guidance_of(scale: float) -> float:
    """Return the effective guidance scale: below 1, as at 1, guidance is off (see Model.guided)."""
    return scale if scale >= 1 else 1.0


def model_identities(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the identities of the base and of the erased model."""
    base = {"base": run.source.identity()}
    return base, base if run.is_base else {**base, "artifact": digest(run.fit_identity())}


def image_identities(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the identities of original and erased images, prompts and sampler aside."""
    how = {} if run.speed == "exact" else {"speed": run.speed}
    base, ours = model_identities(run)
    return {**base, **how}, {**ours, **how}


def shard_identity(identity: Mapping[str, Any], sampler: Sampler, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return everything that a shard's images depend on; `identity` is one of `image_identities`."""
    version = SAMPLERS.get(sampler.name, SAMPLING)
    sampler = replace(sampler, guidance=guidance_of(sampler.guidance))
    return {"sampling": version, **identity, "sampler": sampler, "prompts": requests(prompts)}


def score_identity(judge: Judge, shard: str) -> dict[str, Any]:
    """Return everything that a stored shard's raw scores depend on; `shard` is its key."""
    return {"judge": judge, "version": type(judge).version, "weights": judge.weights(), "images": shard}


def word_identity(run: Run) -> dict[str, Any]:
    """Return everything that a word learnt from images depends on."""
    assert run.pictured is not None
    return {"word": [run.pictured.identity(), run.plan.brief.templates, run.seed, run.source.identity()]}


def search_identity(run: Run, attack: Attack, evaluator: Decider, pictures: Sequence[str]) -> dict[str, Any]:
    """Return everything that a search depends on besides its prompt.

    `pictures` are the keys of the shards of original target images."""
    base, ours = model_identities(run)
    shared = {
        "attack": attack,
        "version": type(attack).version,
        "seed": run.seed,
        "concepts": run.plan.concepts,
        "templates": run.plan.brief.templates,
        "gate": run.plan.explicit,
        **sampling(),
    }
    if attack.shared:
        return {**shared, **base}
    judge = evaluator.judge
    ends = {}
    if isinstance(attack, StopsEarly) and attack.stops and isinstance(judge, HasThreshold):
        ends = {"threshold": judge.threshold}
    return {
        **shared,
        **ours,
        "sampler": run.sampler,
        "detector": [evaluator, type(judge).version, judge.weights()],
        "pictures": list(pictures),
        **ends,
    }


def found_identity(search: Mapping[str, Any], attack: Attack, prompt: Prompt, before: bool) -> dict[str, Any]:
    """Return everything that the result for one prompt depends on.

    `before`: whether the erased model shows the concept without an attack."""
    known = {} if attack.shared else {"before": before}
    return {**search, "prompt": [prompt.text, prompt.seed, prompt.concept, prompt.guidance], **known}
