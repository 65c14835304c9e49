"""User-defined concepts: target="anything" kind=object, person, style or explicit.

The concept becomes entries of the world, so that tasks, methods and attacks treat it like any other. Its judges are
in own_judges.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import prompt_files
from .contracts import ErasebenchError, Plan, Unknown
from .gate import Refused, refuses
from .options import is_list
from .store.local import digest
from .tasks import OWN, capped, finder, gated, known, spread

TASKS = {  # tasks that erase a concept of each kind
    "object": ("object", "imagenette", "caption"),
    "person": ("celebrity", "caption"),
    "style": ("style", "caption"),
    "explicit": ("explicit", "caption"),
}
LONGEST = 200  # characters of a name
NAMED = 4  # names that a label spells out


@dataclass(frozen=True)
class Asked:
    """Options of a command line for the concept, as typed.

    `keep` may be one text file.
    """

    kind: str | None = None
    keep: tuple[str, ...] | None = None
    synonyms: tuple[str, ...] | None = None
    surrogates: tuple[str, ...] = ()
    reference: str | None = None

    def is_more(self) -> bool:
        """Return whether it sets anything beyond the world's own concepts."""
        return not (self.keep is None and self.synonyms is None and self.reference is None)


@dataclass(frozen=True)
class Own:
    """A concept that the user describes.

    `keep` and `synonyms` are None if the world sets them.
    """

    name: str
    kind: str
    keep: tuple[str, ...] | None = None
    synonyms: tuple[str, ...] | None = None

    @property
    def label(self) -> str:
        """Name in rows and tables.

        Includes the options that set its numbers apart from others of that name.
        """
        said = {"keeps": self.keep, "also": self.synonyms}
        words = [f"{what} {in_short(names)}" for what, names in said.items() if names is not None]
        return f"{self.name} ({'; '.join(words)})" if words else self.name


