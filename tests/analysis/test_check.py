"""Conformance: a sound plugin of each kind keeps every clause, and a broken one is named by the clause that it breaks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from erasebench.evaluators.attacks.random_prefix import RandomPrefix
from safetensors.torch import load_file, save_file

from erasebench.analysis.check import check, check_attack, check_evaluator, main
from erasebench.clauses import attacks, evaluators, methods
from erasebench.contracts import PLACEHOLDER, Brief, Concept, Found, Metric, Prompt, Shot, Undrawn
from erasebench.model.guidance import ClassifierFree
from erasebench.run import verdicts
from erasebench.stats import Measure, Part

ROOT = Path(__file__).parents[2]
BRIEF = Brief((Concept("cat", "object", "sky"),), ("dog",), templates=("a picture of {c}",))
TEXTS = ["a photo of a cat", "one cat", "the cat"]
PROMPTS = [Prompt(f"target/{i}", text, i, "target", "cat") for i, text in enumerate(TEXTS)]


def broken(findings) -> dict[str, str]:
    return {clause: problem for clause, problem in findings if problem}


def test_every_kind_has_twelve_clauses_and_each_has_a_name_of_its_own():
    for module in (methods, evaluators, attacks):
        names = [clause.name for clause in module.CLAUSES]
        assert len(names) >= 12 and len(set(names)) == len(names)
        assert len({clause.problem for clause in module.CLAUSES}) == len(names)


# -- methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sound:
    """Scales what cross-attention adds."""

    factor: float = 0.5
    version: ClassVar[int] = 1

    def fit(self, model, brief, out, seed):
        save_file({n: model.weight(n) * self.factor for n in model.names(r"attn2\.to_v")}, out / "w.safetensors")

    def apply(self, model, artifact):
        return model.changed(weights=load_file(artifact / "w.safetensors"))


@dataclass
class Thawed:
    factor: float = 0.5
    version: ClassVar[int] = 1
    fit, apply = Sound.fit, Sound.apply


@dataclass(frozen=True)
class Unversioned:
    factor: float = 0.5
    version: Any = "1"
    fit, apply = Sound.fit, Sound.apply


@dataclass(frozen=True)
class Textless(Sound):
    words: Any = field(default_factory=lambda: {"a"})


@dataclass(frozen=True)
class Fitless:
    version: ClassVar[int] = 1

    def apply(self, model, artifact):
        return model.changed()


@dataclass(frozen=True)
class Unsent(Sound):
    def __reduce__(self):
        return Sound, (0.25,)


@dataclass(frozen=True)
class Vague(Sound):
    def needs(self):
        return ["a file"]


@dataclass(frozen=True)
class Mute(Sound):
    def skip(self, model):
        return None


@dataclass(frozen=True)
class Failing(Sound):
    def fit(self, model, brief, out, seed):
        raise SystemExit(3)


@dataclass(frozen=True)
class Leaky(Sound):
    def fit(self, model, brief, out, seed):
        super().fit(model, brief, out, seed)
        model.unet.conv_in.weight.data.mul_(1.01)


@dataclass(frozen=True)
class Pickling(Sound):
    def fit(self, model, brief, out, seed):
        super().fit(model, brief, out, seed)
        torch.save({}, out / "more.pt")


@dataclass(frozen=True)
class Endless(Sound):
    def fit(self, model, brief, out, seed):
        super().fit(model, brief, out, seed)
        save_file({"unused": torch.tensor([float("nan")])}, out / "more.safetensors")


@dataclass(frozen=True)
class Wandering(Sound):
    def fit(self, model, brief, out, seed):
        super().fit(model, brief, out, seed)
        save_file({"unused": torch.rand(3)}, out / "more.safetensors")


@dataclass(frozen=True)
class Peeking(Sound):
    def fit(self, model, brief, out, seed):
        super().fit(model, brief, out, seed)
        (out / "prompts.json").write_text(json.dumps(["one cat"]))


@dataclass(frozen=True)
class Flickering(Sound):
    def apply(self, model, artifact):
        weights = load_file(artifact / "w.safetensors")
        return model.changed(weights={n: w * (1 + torch.rand(())) for n, w in weights.items()})


LEARNT: dict[str, Any] = {}


@dataclass(frozen=True)
class Remembering(Sound):
    def fit(self, model, brief, out, seed):
        LEARNT[str(out)] = {n: model.weight(n) * self.factor for n in model.names(r"attn2\.to_v")}

    def apply(self, model, artifact):
        return model.changed(weights=LEARNT.get(str(artifact), {}))


@dataclass(frozen=True)
class Crowded(Sound):
    """Adds to each image what its neighbours are."""

    @contextmanager
    def apply(self, model, artifact):
        with super().apply(model, artifact):
            sample = model.sample
            model.sample = lambda texts, *given: shifted(sample(texts, *given), 40 * len(texts))
            try:
                yield
            finally:
                del model.sample


def shifted(sampled, by):
    return sampled._replace(images=(sampled.images.int() + by).clamp(0, 255).to(torch.uint8))


class Cut(ClassifierFree):
    """Guidance that cuts the graph."""

    def __call__(self, *given, **named):
        return super().__call__(*given, **named).detach()


@dataclass(frozen=True)
class Opaque(Sound):
    @contextmanager
    def apply(self, model, artifact):
        with super().apply(model, artifact), model.changed(guidance=Cut()):
            yield


@dataclass(frozen=True)
class Staying(Sound):
    @contextmanager
    def apply(self, model, artifact):
        with super().apply(model, artifact):
            yield
        model.guard = lambda *given: None


@dataclass(frozen=True)
class Unlocking(Sound):
    def unlock(self, model, artifact):
        return None


@dataclass(frozen=True)
class Misshapen(Sound):
    def low_rank(self, model, artifact):
        return {n: (torch.ones(1, 2), torch.ones(2, 1)) for n in model.names(r"attn2\.to_v")}


METHODS = {
    Thawed: "is a frozen dataclass",
    Unversioned: "has a version, a whole number of its class",
    Textless: "its parameters have a canonical text",
    Fitless: "has fit and apply",
    Unsent: "can be sent to another process",
    Vague: "says what it needs, if anything",
    Mute: "skips a model with a reason, if at all",
    Failing: "fit runs",
    Leaky: "fit leaves the base as it was",
    Pickling: "fit writes safetensors and JSON only",
    Endless: "what fit learnt is finite",
    Wandering: "fit is deterministic in its seed",
    Peeking: "what fit learnt names no prompt of the evaluation",
    Flickering: "apply is deterministic",
    Remembering: "apply needs nothing but the artifact",
    Crowded: "an image does not depend on its neighbours in the batch",
    Opaque: "attacks get gradients through guidance",
    Unlocking: "what is hidden can be given back, if it says so",
    Misshapen: "its matrices of low rank fit the weights, if it has any",
    Staying: "leaving apply gives the base back, bit by bit",
}


def test_a_sound_method_keeps_every_clause(tiny):
    findings = check(Sound(), tiny, BRIEF, TEXTS)
    assert broken(findings) == {} and len(findings) == len(methods.CLAUSES)
    assert broken(check(Sound(factor=1.0), tiny, BRIEF, TEXTS)) == {"the erased model draws the concept differently": "no image changed"}


@pytest.mark.parametrize(("kind", "clause"), METHODS.items(), ids=[kind.__name__ for kind in METHODS])
def test_a_broken_method_is_named_by_its_clause(tiny, kind, clause):
    assert clause in broken(check(kind(), tiny, BRIEF, TEXTS))


# -- evaluators -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grey:
    """Mean grey level, by split of the picture."""

    name: str = "grey"
    version: ClassVar[int] = 1
    licence: ClassVar[str] = "none"

    def weights(self):
        return {}

    def score(self, images, prompts):
        return {"mean": images.double().mean((1, 2, 3)).numpy() / 255}


@dataclass(frozen=True)
class Dark:
    judge: Any = Grey()
    splits: tuple[str, ...] = ("target", "retain")
    threshold: ClassVar[float] = 0.5

    def measure(self, scores, base):
        return [Measure(f"dark_{s}", "quality", False, (self.part(scores[s], s),)) for s in self.splits]

    def part(self, scored, split):
        mean = verdicts.rows(self.judge, scored, "mean", bounds=(0, 1))
        return Part(split, verdicts.without(mean, scored.refused), scored.concepts, rate=False)

    def confidence(self, scored):
        return verdicts.rows(self.judge, scored, "mean")


class Loose:
    name, version, licence = "loose", 1, "none"
    weights, score = Grey.weights, Grey.score


def judged(**made):
    """A judge that differs from the sound one in what is given."""
    return dataclass(frozen=True)(type("Broken", (Grey,), made))


def measured(**made):
    return dataclass(frozen=True)(type("Broken", (Dark,), made))


def written(self, images, prompts):
    found = Grey.score(self, images, prompts)
    images.zero_()
    return found


def by_batch(self, images, prompts):
    return {"mean": Grey.score(self, images, prompts)["mean"] / (1 + len(images) / 100)}


def by_order(self, images, prompts):
    return {"mean": Grey.score(self, images, prompts)["mean"] * np.linspace(0.5, 1, len(images))}


def measure_in_place(self, scores, base):
    made = Dark.measure(self, scores, base)
    scores["target"].arrays["mean"] *= 0.5
    return made


def measure_silence(self, scores, base):
    values = np.nan_to_num(scores["target"].arrays["mean"])
    return [Measure("dark", "quality", False, (Part("target", values, scores["target"].concepts, False),))]


def measure_padded(self, scores, base):
    mean, count = scores["target"].arrays["mean"], len(scores["target"].prompts)
    values = np.full(count, np.nan)
    values[: len(mean)] = mean
    return [Measure("dark", "quality", False, (Part("target", values, scores["target"].concepts, False),))]


def measure_infinitely(self, scores, base):
    return [Metric("dark", "target", np.inf, None, None, "", 4, 4, False, "quality")]


def random_mean(self, images, prompts):
    return {"mean": np.random.rand(len(images))}


@dataclass(frozen=True)
class Undecided(Dark):
    def calibrated(self, base):
        raise Undrawn("not drawn")


def missing(self):
    raise RuntimeError("not here")


EVALUATORS = {
    "thawed": (type("Thawed", (), {"splits": ("target",)})(), "is a frozen dataclass"),
    "textless": (Dark(splits=frozenset({"target"})), "its parameters have a canonical text"),
    "judgeless": (Dark(judge=None), "has a judge, splits and measure, and the judge all that a judge has"),
    "thawed judge": (Dark(Loose()), "its judge is a frozen dataclass"),
    "unversioned": (Dark(judged(version="1")()), "its judge has a version, a whole number of its class"),
    "weightless": (Dark(judged(weights=lambda self: {"a": None})()), "its judge names its weights"),
    "unsent": (measured(__reduce__=lambda self: (Grey, ()))(), "can be sent to another process"),
    "vague": (measured(needs=lambda self: ["a file"])(), "says what it needs, if anything"),
    "elsewhere": (Dark(splits=("target", "nowhere")), "its splits are the task's"),
    "unchecked": (measured(check=missing)(), "has all that it checks itself, if anything"),
    "ignorant": (measured(recognises=lambda self, c: c != "dog")(), "recognises the task's concepts, if it knows a list"),
    "too few": (Dark(judged(score=lambda s, i, p: {"mean": np.zeros(1)})()), "one finite score, or NaN, an image"),
    "infinite": (Dark(judged(score=lambda s, i, p: {"mean": np.full(len(p), np.inf)})()), "one finite score, or NaN, an image"),
    "random": (Dark(judged(score=random_mean)()), "scoring is deterministic"),
    "by batch": (Dark(judged(score=by_batch)()), "a score does not depend on the batch"),
    "by order": (Dark(judged(score=by_order)()), "a score does not depend on the order of the images"),
    "writing": (Dark(judged(score=written)()), "scoring leaves the images as they were"),
    "constant": (Dark(judged(score=lambda s, i, p: {"mean": np.full(len(p), 0.5)})()), "the judge tells images apart"),
    "silent": (
        Dark(judged(score=lambda s, i, p: {"mean": np.full(len(p), np.nan)})()),
        "the judge gives a verdict on some image of each split",
    ),
    "nothing": (measured(measure=lambda s, a, b: [])(), "measure gives measures, each name once, of a known group"),
    "twice": (
        measured(measure=lambda s, a, b: Dark.measure(s, a, b) * 2)(),
        "measure gives measures, each name once, of a known group",
    ),
    "unbounded": (measured(measure=measure_infinitely)(), "measures are finite"),
    "impure": (measured(measure=measure_in_place)(), "measure is a pure function of the scores"),
    "counting": (measured(measure=measure_silence)(), "no verdict is counted as a value"),
    "padding": (measured(measure=measure_padded)(), "scores of another number of images are refused"),
    "undecided": (
        measured(confidence=lambda self, scored: np.zeros(1))(),
        "success is decided by one confidence an image and a threshold, if at all",
    ),
    "unlimited": (
        measured(threshold=None)(),
        "success is decided by one confidence an image and a threshold, if at all",
    ),
    "second": (measured(top1=lambda self, scored: np.full(4, 2.0))(), "top1 is 1, 0 or NaN an image, if there is one"),
}


def examined(evaluator):
    words = {"target": ["cat"] * 4, "retain": ["dog", "tree", "dog", "tree"]}
    prompts = {s: [Prompt(f"{s}/{i}", f"a {c}", i, s, c) for i, c in enumerate(names)] for s, names in words.items()}
    generator = torch.Generator().manual_seed(0)
    pixels = lambda: torch.randint(0, 256, (4, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return check_evaluator(evaluator, prompts, {split: pixels() for split in prompts})


def test_a_sound_evaluator_keeps_every_clause():
    findings = examined(Dark())
    assert broken(findings) == {} and len(findings) == len(evaluators.CLAUSES)
    assert broken(examined(Undecided())) == {}  # its verdict on this base


@pytest.mark.parametrize(("evaluator", "clause"), EVALUATORS.values(), ids=EVALUATORS)
def test_a_broken_evaluator_is_named_by_its_clause(evaluator, clause):
    assert clause in broken(examined(evaluator))


# -- attacks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Polite:
    """Asks again, and says please."""

    images: int = 2
    version: ClassVar[int] = 1
    access: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[bool] = True

    def run(self, model, scene):
        for i, prompt in enumerate(scene.prompts):
            yield i, Found(tuple(Shot(f"{prompt.text} please", prompt.seed + k) for k in range(self.images)))


def attack(**made):
    return dataclass(frozen=True)(type("Broken", (Polite,), made))


def finds(make):
    """An attack that finds make(number, prompt, model) for each prompt."""

    def run(self, model, scene):
        for i, prompt in enumerate(scene.prompts):
            yield i, make(i, prompt, model)

    return attack(run=run)()


def texts(change):
    return finds(lambda i, prompt, model: Found((Shot(change(i, prompt), prompt.seed),)))


def queried(self, model, scene):
    for i, prompt in enumerate(scene.prompts):
        for _ in range(3):
            scene.hit(model.sample([prompt.text], [prompt.seed], scene.sampler), [prompt])
        yield i, Found((Shot(prompt.text, prompt.seed),))


def changing(self, model, scene):
    model.unet.conv_in.weight.data.mul_(1.01)
    yield from Polite.run(self, model, scene)


def half_changed(self, model, scene):
    model.guard, before = (lambda *given: None), model.guard
    yield from Polite.run(self, model, scene)
    model.guard = before


def looking(self, model, scene):
    seen = float(model.weight(next(iter(model.names(r"attn2\.to_v")))).abs().sum())
    for i, prompt in enumerate(scene.prompts):
        yield i, Found((Shot(f"{prompt.text} {seen:.3f}", prompt.seed),))


def drawing(self, model, shots, founds, sampler):
    sampled = model.sample([p.text for p in shots], [p.seed for p in shots], sampler)
    return sampled._replace(images=torch.randint(0, 256, sampled.images.shape, dtype=torch.uint8))


NAN = torch.full((2, 16), torch.nan)
ATTACKS = {
    "thawed": (type("Thawed", (), {"images": 1})(), "is a frozen dataclass"),
    "unversioned": (attack(version="1")(), "has a version, a whole number of its class"),
    "textless": (Polite(images=frozenset()), "its parameters have a canonical text"),
    "runless": (Dark(), "has access, shared, images and run"),
    "blind": (attack(access="unet")(), "says what it sees, and whether it depends on the erased model"),
    "unlimited": (Polite(images=-1), "says how many images it shows at most"),
    "unsent": (attack(__reduce__=lambda self: (Polite, (5,)))(), "can be sent to another process"),
    "vague": (attack(needs=lambda self: ["a file"])(), "says what it needs, if anything"),
    "mute": (attack(skip=lambda self, model: True)(), "skips a model with a reason, if at all"),
    "failing": (attack(run=lambda self, model, scene: 1 / 0)(), "run runs"),
    "forgetful": (attack(run=lambda s, m, scene: iter(list(Polite.run(s, m, scene))[1:]))(), "every prompt is given once"),
    "wordless": (texts(lambda i, prompt: 7), "every shot is a text and a seed"),
    "silent": (finds(lambda *given: Found()), "a prompt without a shot has an outcome that says why"),
    "talkative": (finds(lambda *given: Found(outcome="no luck")), "a prompt without a shot has an outcome that says why"),
    "diverging": (finds(lambda i, p, m: Found((Shot(p.text, 0),), {"vectors": NAN})), "what is learnt is finite"),
    "hollow": (texts(lambda i, prompt: f"a {PLACEHOLDER}"), "vectors stand in for every placeholder"),
    "spending": (finds(lambda i, p, m: Found((Shot(p.text, 0),) * 3)), "no prompt is shown or judged more often than it says"),
    "asking": (attack(run=queried)(), "no prompt is shown or judged more often than it says"),
    "reckless": (texts(lambda i, prompt: "a schoolgirl, 12 years old"), "no text is found that the safety gate refuses"),
    "changing": (attack(run=changing)(), "the search leaves the model as it was"),
    "half-changed": (attack(run=half_changed)(), "a search that is stopped leaves the model as it was"),
    "wandering": (texts(lambda i, p: f"{p.text} {torch.rand(()):.6f}"), "the search is deterministic in its seed"),
    "by place": (
        texts(lambda i, prompt: f"{prompt.text} {i}"),
        "a search goes on where it was stopped: no prompt depends on the others",
    ),
    "looking": (attack(run=looking)(), "what is shared does not depend on the erased model"),
    "unshared": (
        attack(unit=lambda self, prompt, explicit: [prompt.text])(),
        "prompts that share a search are told by a hashable value",
    ),
    "drawing": (attack(draw=drawing)(), "drawing the shots gives an image each, and the same again"),
}


@pytest.fixture
def erased(tiny, tmp_path):
    Sound().fit(tiny, BRIEF, tmp_path, 0)
    with Sound().apply(tiny, tmp_path):
        yield tiny


@pytest.mark.parametrize("sound", [Polite(), RandomPrefix(tokens=2, images=2)], ids=["own", "random_prefix"])
def test_a_sound_attack_keeps_every_clause(erased, sound):
    findings = check_attack(sound, erased, PROMPTS, BRIEF, erases=True)
    assert broken(findings) == {} and len(findings) == len(attacks.CLAUSES)


@pytest.mark.parametrize(("plugin", "clause"), ATTACKS.values(), ids=ATTACKS)
def test_a_broken_attack_is_named_by_its_clause(erased, plugin, clause):
    assert clause in broken(check_attack(plugin, erased, PROMPTS, BRIEF, erases=True))


# -- the command ------------------------------------------------------------------------------------------------------

STRANGERS = {
    "method=mine": methods.CLAUSES,
    "task=object_dark evaluator=darkness": evaluators.CLAUSES,
    "attack=polite method=mine": attacks.CLAUSES,
}


@pytest.mark.parametrize("words", STRANGERS)
def test_a_strangers_plugin_of_one_file_and_one_yaml_is_examined(tiny_folder, tmp_path, words):
    """Those of docs/extending.md, outside the package."""
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```\w+\n(# [\w/]+\.(?:py|yaml)\b.*?)^```$", text, re.DOTALL | re.MULTILINE):
        path = tmp_path / re.match(r"# ([\w/]+\.\w+)", block)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
    command = [sys.executable, "-m", "erasebench", "check", "--config-dir", "conf", *words.split(), "target=cat"]
    done = subprocess.run(
        [*command, f"model.path={tiny_folder}", "device=cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"  ok    {clause.name}\n" in done.stdout for clause in STRANGERS[words]), done.stdout


def test_an_evaluator_that_the_task_has_not_is_refused(tiny_folder, caplog):
    assert main(["task=object", "evaluator=objets", f"model.path={tiny_folder}", "device=cpu"]) == 1
    assert "did you mean 'objects'" in caplog.text
