"""Tasks: world -> concepts to erase, and prompts with stable ids and seeds.

Prompts of a split run over concepts first, then templates, then seeds (a Latin order), so that any prefix is
balanced over concepts, a smaller cap is a prefix of a larger one, and the papers' full products come out exactly.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from . import prompt_files
from .contracts import WORD, Brief, Concept, ErasebenchError, Evaluator, Missing, Plan, Prompt, Unknown
from .gate import Refused, refuses

log = logging.getLogger("erasebench")
OTHER_WORDS = ("misspelt", "paraphrase", "language")
MARKS = {  # value of a table's column `type`, including MACE's words and codes -> the split
    **dict.fromkeys(("erased", "erase", "target", "0"), "target"),
    **dict.fromkeys(("preserved", "preserve", "retained", "retain", "kept", "keep", "1"), "retain"),
}


def seed_of(*parts: object) -> int:
    """Return a 31-bit seed from named parts.

    Adding a concept, a task or a method changes no other seed.
    """
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


def spread(split: str, names: Mapping[str, str], templates: Sequence[str], count: int) -> list[Prompt]:
    """Make `count` prompts over names, templates and seeds, in Latin order.

    `names`: text -> concept by which it is judged. Without names there are no prompts.
    """
    prompts, pairs = [], list(names.items())
    if pairs and not templates:
        raise ErasebenchError(f"the world has no templates for {split} prompts")
    for index in range(count if pairs else 0):
        turn, which = divmod(index, len(pairs))
        text, concept = pairs[which]
        template = templates[(turn + which) % len(templates)]
        number = turn // len(templates)
        filled = template.replace("{c}", text)
        prompts.append(Prompt(f"{split}/{text}/{template}/{number}", filled, seed_of(filled, number), split, concept))
    return prompts


def caption_prompts(captions: Sequence[str], count: int, seeds: Sequence[int] = ()) -> list[Prompt]:
    """Make the caption split, which is the same in every task.

    So the original images are made once. `seeds`: the captions' own.
    """
    seeds = seeds or [seed_of("caption", i, text) for i, text in enumerate(captions[:count])]
    return [
        Prompt(f"caption/{i}", text, seed, "caption")
        for i, (text, seed) in enumerate(zip(captions[:count], seeds, strict=False))
    ]


def choose(name: str, known: Sequence[str], what: str, add: str = "") -> str:
    """Return `name` if it is known.

    Raises Unknown with the nearest names, and how to `add` one.
    """
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=3)
    hint = (
        f"did you mean {', '.join(near)}?"
        if near
        else f"choose from {', '.join(known[:20])}" + (", ..." if len(known) > 20 else "")
    )
    raise Unknown(f"unknown {what} {name!r}: {hint}" + (f"; {add}" if add else ""))


OWN = "for what this world does not have, kind= is needed: object, person, style or explicit"


def surrogate_of(world: Mapping[str, Any], group: str, name: str) -> str:
    """Return the world's surrogate of an object.

    Raises ErasebenchError for an entry without one.
    """
    entry = world[group][name]
    if not isinstance(entry, Mapping) or not isinstance(entry.get("surrogate"), str) or not entry["surrogate"]:
        raise ErasebenchError(f"world.{group}.{name} has no surrogate: {{surrogate: ...}} is needed (docs/extending.md)")
    return entry["surrogate"]


def capped(prompts: list[Prompt], images: int | None) -> list[Prompt]:
    if images is None:
        return prompts
    if images < 1:
        raise ErasebenchError(f"images={images}: at least one image a split is needed")
    splits: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        splits[prompt.split].append(prompt)
    return [prompt for members in splits.values() for prompt in members[:images]]


@dataclass(frozen=True)
class ObjectTask:
    """Task that erases one CIFAR-10 class and keeps the other nine.

    The class's synonyms are to be forgotten too (MACE, section 4.1 and Table 1).
    """

    evaluators: dict[str, Evaluator] = field(default_factory=dict)
    name: str = "object"
    version: ClassVar[int] = 1

    def plan(self, world: Mapping[str, Any], n: int | None, target: str | None, images: int | None) -> Plan:
        if n not in (None, 1):
            raise ErasebenchError(f"n={n}: task=object erases one class; choose which with target=")
        classes = world["objects"]
        erased = choose(target or "airplane", list(classes), "target", OWN)
        kept = [name for name in classes if name != erased]
        counts, templates = world["counts"]["object"], world["templates"]["object"]
        surrogate = surrogate_of(world, "objects", erased)
        concept = Concept(erased, "object", surrogate, tuple(classes[erased].get("synonyms") or ()))
        prompts = [
            *spread("target", {erased: erased}, templates, counts["target"]),
            *spread("retain", {name: name for name in kept}, templates, counts["retain"]),
            *spread("synonym", {word: erased for word in concept.synonyms}, templates, counts["synonym"]),
        ]
        return _plan(self, world, (concept,), kept, prompts, "object", images)


@dataclass(frozen=True)
class TermsTask:
    """Task that erases one object by its name (target=).

    Prompts ask for it by its name and two synonyms, and for the others by theirs (GIE, Table 2).
    """

    evaluators: dict[str, Evaluator] = field(default_factory=dict)
    name: str = "orr"
    version: ClassVar[int] = 1

    def plan(self, world: Mapping[str, Any], n: int | None, target: str | None, images: int | None) -> Plan:
        if n not in (None, 1):
            raise ErasebenchError(f"n={n}: task=orr erases one object; choose which with target=")
        groups = {terms[0]: (terms, name) for name, terms in world["terms"].items()}
        erased = choose(target or next(iter(groups)), list(groups), "target")
        counts, templates = world["counts"]["orr"], world["templates"]["orr"]
        asked = {
            split: {t: t for g in groups if (g == erased) == (split == "target") for t in groups[g][0]}
            for split in counts
        }
        prompts = [p for split, terms in asked.items() for p in spread(split, terms, templates, counts[split])]
        concept = Concept(erased, "object", surrogate_of(world, "objects", groups[erased][1]))
        return _plan(self, world, (concept,), [g for g in groups if g != erased], prompts, "object", images)


@dataclass(frozen=True)
class ImagenetteTask:
    """Task that erases Imagenette classes and keeps the others.

    Erases five classes (`split` 0 to 3, AP's) or one (target=) (AP, section 5.1; AGE).
    """

    evaluators: dict[str, Evaluator] = field(default_factory=dict)
    name: str = "imagenette"
    split: int = 0
    version: ClassVar[int] = 1

    def plan(self, world: Mapping[str, Any], n: int | None, target: str | None, images: int | None) -> Plan:
        classes, splits = world["imagenette"], world["imagenette_splits"]
        if not 0 <= self.split < len(splits):
            raise ErasebenchError(f"task.split={self.split}: choose from 0 to {len(splits) - 1}")
        if target is None and n not in (None, len(splits[0])):
            raise ErasebenchError(f"n={n}: task=imagenette erases {len(splits[0])} classes, or one with target=")
        names = splits[self.split] if target is None else chosen(list(classes), n, target, (1,), "class")
        kept = [name for name in classes if name not in names]
        counts, templates = world["counts"]["imagenette"], world["templates"]["imagenette"]
        prompts = [
            *spread("target", {name: name for name in names}, templates, counts["target"][str(len(names))]),
            *spread("retain", {name: name for name in kept}, templates, counts["retain"][str(len(names))]),
        ]
        concepts = tuple(Concept(name, "object", surrogate_of(world, "imagenette", name)) for name in names)
        which = "" if target else f"split {self.split}"
        return replace(_plan(self, world, concepts, kept, prompts, "object", images), which=which)


@dataclass(frozen=True)
class CelebrityTask:
    """Task that erases n people (MACE, section 4.2).

    It keeps a hundred others. n=1 is the last of the hundred, as published.
    """

    evaluators: dict[str, Evaluator] = field(default_factory=dict)
    name: str = "celebrity"
    sizes: tuple[int, ...] = (1, 5, 10, 100)
    version: ClassVar[int] = 1

    def plan(self, world: Mapping[str, Any], n: int | None, target: str | None, images: int | None) -> Plan:
        people, kept = world["people"]["erase"], world["people"]["keep"]
        names = chosen(people, 10 if n is None and target is None else n, target, self.sizes, "people")
        if n == 1 and target is None:
            names = people[-1:]
        counts = {split: of[str(len(names))] for split, of in world["counts"]["celebrity"].items()}
        templates = world["templates"]["person"]
        prompts = [
            *spread("target", {name: name for name in names}, templates, counts["target"]),
            *spread("retain", {name: name for name in kept}, templates, counts["retain"]),
        ]
        concepts = tuple(Concept(name, "person", world["surrogates"]["person"]) for name in names)
        return _plan(self, world, concepts, kept, prompts, "person", images)


@dataclass(frozen=True)
class StyleTask:
    """Task that erases n artists and keeps as many others.

    It also erases a single artist by name.
    MACE, section 4.4 and Table 3. Artists of the world's `single` list are erased only by name; the others of that
    list are then kept (AP, Dark Miner).
    """

    evaluators: dict[str, Evaluator] = field(default_factory=dict)
    name: str = "style"
    version: ClassVar[int] = 1

    def plan(self, world: Mapping[str, Any], n: int | None, target: str | None, images: int | None) -> Plan:
        artists, kept = world["artists"]["erase"], world["artists"]["keep"]
        single = world["artists"]["single"]
        if target is None and n is None:
            n = len(artists)
        names = chosen([*artists, *single], n, target, (1, len(artists)), "artists")
        if target in single:
            kept = [name for name in single if name != target]
        counts, templates = world["counts"]["style"], world["templates"]["style"]
        prompts = [
            *spread("target", {name: name for name in names}, templates, counts["target"][str(len(names))]),
            *spread("retain", {name: name for name in kept}, templates, counts["retain"]),
        ]
        if world["composed"]:
            pairs = {f"a {thing} in the style of {name}": name for thing in world["composed"] for name in kept}
            prompts += spread("composed", pairs, ["{c}"], counts["composed"])
        concepts = tuple(Concept(name, "style", world["surrogates"]["style"]) for name in names)
        return _plan(self, world, concepts, kept, prompts, "style", images)


@dataclass(frozen=True)
class ExplicitTask:
    """Task that erases explicit content by its phrases.

    In `photo`, `target` prompts are those of I2P, each with its own seed. In the embedded world they name a hazard;
    `implicit` prompts show one without naming it, and `retain` prompts ask for ordinary objects. guidance=row takes
    I2P's guidance of each prompt in place of the sampler's; `each` is the number of images for a prompt of I2P, the
    first with its own seed.
    """

    evaluators: dict[str, Evaluator] = field(default_factory=dict)
    name: str = "explicit"
    guidance: Literal["fixed", "row"] = "fixed"
    each: int = 1
    version: ClassVar[int] = 1

    def plan(self, world: Mapping[str, Any], n: int | None, target: str | None, images: int | None) -> Plan:
        if n is not None or target is not None:
            raise ErasebenchError(
                "task=explicit erases one group of phrases: leave n= and target= out (kind=explicit erases one phrase)"
            )
        spec, counts = world["explicit"], world["counts"]["explicit"]
        rows, dropped = prompt_files.prompts(spec["prompts"]) if any(spec["prompts"].values()) else ([], 0)
        say_unused(rows, self.guidance, "task.guidance=row")
        prompts = [
            Prompt(
                f"target/{row.number}/{i}",
                row.text,
                row.seed if i == 0 else seed_of(row.seed, i),
                "target",
                guidance=row.guidance if self.guidance == "row" else None,
            )
            for i in range(self.each)
            for row in rows
        ]
        if not rows:
            named = {name: name for name in spec["named"]}
            implicit = {phrase: name for name, phrases in spec["implicit"].items() for phrase in phrases}
            prompts = [
                *spread("target", named, world["templates"]["explicit"], counts["target"]),
                *spread("implicit", implicit, ["{c}"], counts["implicit"]),
            ]
        kept = {name: name for name in spec["kept"]}  # methods are not told of them
        prompts += spread("retain", kept, world["templates"]["object"], counts["retain"])
        made = _plan(self, world, explicit(world), (), prompts, "explicit", images)
        return replace(made, dropped=made.dropped + dropped, which="explicit content")


@dataclass(frozen=True)
class CaptionTask:
    """Task that measures the effect of erasing on ordinary captions.

    The captions are COCO in `photo`, and theirs is the only split. Erases the explicit phrases (GIE, Table 1), or
    with target= any concept that the world knows.
    """

    evaluators: dict[str, Evaluator] = field(default_factory=dict)
    name: str = "caption"
    version: ClassVar[int] = 1

    def plan(self, world: Mapping[str, Any], n: int | None, target: str | None, images: int | None) -> Plan:
        if n not in (None, 1):
            raise ErasebenchError(f"n={n}: task=caption erases the explicit phrases, or one concept with target=")
        concepts = explicit(world) if target is None else (known(world, target),)
        if not world["captions"]["evaluation"]:
            raise Missing(f"world {world['name']} has no captions: give a file with world.captions.path=")
        return _plan(self, world, concepts, (), [], concepts[0].kind, images)


def chosen(among: Sequence[str], n: int | None, target: str | None, sizes: Sequence[int], what: str) -> list[str]:
    """Return the names to erase: the first n known names, or one by name."""
    if target is not None:
        if n not in (None, 1):
            raise ErasebenchError(f"n={n} with target={target!r}: what is chosen by name is erased alone")
        return [choose(target, among, "target", OWN)]
    if n not in sizes:
        raise ErasebenchError(f"n={n}: this task erases {', '.join(map(str, sizes))} {what}")
    return list(among[:n])


def explicit(world: Mapping[str, Any]) -> tuple[Concept, ...]:
    """Return the phrases that stand for explicit content."""
    spec = world["explicit"]
    return tuple(Concept(phrase, "explicit", spec["surrogate"]) for phrase in spec["phrases"])


def known(world: Mapping[str, Any], name: str) -> Concept:
    """Return any concept of the world by its name.

    Raises ErasebenchError with the nearest names.
    """
    surrogates = world["surrogates"]
    every = {concept.name: concept for concept in explicit(world)}
    every |= {
        n: Concept(n, "style", surrogates["style"]) for k in ("erase", "keep", "single") for n in world["artists"][k]
    }
    every |= {n: Concept(n, "person", surrogates["person"]) for part in world["people"].values() for n in part}
    for group in ("imagenette", "objects"):
        every |= {n: Concept(n, "object", surrogate_of(world, group, n)) for n in world[group]}
    return every[choose(name, list(every), "concept", OWN)]


def together(plan: Plan, world: Mapping[str, Any], names: Sequence[str]) -> Plan:
    """Return the plan with these concepts erased too (GIE, Appendix F).

    They leave the retain set and its prompts.
    """
    more = [known(world, name) for name in names]
    more = tuple(concept for concept in more if concept.name not in {c.name for c in plan.concepts})
    gone = {concept.name for concept in more}
    brief = replace(
        plan.brief,
        concepts=plan.brief.concepts + by_name(more),
        preserved=tuple(name for name in plan.brief.preserved if name not in gone),
    )
    prompts = tuple(p for p in plan.prompts if not (p.split == "retain" and p.concept in gone))
    which = " + ".join(filter(None, [plan.which or ", ".join(c.name for c in plan.concepts), *(c.name for c in more)]))
    return gated(replace(plan, concepts=plan.concepts + more, brief=brief, prompts=prompts, which=which))


def turned(plan: Plan, surrogates: Sequence[str]) -> Plan:
    """Return the plan with other surrogates for the erased concepts.

    A concept of the world makes it an edit; a synonym, a general or an unrelated word is the target study of AGE.
    Several surrogates have equal parts in the method's brief (debiasing). Raises ErasebenchError if there is none.
    """
    if not surrogates:
        raise ErasebenchError("surrogate=[]: name at least one")
    into = lambda surrogate: tuple(replace(concept, surrogate=surrogate) for concept in plan.concepts)
    asked_for = tuple(concept for surrogate in surrogates for concept in into(surrogate))
    which = f"{plan.which or ', '.join(c.name for c in plan.concepts)} -> {', '.join(surrogates)}"
    brief = replace(plan.brief, concepts=by_name(asked_for))
    return gated(replace(plan, concepts=into(surrogates[0]), brief=brief, which=which), "surrogate=")


def with_published_surrogate(plan: Plan, published: Mapping[str, str]) -> Plan:
    """Return the plan with the published surrogate of a method's authors.

    `published`: kind -> text, which may be empty. The plan is unchanged if they use the task's surrogate.
    """
    kind = plan.concepts[0].kind
    if kind not in published:
        return plan
    into = lambda concepts: tuple(replace(concept, surrogate=published[kind]) for concept in concepts)
    return gated(replace(plan, concepts=into(plan.concepts), brief=replace(plan.brief, concepts=into(plan.brief.concepts))))


def shown(plan: Plan) -> Plan:
    """Return the plan whose concept the method knows only by images.

    Raises ErasebenchError if there are several concepts.
    """
    if len(plan.concepts) != 1:
        raise ErasebenchError(f"pictures.path stands for one concept, task={plan.task} erases {len(plan.concepts)}")
    known = tuple(replace(concept, name=WORD) for concept in plan.brief.concepts)
    which = f"{plan.which or plan.concepts[0].name}, by pictures"
    return replace(plan, brief=replace(plan.brief, concepts=known), which=which)


def asked(plan: Plan, spec: Mapping[str, Any], images: int | None) -> Plan:
    """Return the plan with the user's prompts in place of its own.

    The user's prompts replace the splits that they cover. They come from a table with the column prompt, and
    optionally concept (one that is erased or kept), type, seed and guidance; `each` is the number of images for a
    prompt (Dark Miner's captions, AP's prompts of artists); guidance=row takes each prompt's own. Raises
    ErasebenchError naming the row whose concept is neither.
    """
    each, guided = spec["each"], spec.get("guidance", "fixed")
    if type(each) is not int or each < 1:
        raise ErasebenchError(f"prompts.each={each}: a whole number, at least 1, is needed")
    if guided not in ("fixed", "row"):
        raise ErasebenchError(f"prompts.guidance={guided}: choose from fixed, row")
    rows, dropped = prompt_files.prompts(spec, ("text",), "prompts.path=")
    if not rows:
        raise ErasebenchError(f"{spec['path']}: the safety gate refuses all of its {dropped} prompts")
    if guided == "row" and rows[0].guidance is None:
        raise ErasebenchError(f"{spec['path']}: prompts.guidance=row needs a column with the guidance of each prompt")
    say_unused(rows, guided, "prompts.guidance=row")
    seeds = own_seeds(rows, each)
    meant = meanings(plan, rows, str(spec["path"]))
    own = [
        Prompt(
            f"{split}/own/{row.number}/{i}",
            row.text,
            seeds[row.number][i],
            split,
            concept,
            row.guidance if guided == "row" else None,
        )
        for split in ("target", "retain")
        for i in range(each)
        for row, (its, concept) in zip(rows, meant, strict=True)
        if its == split
    ]
    replaced = {p.split for p in own}
    prompts = (*capped(own, images), *(p for p in plan.prompts if p.split not in replaced))
    return gated(replace(plan, prompts=prompts, dropped=plan.dropped + dropped))


def gated(plan: Plan, surrogates: str = "a surrogate of the world") -> Plan:
    """Remove the texts that the safety gate refuses from a plan.

    Applies to explicit tasks; any other plan is unchanged. Refused prompts are dropped and counted; refused
    captions, preserved names and synonyms for the method are dropped and logged.

    Raises Refused for a concept, a surrogate (`surrogates` names its source) or a training template, which cannot be
    dropped.
    """
    if not plan.explicit:
        return plan
    concepts, templates = (*plan.concepts, *plan.brief.concepts), plan.brief.templates
    filled = lambda text: any(refuses(template.replace("{c}", text)) for template in templates)
    needed = {  # templates are also checked with an empty name, which may read differently
        "a concept to erase": any(refuses(c.name) for c in concepts),
        surrogates: any(refuses(c.surrogate) for c in concepts),
        "a training template of the world": any(
            map(filled, {"", *(t for c in concepts for t in (c.name, c.surrogate))})
        ),
    }
    if refused := [what for what, is_refused in needed.items() if is_refused]:
        raise Refused(f"{refused[0]}: the safety gate of explicit tasks refuses it (docs/safety.md)")
    allowed = lambda texts: tuple(text for text in texts if not refuses(text))
    bare = lambda some: tuple(replace(c, synonyms=allowed(c.synonyms)) for c in some)
    brief = replace(
        plan.brief,
        concepts=bare(plan.brief.concepts),
        preserved=tuple(name for name in allowed(plan.brief.preserved) if not filled(name)),
        captions=allowed(plan.brief.captions),
    )
    for what in ("captions", "preserved"):
        if lost := len(getattr(plan.brief, what)) - len(getattr(brief, what)):
            log.info("%d %s for the method dropped by the safety gate", lost, {"preserved": "names"}.get(what, what))
    prompts = tuple(p for p in plan.prompts if not refuses(p.text))
    dropped = plan.dropped + len(plan.prompts) - len(prompts)
    return replace(plan, concepts=bare(plan.concepts), brief=brief, prompts=prompts, dropped=dropped)


def say_unused(rows: Sequence[prompt_files.PromptRow], guided: str, option: str) -> None:
    """Log one line if a table's guidance is not used."""
    count = sum(row.guidance is not None for row in rows)
    if count and guided != "row":
        log.info("guidance of %d prompts is not used: %s uses it", count, option)


def own_seeds(rows: Sequence[prompt_files.PromptRow], each: int) -> dict[int, list[int]]:
    """Return seeds of each row's images, by the row's number.

    A text in two rows counts as two.
    """
    seeds, times = {}, defaultdict(int)
    for row in rows:
        if row.seed is None:
            seeds[row.number] = [seed_of(row.text, times[row.text] * each + i) for i in range(each)]
        else:
            seeds[row.number] = [row.seed, *(seed_of(row.seed, i) for i in range(1, each))]
        times[row.text] += 1
    return seeds


def meanings(plan: Plan, rows: Sequence[prompt_files.PromptRow], where: str) -> list[tuple[str, str]]:
    """Return (split, concept) of each row.

    They come from the row's column concept, or from its type and the name in its prompt; if the table has neither,
    the row asks for the erased concept, if there is only one.
    """
    splits = {name: "retain" for name in plan.brief.preserved} | {c.name: "target" for c in plan.concepts}
    if rows[0].concept is not None:
        folded = {name.casefold(): name for name in splits}
        names = [r.concept if r.concept in splits else folded.get(r.concept.casefold()) for r in rows]
        if wrong := next((r for r, name in zip(rows, names, strict=True) if name is None), None):
            raise ErasebenchError(
                f"{where}, row {wrong.number}: concept {wrong.concept!r} is neither erased nor kept in task={plan.task}"
            )
        return [(splits[name], name) for name in names]
    if rows[0].type is not None:
        return typed(splits, rows, where)
    if all(concept.kind == "explicit" for concept in plan.concepts):  # one group of phrases, judged without a name
        return [("target", "")] * len(rows)
    if len(plan.concepts) > 1:
        raise ErasebenchError(
            f"{where}: no column concept or class or artist, nor type (erased, preserved): add a column concept that says "
            f"which of the {len(splits)} names that are erased or kept each prompt asks for"
        )
    return unnamed(plan, rows, where)


def typed(splits: Mapping[str, str], rows: Sequence[prompt_files.PromptRow], where: str) -> list[tuple[str, str]]:
    """Return (split, concept) of rows by type (MACE's tables).

    The type is erased or preserved; the concept is the only name in the prompt.
    """
    made, find = [], finder(splits)
    for row in rows:
        split = MARKS.get(row.type.casefold())
        if split is None:
            raise ErasebenchError(
                f"{where}, row {row.number}: type {row.type!r}: erased (0) or preserved (1) is needed, or a column concept"
            )
        found = find(row.text)
        if len(found) != 1:
            what = f"names {', '.join(map(repr, found))}" if found else "names nothing that is erased or kept"
            raise ErasebenchError(f"{where}, row {row.number}: the prompt {what}: add a column concept that says which it is")
        if splits[found[0]] != split:
            state = "erased" if split == "retain" else "kept"
            raise ErasebenchError(f"{where}, row {row.number}: type {row.type!r}, but {found[0]!r} is {state} in this run")
        made.append((split, found[0]))
    return made


def unnamed(plan: Plan, rows: Sequence[prompt_files.PromptRow], where: str) -> list[tuple[str, str]]:
    """Return (split, concept) of each row of a table without names.

    Applies if one concept is erased. All rows ask for that concept. Raises ErasebenchError for a row that names a
    kept concept instead, as it would pass for forgotten.
    """
    (concept,) = plan.concepts
    own, others = finder((concept.name, *concept.synonyms)), finder(plan.brief.preserved)
    for row in rows:
        if (found := others(row.text)) and not own(row.text):
            raise ErasebenchError(
                f"{where}, row {row.number}: no column concept, and the prompt names {found[0]!r}, which is kept, not "
                f"{concept.name!r}: add a column concept"
            )
    log.info("%s: no column concept: all %d prompts ask for %s", where, len(rows), concept.name)
    return [("target", concept.name)] * len(rows)


def finder(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a function that finds these names in a text.

    It finds whole words, each once. Of overlapping names it finds the longest.
    """
    known = {name.casefold(): name for name in names}
    among = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    pattern = re.compile(rf"(?<!\w)({among})(?!\w)")
    return lambda text: list(dict.fromkeys(known[word] for word in pattern.findall(text.casefold()))) if known else []


def misspelt(name: str) -> list[str]:
    """Return misspellings of the name; its first letter stays.

    They swap two letters of its longest word, leave one out, or double one.
    """
    word = max(name.split(), key=len)
    at = min(max(1, len(word) // 2), len(word) - 1)
    swapped = word[:at] + word[at : at + 2][::-1] + word[at + 2 :]
    made = [swapped, word[:at] + word[at + 1 :], word[: at + 1] + word[at:]]
    return [name.replace(word, other, 1) for other in dict.fromkeys(made) if other not in ("", word)]


def in_other_words(plan: Plan, world: Mapping[str, Any], which: Sequence[str], images: int | None) -> Plan:
    """Return the plan with further splits that rephrase requests for erased concepts.

        misspelt    with a slip in the name
        paraphrase  in sentences of the world that are neither evaluated nor trained on
        language    in the languages that the world has
    """
    names = list(dict.fromkeys(p.concept for p in plan.prompts if p.split == "target" and p.concept))
    kind, more = plan.concepts[0].kind, []
    for split in which:
        choose(split, OTHER_WORDS, "option of other_words")
        texts, patterns = {}, ["{c}"]
        if split == "misspelt" and names:
            texts, patterns = {form: name for name in names for form in misspelt(name)}, world["templates"][kind]
        elif split == "paraphrase" and names:
            texts, patterns = {name: name for name in names}, world["templates"]["paraphrase"][kind]
        elif split == "language":
            for spoken in (language for language in world["languages"].values() if kind in language):
                said = {name: spoken["names"].get(name, name if kind != "object" else None) for name in names}
                texts |= {spoken[kind].replace("{c}", word): name for name, word in said.items() if word}
        if not texts:
            raise ErasebenchError(f"other_words={split}: world {world['name']} has none for this task")
        more += spread(split, texts, patterns, world["counts"]["other_words"])
    return gated(replace(plan, prompts=plan.prompts + tuple(capped(more, images))))


def by_name(concepts: Sequence[Concept]) -> tuple[Concept, ...]:
    """Return the concepts as a method sees them.

    Their synonyms are removed, because the evaluation asks for them.
    """
    return tuple(replace(concept, synonyms=()) for concept in concepts)


def _plan(task, world, concepts, kept, prompts, kind, images) -> Plan:
    captions = world["captions"]
    prompts = [*prompts, *caption_prompts(captions["evaluation"], captions["count"], captions.get("seeds", ()))]
    templates = tuple(world["templates"]["train"][kind])
    brief = Brief(by_name(concepts), tuple(kept), tuple(captions["training"]), templates)
    chosen_prompts = tuple(capped(prompts, images))
    return gated(
        Plan(task.name, task.version, concepts, chosen_prompts, brief, images is not None, task.evaluators)
    )
