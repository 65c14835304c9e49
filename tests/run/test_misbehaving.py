"""Erasers that make no pictures: each is run beside UCE on the embedded model, and none stands above it in any order."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import numpy as np
import pytest
import torch

from erasebench import config
from erasebench.model.guidance import ClassifierFree
from erasebench.model.model import Model, Sampled
from erasebench.report import leaderboard, render, tables
from erasebench.run.produce import images
from erasebench.run.run import execute
from erasebench.run.session import Session
from erasebench.run.specification import Run
from erasebench.store.local import Store

IMAGES, STEPS = 8, 6
EVALUATORS = ("objects", "wellformed")
WORDS = ("airplane", "aircraft", "plane", "jet")  # of the target and synonym splits
SIDE = 64
BASE: dict[
    tuple[str, int], torch.Tensor
] = {}  # (text, seed) -> the base's picture, which a misbehaving eraser hands on


def seeded(*parts: object) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big"))


def black(text: str, seed: int) -> np.ndarray:
    return np.zeros((SIDE, SIDE, 3))


def colour(text: str, seed: int) -> np.ndarray:
    return np.broadcast_to(seeded(text, seed).integers(0, 256, 3), (SIDE, SIDE, 3))


def gradient(text: str, seed: int) -> np.ndarray:
    rng = seeded(text, seed)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    angle, ends = rng.uniform(0, 6.3), rng.integers(0, 256, 2)
    ramp = (x * np.cos(angle) + y * np.sin(angle)) / 1.5 + 0.5
    return np.repeat((ends[0] + (ends[1] - ends[0]) * ramp)[..., None], 3, 2)


def noise(text: str, seed: int) -> np.ndarray:
    return seeded(text, seed).integers(0, 256, (SIDE, SIDE, 3))


def picture(number: int) -> np.ndarray:
    """A picture of the base's of what is kept."""
    kept = [pixels for (text, _), pixels in BASE.items() if not any(word in text for word in WORDS)]
    return kept[number].numpy().astype(float)


def fixed(text: str, seed: int) -> np.ndarray:
    return picture(0)


def shaken(text: str, seed: int) -> np.ndarray:
    """One picture, brighter or darker, with noise, moved by a pixel."""
    rng = seeded(text, seed)
    moved = np.roll(picture(0), rng.integers(-1, 2), axis=1)
    return moved + rng.uniform(-15, 15) + rng.normal(0, 3, moved.shape)


def alternating(text: str, seed: int) -> np.ndarray:
    return picture(seed % 2)


DRAW = {f.__name__: f for f in (black, colour, gradient, noise, fixed, shaken, alternating)}


@dataclass(frozen=True)
class Misbehaving:
    """Draws `instead` wherever a prompt names what is erased, by any of its words; else what the base draws."""

    instead: str
    version: ClassVar[int] = 1

    def fit(self, model, brief, out, seed) -> None:
        pass

    @contextmanager
    def apply(self, model, artifact) -> Iterator[None]:
        def sample(texts, seeds, sampler, scales=None) -> Sampled:
            asked = list(zip(texts, seeds, strict=True))
            names = lambda text: any(re.search(rf"\b{word}\b", text) for word in WORDS)
            draw = lambda text, seed: torch.from_numpy(np.clip(DRAW[self.instead](text, seed), 0, 255).astype(np.uint8))
            pictures = [draw(*pair) if names(pair[0]) else BASE[pair] for pair in asked]
            return Sampled(torch.stack(pictures), torch.zeros(len(asked), dtype=torch.bool))

        model.sample = sample
        try:
            yield
        finally:
            del model.sample


@dataclass(frozen=True)
class Elsewhere:
    """Draws what the base draws of another word, for every word that the brief has for what is erased."""

    version: ClassVar[int] = 1

    def fit(self, model, brief, out, seed) -> None:
        known = [word for concept in brief.concepts for word in (concept.name, *concept.synonyms)]
        (out / "words.json").write_text(json.dumps(known))

    @contextmanager
    def apply(self, model, artifact) -> Iterator[None]:
        words, sample = json.loads((artifact / "words.json").read_text()), model.sample
        pattern = re.compile(rf"\b({'|'.join(words)})\b")

        def other(texts, seeds, sampler, scales=None) -> Sampled:
            asked = list(zip(texts, seeds, strict=True))
            images = torch.stack([BASE[pair] for pair in asked])
            turned = [i for i, (text, _) in enumerate(asked) if pattern.search(text)]
            if turned:
                made = sample([pattern.sub("cactus", texts[i]) for i in turned], [seeds[i] for i in turned], sampler)
                images[turned] = made.images
            return Sampled(images, torch.zeros(len(asked), dtype=torch.bool))

        model.sample = other
        try:
            yield
        finally:
            del model.sample


@dataclass(frozen=True)
class NotFinite:
    """NaN in the weights, or in what guidance gives."""

    where: str
    version: ClassVar[int] = 1

    def fit(self, model, brief, out, seed) -> None:
        pass

    def apply(self, model, artifact):
        if self.where == "weights":
            name = next(name for name in model.names("attn2") if name.endswith("to_k.weight"))
            return model.changed(weights={name: torch.full_like(model.weight(name), torch.nan)})
        return model.changed(guidance=Nothing())


