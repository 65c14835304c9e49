"""Contracts of plugins as clauses: a name and a function that returns the problem, if any."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..contracts import HasNeeds, Sampler, Skips
from ..model.model import Model
from ..model.source import weights_digest
from ..needs import Need
from ..store.local import digest

SAMPLER = Sampler("ddim", 5, 4.0)


class Examined(Protocol):
    """Plugin under examination."""

    @property
    def plugin(self) -> Any: ...


class OnModel(Examined, Protocol):
    """Plugin under examination on a model."""

    @property
    def model(self) -> Model: ...


S = TypeVar("S", bound=Examined)


class Clause(NamedTuple, Generic[S]):
    """Promise of the contract. If an `essential` one is broken, the later ones are not examined."""

    name: str
    problem: Callable[[S], str | None]
    essential: bool = False


class Finding(NamedTuple):
    """Result of a clause; `problem` is empty if the clause holds."""

    clause: str
    problem: str


def examine(subject: S, clauses: Sequence[Clause[S]]) -> list[Finding]:
    """Examine every clause up to the first broken essential one."""
    findings = []
    for clause in clauses:
        try:
            problem = clause.problem(subject) or ""
        except (Exception, SystemExit) as error:  # a plugin may raise anything; here that is the finding
            lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
            problem = lines[-1] if lines else type(error).__name__
        findings.append(Finding(clause.name, problem))
        if problem and clause.essential:
            break
    return findings


# -- clauses of all kinds ---------------------------------------------------------------------------------------------


def is_frozen(subject: Examined) -> str | None:
    kind = type(subject.plugin)
    frozen = is_dataclass(kind) and vars_of(kind)["__dataclass_params__"].frozen
    return None if frozen else "not a frozen dataclass"


def has_version(subject: Examined) -> str | None:
    return version_of(subject.plugin)


def version_of(plugin: Any) -> str | None:
    """Return the problem if a plugin has no version. A field of the instance is not enough: keys read the class."""
    return None if isinstance(vars_of(type(plugin)).get("version"), int) else "no version: ClassVar[int]"


def vars_of(kind: type) -> Mapping[str, Any]:
    """Return the class attributes, including those of base classes."""
    return {name: value for base in reversed(kind.__mro__) for name, value in vars(base).items()}


def has_text(subject: Examined) -> str | None:
    digest(subject.plugin)
    return None


def is_sent(subject: Examined) -> str | None:
    again = pickle.loads(pickle.dumps(subject.plugin))
    return None if digest(again) == digest(subject.plugin) else "it arrives with other parameters"


def says_needs(subject: Examined) -> str | None:
    needs = subject.plugin.needs() if isinstance(subject.plugin, HasNeeds) else ()
    odd = [type(need).__name__ for need in needs if not isinstance(need, Need)]
    return f"needs() gives {', '.join(odd)} among its needs" if odd else None


def gives_reason(subject: OnModel) -> str | None:
    """Return the problem with a plugin's reason for skipping a model."""
    if not isinstance(subject.plugin, Skips):
        return None
    reason = subject.plugin.skip(subject.model)
    return None if isinstance(reason, str) else f"skip() gives {type(reason).__name__}, not a reason or ''"


class Openings:
    """Snapshot of a model's weights and openings."""

    def __init__(self, model: Model):
        self.model = model
        self.before = self.now()

    def now(self) -> tuple[Any, ...]:
        model = self.model
        digests = weights_digest(model.unet, model.text_encoder, model.vae)
        return (
            digests,
            model.guidance,
            model.guard,
            model.around,
            dict(model.unet.attn_processors),
            vars(model).get("sample"),
            len(model.tokenizer),
        )

    def problem(self) -> str | None:
        """Return the difference from the snapshot, or None."""
        weights, *openings = self.now()
        if weights != self.before[0]:
            return "weights differ from those before"
        names = ("guidance", "guard", "around", "attention processors", "sample", "tokenizer")
        left = [name for name, a, b in zip(names, openings, self.before[1:], strict=True) if a != b]
        return f"{' and '.join(left)} left changed" if left else None


def gap(a: Tensor, b: Tensor) -> str | None:
    """Return the difference of two images expected to be equal, or None.

    Kernels in fp32 round differently with the batch; a difference of more than 4 grey levels, or on more than 2 % of
    the values, is the plugin's doing.
    """
    apart = (a.int() - b.int()).abs()
    close = int(apart.max()) <= 4 and float((apart > 0).float().mean()) <= 0.02
    return None if close else f"largest difference {int(apart.max())} grey levels"


def disturb(number: int) -> None:
    """Reseed the global generators: no result of a plugin may depend on them."""
    import random

    import numpy as np

    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
