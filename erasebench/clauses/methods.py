"""Contract of a method."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..contracts import Brief, Eraser, IsBase, LowRank, Unlocks
from ..model.model import Model
from ..run.session import check_artifact, not_finite_in
from ..store.local import sha256_file
from . import (
    SAMPLER,
    Clause,
    Openings,
    disturb,
    gap,
    gives_reason,
    has_text,
    has_version,
    is_frozen,
    is_sent,
    says_needs,
)


@dataclass(frozen=True)
class Method:
    """Method under examination, with a model and a folder for artifacts."""

    plugin: Eraser
    model: Model
    brief: Brief
    prompts: Sequence[str]
    folder: Path

    @cached_property
    def openings(self) -> Openings:
        return Openings(self.model)

    @property
    def artifact(self) -> Path:
        return self.folder / "first"

    @property
    def seeds(self) -> list[int]:
        return list(range(len(self.prompts)))

    @cached_property
    def base(self) -> Tensor:
        return self.model.sample(self.prompts, self.seeds, SAMPLER).images

    @cached_property
    def images(self) -> Tensor:
        return self.erased(self.prompts, self.seeds)

    def erased(self, texts: Sequence[str], seeds: Sequence[int], artifact: Path | None = None) -> Tensor:
        with self.plugin.apply(self.model, artifact or self.artifact):
            return self.model.sample(texts, seeds, SAMPLER).images

    def fit(self, name: str) -> Path:
        (self.folder / name).mkdir()
        self.plugin.fit(self.model, self.brief, self.folder / name, 0)
        return self.folder / name


def has_both(method: Method) -> str | None:
    return None if isinstance(method.plugin, Eraser) else "fit or apply is missing"


def fits(method: Method) -> str | None:
    _ = method.openings, method.base  # snapshots of the model before the fit
    disturb(0)
    method.fit("first")
    return None


def is_untouched(method: Method) -> str | None:
    return "changed() was not left" if method.model.is_changed else method.openings.problem()


def writes_plain_files(method: Method) -> str | None:
    check_artifact(method.artifact)
    return None


def is_finite(method: Method) -> str | None:
    return f"{problem} is not finite" if (problem := not_finite_in(method.artifact)) else None


def repeats(method: Method) -> str | None:
    disturb(1)
    first, again = method.artifact, method.fit("again")
    names = lambda folder: {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    same = lambda name: sha256_file(first / name) == sha256_file(again / name)
    differ = (names(first) ^ names(again)) | {name for name in names(first) & names(again) if not same(name)}
    return f"{', '.join(sorted(differ))} differ between two fits with one seed" if differ else None


def knows_no_prompt(method: Method) -> str | None:
    """Return the problem if the artifact holds a prompt of the evaluation.

    A prompt that the brief itself gives is allowed.
    """
    brief = method.brief
    given = {t.replace("{c}", c.name) for t in brief.templates for c in brief.concepts} | {*brief.captions}
    texts = {text for text in method.prompts if " " in text} - given - {c.name for c in brief.concepts}
    learnt = [json.dumps(json.loads(f.read_text()), ensure_ascii=False) for f in method.artifact.rglob("*.json")]
    held = [text for text in sorted(texts) if any(json.dumps(text, ensure_ascii=False) in said for said in learnt)]
    return f"what it learnt holds the prompt {held[0]!r}, which is evaluated" if held else None


def changes_images(method: Method) -> str | None:
    same = torch.equal(method.images, method.base)
    if isinstance(method.plugin, IsBase) and method.plugin.is_base:
        return None if same else "the base must change nothing"
    return "no image changed" if same else None


def applies_equally(method: Method) -> str | None:
    disturb(2)
    again = method.erased(method.prompts, method.seeds)
    return None if torch.equal(again, method.images) else "two applications differ"


def reads_artifact_alone(method: Method) -> str | None:
    """Require an equal method with a copied artifact to draw the same."""
    copy = Path(shutil.copytree(method.artifact, method.folder / "copy"))
    other = replace(method, plugin=replace(method.plugin))  # type: ignore[type-var]  # a frozen dataclass, as checked
    same = torch.equal(other.erased(method.prompts, method.seeds, copy), method.images)
    return None if same else "a copy of the artifact erases differently: something else is remembered"


def draws_each_alone(method: Method) -> str | None:
    for i in method.seeds:
        if apart := gap(method.erased([method.prompts[i]], [i])[0], method.images[i]):
            return f"image {i} depends on its neighbours ({apart})"
    return None


def lets_gradients_through(method: Method) -> str | None:
    model = method.model
    with method.plugin.apply(model, method.artifact):
        ids = model.tokenize(method.prompts[:1])
        embeds = model.text_encoder.get_input_embeddings()(ids).detach().clone().requires_grad_(True)
        context, z = model.encode(ids=ids, token_embeds=embeds), model.noise([0])
        model.guided_eps(z, 500, context, 3.0, model.begin(context, z)).square().sum().backward()
    return None if embeds.grad is not None and embeds.grad.abs().sum() > 0 else "no gradient reaches the prompt"


def gives_back(method: Method) -> str | None:
    if problem := is_untouched(method):
        return problem
    same = torch.equal(method.model.sample(method.prompts, method.seeds, SAMPLER).images, method.base)
    return None if same else "the model draws other images than before"


def unlocks(method: Method) -> str | None:
    if not isinstance(method.plugin, Unlocks):
        return None
    with method.plugin.apply(method.model, method.artifact):
        entered = method.plugin.unlock(method.model, method.artifact)
        if not isinstance(entered, AbstractContextManager):
            return "unlock() gives no context manager"
        with entered:
            method.model.sample(method.prompts[:1], [0], SAMPLER)
    return is_untouched(method)


def is_low_rank(method: Method) -> str | None:
    if not isinstance(method.plugin, LowRank):
        return None
    for name, (up, down) in method.plugin.low_rank(method.model, method.artifact).items():
        weight = method.model.weight(name)
        if up.shape[1] != down.shape[0] or (up.shape[0], down.shape[1]) != tuple(weight.shape[:2]):
            return f"{name}: {list(up.shape)} times {list(down.shape)} is not of {list(weight.shape)}"
    return None


CLAUSES: tuple[Clause[Method], ...] = (
    Clause("is a frozen dataclass", is_frozen, essential=True),
    Clause("has a version, a whole number of its class", has_version),
    Clause("its parameters have a canonical text", has_text),
    Clause("has fit and apply", has_both, essential=True),
    Clause("can be sent to another process", is_sent),
    Clause("says what it needs, if anything", says_needs),
    Clause("skips a model with a reason, if at all", gives_reason),
    Clause("fit runs", fits, essential=True),
    Clause("fit leaves the base as it was", is_untouched),
    Clause("fit writes safetensors and JSON only", writes_plain_files),
    Clause("what fit learnt is finite", is_finite),
    Clause("fit is deterministic in its seed", repeats),
    Clause("what fit learnt names no prompt of the evaluation", knows_no_prompt),
    Clause("the erased model draws the concept differently", changes_images),
    Clause("apply is deterministic", applies_equally),
    Clause("apply needs nothing but the artifact", reads_artifact_alone),
    Clause("an image does not depend on its neighbours in the batch", draws_each_alone),
    Clause("attacks get gradients through guidance", lets_gradients_through),
    Clause("what is hidden can be given back, if it says so", unlocks),
    Clause("its matrices of low rank fit the weights, if it has any", is_low_rank),
    Clause("leaving apply gives the base back, bit by bit", gives_back),
)
