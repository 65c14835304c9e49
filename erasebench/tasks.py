"""Tasks: world -> concepts to erase, and prompts with stable ids and seeds.

Prompts of a split run over concepts first, then templates, then seeds (a Latin order), so that any prefix is
balanced over concepts, a smaller cap is a prefix of a larger one, and the papers' full products come out exactly.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .contracts import Brief, Concept, ErasebenchError, Evaluator, Plan, Prompt


def seed_of(*parts: object) -> int:
    """A 31-bit seed from named parts: adding a concept, a task or a method moves nobody else's."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


def spread(split: str, names: Mapping[str, str], templates: Sequence[str], count: int) -> list[Prompt]:
    """`count` prompts over names (text -> concept that it is judged as), templates and seeds, in Latin order."""
    prompts = []
    for index in range(count):
        turn, which = divmod(index, len(names))
        text, concept = list(names.items())[which]
        template = templates[(turn + which) % len(templates)]
        number = turn // len(templates)
        filled = template.replace("{c}", text)
        prompts.append(Prompt(f"{split}/{text}/{template}/{number}", filled, seed_of(filled, number), split, concept))
    return prompts


def caption_prompts(captions: Sequence[str], count: int) -> list[Prompt]:
    """Captions are a split of every task, and the same in each, so that the originals are made once."""
    return [
        Prompt(f"caption/{i}", text, seed_of("caption", i, text), "caption") for i, text in enumerate(captions[:count])
    ]


def choose(name: str, known: Sequence[str], what: str) -> str:
    """`name` if it is known, else an error with the nearest names."""
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=3)
    hint = (
        f"did you mean {', '.join(near)}?"
        if near
        else f"choose from {', '.join(known[:20])}" + (", ..." if len(known) > 20 else "")
    )
    raise ErasebenchError(f"unknown {what} {name!r}: {hint}")


def capped(prompts: list[Prompt], images: int | None) -> list[Prompt]:
    if images is None:
        return prompts
    if images < 1:
        raise ErasebenchError(f"images={images}: at least one image a split is needed")
    return [
        p
        for split in dict.fromkeys(p.split for p in prompts)
        for p in [q for q in prompts if q.split == split][:images]
    ]


@dataclass(frozen=True)
class ObjectTask:
    """Erase one CIFAR-10 class; keep the other nine; forget its synonyms too (MACE, section 4.1 and Table 1)."""

    evaluators: dict[str, Evaluator] = field(default_factory=dict)
    name: str = "object"
    version: ClassVar[int] = 1

    def plan(self, world: Mapping[str, Any], n: int | None, target: str | None, images: int | None) -> Plan:
        if n not in (None, 1):
            raise ErasebenchError(f"n={n}: task=object erases one class; choose which with target=")
        classes = world["objects"]
        erased = choose(target or "airplane", list(classes), "target")
        kept = [name for name in classes if name != erased]
        counts, templates = world["counts"]["object"], world["templates"]["object"]
        concept = Concept(erased, "object", classes[erased]["surrogate"], tuple(classes[erased]["synonyms"]))
        prompts = [
            *spread("target", {erased: erased}, templates, counts["target"]),
            *spread("retain", {name: name for name in kept}, templates, counts["retain"]),
            *spread("synonym", {word: erased for word in concept.synonyms}, templates, counts["synonym"]),
        ]
        return _plan(self, world, (concept,), kept, prompts, "object", images)


@dataclass(frozen=True)
class CelebrityTask:
    """Erase n people, keep a hundred others (MACE, section 4.2). n=1 is the last of the hundred, as published."""

    evaluators: dict[str, Evaluator] = field(default_factory=dict)
    name: str = "celebrity"
    sizes: tuple[int, ...] = (1, 5, 10, 100)
    version: ClassVar[int] = 1

    def plan(self, world: Mapping[str, Any], n: int | None, target: str | None, images: int | None) -> Plan:
        people, kept = world["people"]["erase"], world["people"]["keep"]
        if target is not None:
            if n not in (None, 1):
                raise ErasebenchError(f"n={n} with target={target!r}: a person chosen by name is erased alone")
            names = [choose(target, people, "target")]
        else:
            n = 10 if n is None else n
            if n not in self.sizes:
                raise ErasebenchError(f"n={n}: task=celebrity erases {', '.join(map(str, self.sizes))} people")
            names = people[-1:] if n == 1 else people[:n]
        counts = {split: of[str(len(names))] for split, of in world["counts"]["celebrity"].items()}
        templates = world["templates"]["person"]
        prompts = [
            *spread("target", {name: name for name in names}, templates, counts["target"]),
            *spread("retain", {name: name for name in kept}, templates, counts["retain"]),
        ]
        concepts = tuple(Concept(name, "person", world["surrogates"]["person"]) for name in names)
        return _plan(self, world, concepts, kept, prompts, "person", images)


def _plan(task, world, concepts, kept, prompts, kind, images) -> Plan:
    captions = world["captions"]
    prompts = [*prompts, *caption_prompts(captions["evaluation"], captions["count"])]
    brief = Brief(concepts, tuple(kept), tuple(captions["training"]), tuple(world["templates"]["train"][kind]))
    return Plan(
        task.name, task.version, concepts, tuple(capped(prompts, images)), brief, images is not None, task.evaluators
    )