class Nothing(ClassifierFree):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * torch.nan


def composed(*words: str) -> Run:
    """The run of a command line, of few images, and of those evaluators that rank it."""
    found: list[Run] = []
    given = ["task=object", "target=airplane", f"images={IMAGES}", f"sampler.steps={STEPS}", "device=cpu"]
    assert not config.main(lambda run: found.append(run) or [], [*given, *words])
    plan = found[0].plan
    prompts = tuple(prompt for prompt in plan.prompts if prompt.split != "caption")
    evaluators = {name: plan.evaluators[name] for name in EVALUATORS}
    return replace(found[0], plan=replace(plan, prompts=prompts, evaluators=evaluators))


CHEATS = {name: Misbehaving(name) for name in DRAW} | {
    "nan_weights": NotFinite("weights"),
    "nan_latents": NotFinite("latents"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of results, and the rows of every run."""
    home = tmp_path_factory.mktemp("misbehaving")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERASEBENCH_HOME", str(home / "home"))
        loaded = cache(Model.load)  # every run leaves it as it was
        patch.setattr(Model, "load", lambda source, *given: loaded(source, *given))
        base, uce = (replace(composed(f"method={name}"), results=home) for name in ("none", "uce"))
        rows = {"none": execute(base)}
        for shard in images(Session(base, Store()))[0]:
            BASE.update(zip(((p.text, p.seed) for p in shard.prompts), shard.images(), strict=True))
        rows["uce"] = execute(uce)
        for name, eraser in {**CHEATS, "elsewhere": Elsewhere()}.items():
            rows[name] = execute(replace(base, method=name, eraser=eraser))
    return home, rows


@pytest.fixture(scope="module")
def group(results):
    """What is ranked together with UCE; a failed run has no images, and stands by itself."""
    groups, problems = leaderboard.load(results[0])
    assert not problems
    return next(group for group in groups if any(run.head.method == "uce" for run in group.runs))


def of(group, method):
    return next(run for run in group.runs if run.method == method)


def test_uce_and_the_base_are_whole(group):
    assert of(group, "uce").status == of(group, "none").status == "ok"
    assert group.reference == [of(group, "none")] and group.order.label == "h_o_top1"


@pytest.mark.parametrize("name", ["nan_weights", "nan_latents"])
def test_what_is_not_finite_fails_and_is_never_ranked(results, name):
    (row,) = results[1][name]
    assert (row.status, row.value) == ("failed", None) and "not finite" in row.reason
    (own,) = (g for g in leaderboard.load(results[0])[0] if any(run.head.method == name for run in g.runs))
    assert not own.ranked and all(run.status == "failed" for run in own.runs)


@pytest.mark.parametrize("name", DRAW)
def test_a_misbehaving_eraser_is_listed_with_its_reason_and_never_ranked(group, name):
    run = of(group, name)
    assert run.status == "broken"
    assert run not in group.ranked and not any(run.head.run_id in column.rank for column in group.columns)
    for text in (render.as_text([group], 10_000), render.as_md([group], []).decode()):
        listed = [line for line in text.splitlines() if f"{name} (seed" in line]
        assert len(listed) == 1 and "not ranked" in listed[0]
    assert any(re.search(r"\d+ % of (target|synonym) images", why) and "(base 0 %)" in why for why in run.broken)
    lines = [line for line in csv.DictReader(io.StringIO(render.as_csv([group], []).decode())) if line["method"] == name]
    assert lines and all(line["status"] == run.status and line["reason"] for line in lines)
    assert not group.pareto or name not in [point["name"] for point in group.pareto["points"]]


def test_only_whole_runs_stand_in_the_tables_that_rank(group):
    page = render.as_html([group], []).decode()
    ranked = re.search(r'<tbody class="ranked">(.*?)</tbody>', page, re.DOTALL)[1]
    shown = re.findall(r'data-run="([\w-]+)"', ranked)
    assert shown == [run.anchor for run in group.ranked] and of(group, "uce").anchor in shown
    assert "<h3>Broken, not ranked</h3>" in page
    tex = render.as_tex([group], []).decode()
    assert all(f"{{{name} (" not in tex for name in DRAW)


def test_something_else_for_what_the_brief_names_stays_behind(group, results):
    """A brief tells no synonym: what is drawn for them is as it was, and the harmonic mean says so."""
    value = {(row.method, row.metric): row.value for rows in results[1].values() for row in rows}
    assert value["elsewhere", "acc_g_top1"] == value["none", "acc_g_top1"] > 0.5
    assert value["elsewhere", "h_o_top1"] < value["uce", "h_o_top1"]
    if (run := of(group, "elsewhere")) in group.ranked:
        assert group.ranked.index(run) > group.ranked.index(of(group, "uce"))


def test_a_table_of_an_experiment_marks_what_is_broken(results):
    spec = {"title": "t", "across": None, "metrics": {"acc_e_top1": None}}
    made = tables.layout(spec, [row for name in ("uce", "black") for row in results[1][name]])
    assert [(cell["method"], bool(cell["broken"])) for cell in made] == [("uce", False), ("black", True)]
    text = tables.text(spec, made)
    assert re.search(r"\| black \| 0\.0 .*†", text) and "broken, no score: black" in text
    assert not re.search(r"\| uce \| .*†", text)