def in_short(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= NAMED else f"{len(names)} names {digest(names)[:8]}"


def kind_of(world: Mapping[str, Any], name: str) -> str | None:
    """Return the kind of a concept that the world knows, or None."""
    if name in world["explicit"].get("named", ()):
        return "explicit"
    try:
        return known(world, name).kind
    except Unknown:
        return None


def planned(
    task: Any, world: Mapping[str, Any], asked: Asked, n: int | None, target: str | None, images: int | None
) -> tuple[Plan, Own | None]:
    """Return (the task's plan, the user's own concept or None).

    None means that the task does not erase a concept of the user's own. Raises ErasebenchError if its kind cannot be
    guessed, or does not belong to the task.
    """
    if asked.kind and task.name not in TASKS[asked.kind]:
        raise ErasebenchError(f"task={task.name} kind={asked.kind}: of that kind is task={TASKS[asked.kind][0]}; leave task= out")
    if target is None and asked.is_more():
        raise ErasebenchError("keep=, synonyms= and reference.path= are of one concept: target= is needed")
    kind = asked.kind
    if target is None or not (asked.is_more() or kind == task.name == "explicit"):
        try:
            return task.plan(world, n, target, images), None
        except Unknown:
            kind = kind or kind_of(world, target)
            if kind is None or task.name not in TASKS[kind]:
                raise
    kind = kind or kind_of(world, target)
    if kind is None or task.name not in TASKS[kind]:
        raise ErasebenchError(f"target={target!r} in task={task.name}: {OWN}")
    own = described(target, kind, asked)
    check(own, world, asked.surrogates)
    plan = plan_of(own, task, world, n, images)
    if not asked.surrogates and any(own.name.casefold() == concept.surrogate.casefold() for concept in plan.concepts):
        raise ErasebenchError(f"surrogate= is needed: {own.name!r} is what this world draws in the place of others")
    return plan, own


def described(target: str, kind: str, asked: Asked) -> Own:
    """Return the concept with its names, each once; read the names of a file."""
    keep = asked.keep
    if keep is not None and len(keep) == 1 and is_list(keep[0]):
        keep = prompt_files.lines(keep[0], "keep")
    once = lambda names: None if names is None else tuple(dict.fromkeys(name.strip() for name in names))
    return Own(target.strip(), kind, once(keep), once(asked.synonyms))


def check(own: Own, world: Mapping[str, Any], surrogates: Sequence[str]) -> None:
    """Refuse names that contradict each other or are invalid.

    Raises ErasebenchError for these, and Refused for names that the safety gate refuses.
    """
    said = {"target": (own.name,), "keep": own.keep, "synonyms": own.synonyms, "surrogate": surrogates}
    if own.keep == ():
        raise ErasebenchError("keep=[]: name at least one concept that is to stay, or leave it out")
    for option, names in said.items():
        for name in names or ():
            if refuses(name):
                raise Refused(f"{option}=: the safety gate refuses it (docs/safety.md)")
            if not name or len(name) > LONGEST or not name.isprintable() or "{c}" in name:
                raise ErasebenchError(f"{option}={ascii(name[:80])}: a name is 1 to {LONGEST} printable characters")
    folded = {option: {name.casefold() for name in names or ()} for option, names in said.items()}
    for one, other in (("target", "keep"), ("target", "synonyms"), ("target", "surrogate"), ("synonyms", "keep")):
        if both := folded[one] & folded[other]:
            raise ErasebenchError(f"{min(both)!r} is in {one}= and in {other}=")
    phrases = world["explicit"]["phrases"]
    if own.kind != "explicit" and any(finder(phrases)(name) for names in said.values() for name in names or ()):
        raise ErasebenchError(f"{own.name!r} kind={own.kind}: what has the words {', '.join(phrases)} is kind=explicit")


def plan_of(own: Own, task: Any, world: Mapping[str, Any], n: int | None, images: int | None) -> Plan:
    """Return the task's plan of the concept.

    Its synonyms become a split, and methods are told the retain set.
    """
    plan = task.plan(entries(own, world), n, None if task.name == "explicit" else own.name, images)
    brief = plan.brief if own.keep is None else replace(plan.brief, preserved=own.keep)
    concepts, prompts = plan.concepts, plan.prompts
    if own.synonyms is not None and task.name != "caption":
        concepts = tuple(replace(concept, synonyms=own.synonyms) for concept in concepts)
        if own.synonyms and not any(p.split == "synonym" for p in prompts):
            templates, count = world["templates"][own.kind], world["counts"]["object"]["synonym"]
            prompts += tuple(capped(spread("synonym", dict.fromkeys(own.synonyms, own.name), templates, count), images))
    if own.name in world["explicit"]["phrases"]:  # judged with the task's other phrases, without a name
        prompts = tuple(replace(p, concept="") if p.concept == own.name else p for p in prompts)
    which = own.label if own.label != own.name or task.name == "explicit" else plan.which
    return gated(replace(plan, concepts=concepts, prompts=prompts, brief=brief, which=which))


def entries(own: Own, world: Mapping[str, Any]) -> dict[str, Any]:
    """Return the world with the concept added beside the retain set."""
    make = {"object": with_object, "person": with_person, "style": with_artist, "explicit": with_phrase}
    return {**world, **make[own.kind](own, world)}


def with_object(own: Own, world: Mapping[str, Any]) -> dict[str, Any]:
    surrogate = world["surrogates"]["object"]

    def among(group: Mapping[str, Any]) -> dict[str, Any]:
        entry = {"surrogate": surrogate, **world["imagenette"].get(own.name, {}), **world["objects"].get(own.name, {})}
        entry |= {} if own.synonyms is None else {"synonyms": list(own.synonyms)}
        kept = group if own.keep is None else {name: {"surrogate": surrogate} for name in own.keep}
        return {**kept, own.name: entry}

    return {group: among(world[group]) for group in ("objects", "imagenette")}


def with_person(own: Own, world: Mapping[str, Any]) -> dict[str, Any]:
    people = world["people"]
    kept = people["keep"] if own.keep is None else own.keep
    erased = dict.fromkeys([*people["erase"], own.name])
    return {"people": {"erase": list(erased), "keep": [name for name in kept if name != own.name]}}


def with_artist(own: Own, world: Mapping[str, Any]) -> dict[str, Any]:
    artists = world["artists"]
    kept = artists["keep"] if own.keep is None else own.keep
    single = artists["single"] if own.keep is None else []  # an artist erased from that list keeps the others of it
    erased = dict.fromkeys([*artists["erase"], *([] if own.name in single else [own.name])])
    kept = [name for name in kept if name != own.name]
    return {"artists": {**artists, "erase": list(erased), "keep": kept, "single": single}}


def with_phrase(own: Own, world: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries for a phrase of the user's own.

    Prompts come from the world's templates, as no table of prompts covers such a phrase.
    """
    spec, counts = world["explicit"], world["counts"]
    is_ours = own.name in (*spec["phrases"], *spec.get("named", ()))
    implicit = {name: phrases for name, phrases in spec.get("implicit", {}).items() if name == own.name}
    changed = {
        "phrases": [own.name],
        "surrogate": spec["surrogate"] if is_ours else world["surrogates"]["object"],
        "prompts": dict.fromkeys(spec["prompts"]),
        "named": [own.name],
        "implicit": implicit,
        "kept": list(own.keep or spec["kept"] or world["objects"]),
    }
    own_counts, theirs = counts["explicit"], counts["object"]
    count = {
        "target": own_counts.get("target", theirs["target"]),
        "implicit": own_counts.get("implicit", 0),
        "retain": own_counts["retain"] or theirs["retain"],
    }
    return {"explicit": {**spec, **changed}, "counts": {**counts, "explicit": count}}
