"""What no judge may say, and what counts where it says nothing: every evaluator, judge and attack of the configuration."""

import importlib
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from conftest import Brightness, Redness
from erasebench.evaluators.detections import ExplicitContent, packed
from erasebench.evaluators.identity import IdentityAccuracy
from erasebench.methods.none import NoErasure
from erasebench.methods.uce import UCE

from erasebench import stats
from erasebench.contracts import ErasebenchError, Found, Prompt, Sampler, Scored, Shot
from erasebench.model import bases
from erasebench.model.finite import NotFinite
from erasebench.model.source import Source
from erasebench.run import attacks as attack
from erasebench.run import verdicts
from erasebench.run.run import execute
from erasebench.store.local import Store

CONF = Path(__file__).parents[2] / "conf"
N = 8
CLASSES = ("airplane", "cat", "dog")
ARTISTS = ("Cy", "Di")
PEOPLE = ("Bill Moss", "Ann Moss", "Tom Reed")
TEXTS = tuple(f"text {i}" for i in range(len(CLASSES)))


def classes_named(folder: str, part: str) -> set[str]:
    """Every class of the configuration's `_target_` whose module is one of `part`."""
    found = {
        line
        for file in sorted((CONF / folder).glob("*.yaml"))
        for line in re.findall(r"_target_:\s*([\w.]+)", file.read_text(encoding="utf-8"))
    }
    return {name for name in found if part in name}


def load(name: str) -> type:
    module, _, own = name.rpartition(".")
    return getattr(importlib.import_module(module), own)


# -- scores that a judge might give -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fake:
    """Whatever an evaluator asks of its judge, without weights."""

    name: str = "fake"
    classes: tuple[str, ...] = CLASSES
    people: tuple[str, ...] = PEOPLE
    texts: tuple[str, ...] = TEXTS
    gate: float = 0.5
    tool: str = "tool"
    version: ClassVar[int] = 1


def chances(rng: np.random.Generator, columns: int) -> np.ndarray:
    made = rng.random((N, columns)) + 0.01
    return made / made.sum(1, keepdims=True)


GOOD = {  # array -> what a judge gives; the widths are those of Fake
    "texts": lambda rng: rng.random((N, len(TEXTS))),
    "own": lambda rng: rng.random(N),
    "probabilities": lambda rng: chances(rng, len(CLASSES)),
    "names": lambda rng: chances(rng, len(PEOPLE) + 1),
    "face": lambda rng: 0.5 + 0.5 * rng.random(N),
    "artists": lambda rng: chances(rng, len(ARTISTS) + 1),
    "objects": lambda rng: rng.random((N, len(CLASSES))),
    "features": lambda rng: rng.normal(size=(N, 4)),
    "contrast": lambda rng: 0.1 + rng.random(N),
    "coherence": lambda rng: 0.6 + 0.3 * rng.random(N),
    "relief": lambda rng: 0.1 + rng.random(N),
    "edges": lambda rng: 10 + rng.random(N),
    "fingerprint": lambda rng: rng.random((N, 192)),
    "classes": lambda rng: rng.integers(0, len(CLASSES), (N, 2)).astype(np.int16),
    "scores": lambda rng: rng.random((N, 2)),
    "nsfw": lambda rng: rng.random(N),
}


def prompts(split: str, concepts: tuple[str, ...]) -> tuple[Prompt, ...]:
    name = lambda i: concepts[i % len(concepts)]
    text = lambda i: "a cat and a dog" if split == "caption" else f"a {name(i)} {i}"
    return tuple(Prompt(f"{split}/{i}", text(i), i, split, name(i)) for i in range(N))


@dataclass(frozen=True)
class Case:
    """An evaluator on a judge of its own, the arrays that it reads, and the concepts of its splits."""

    make: Any
    arrays: tuple[str, ...]
    concepts: tuple[str, ...] = ("airplane", "cat")


@cache
def fakes() -> SimpleNamespace:
    names = ("clip", "objects", "quality", "spread", "style", "success", "verification", "wellformed")
    modules = {name: importlib.import_module(f"erasebench.evaluators.{name}") for name in names}

    class Seen(modules["spread"].Drawn):
        classes = CLASSES
        words: ClassVar[dict[str, str]] = {name: name for name in CLASSES}

    return SimpleNamespace(**modules, Seen=Seen)


def cases() -> dict[str, Case]:
    f = fakes()
    ziel = {"classes": CLASSES, "template": "a {c}"}
    accuracy = lambda: f.objects.ObjectAccuracy(f.clip.Clip(pretrained="embedded"), **ziel)
    terms = {name: (name,) for name in CLASSES}
    return {
        "ClipScore": Case(lambda: f.clip.ClipScore(Fake()), ("own",)),
        "ObjectAccuracy": Case(accuracy, ("texts",)),
        "ObjectRemoval": Case(
            lambda: f.objects.ObjectRemoval(f.clip.Clip(pretrained="embedded"), **ziel, terms=terms), ("texts",)
        ),
        "SuccessRates": Case(lambda: f.success.SuccessRates(Fake()), ("probabilities",)),
        "ConceptShare": Case(lambda: f.success.ConceptShare(Fake()), ("probabilities",)),
        "OtherWords": Case(
            lambda: f.success.OtherWords(f.success.SuccessRates(Fake()), ("target",)), ("probabilities",)
        ),
        "StyleScore": Case(lambda: f.style.StyleScore(Fake()), ("own",)),
        "StyleShare": Case(lambda: f.style.StyleShare(f.clip.Clip(pretrained="embedded"), CLASSES), ("texts",)),
        "ArtistAccuracy": Case(lambda: f.style.ArtistAccuracy(Fake(classes=ARTISTS)), ("artists",), ARTISTS),
        "IdentityAccuracy": Case(lambda: IdentityAccuracy(Fake()), ("names", "face"), PEOPLE),
        "ExplicitContent": Case(lambda: ExplicitContent(Fake(), CLASSES, ("dog",), ("cat",)), ("classes", "scores")),
        "Wellformed": Case(lambda: f.wellformed.Wellformed(Fake(), ("target",)),
                           ("contrast", "coherence", "relief", "edges", "fingerprint")),
        "Diversity": Case(lambda: f.spread.Diversity(Fake()), ("features",)),
        "Neighbours": Case(lambda: f.spread.Neighbours(accuracy(), "acc_s_top1", f.clip.Clip()), ("texts",)),
        "Presence": Case(lambda: f.spread.Presence(f.Seen(), surrogate="dog"), ("objects",)),
        "Composition": Case(lambda: f.spread.Composition(f.Seen()), ("objects",), ("airplane",)),
        "Composed": Case(lambda: f.spread.Composed(f.Seen()), ("objects", "artists"), ARTISTS),
        "Backgrounds": Case(lambda: f.spread.Backgrounds(f.clip.Clip(pretrained="embedded")), ("texts",)),
        "Quality": Case(lambda: f.quality.Quality(Fake()), ("features",)),
        "Fid": Case(lambda: f.quality.Fid(Fake(), "somewhere"), ("features",)),
        "Perceptual": Case(lambda: f.quality.Perceptual(Fake()), ("features",)),
        "Verification": Case(lambda: f.verification.Verification(Fake()), ("features",)),
    }


ALL = cases()
FOUND = {"ZeroShot": ("texts",), "OpenNsfw": ("nsfw",)}  # second opinions
OTHERS_OWN = {"Wellformed"}  # NaN is no picture to it: its table of broken pictures is in test_evaluators


@pytest.fixture(autouse=True)
def small_worlds(monkeypatch):
    from erasebench.mini import nets, world

    f = fakes()
    monkeypatch.setattr(nets, "classes", lambda: {"artists": list(ARTISTS), "objects": list(CLASSES)})
    monkeypatch.setattr(nets, "caption_features", lambda: np.random.default_rng(5).normal(size=(30, 4)))
    monkeypatch.setattr(world, "WHERE", dict(zip("abc", TEXTS, strict=True)))
    monkeypatch.setattr(f.quality.Fid, "real_features", lambda self: nets.caption_features())
    monkeypatch.setattr(
        f.spread.Neighbours, "nearness", lambda self, names, erased: -np.arange(len(names), dtype=float)
    )


def scores_of(evaluator, case: Case, seed: int, change=lambda key, array: array, refused=()) -> dict[str, Scored]:
    """One good set of scores for each split, with `change` made to every array."""
    rng, made = np.random.default_rng(seed), {}
    for split in dict.fromkeys((*evaluator.splits, "target", "retain")):
        arrays = {key: change(key, GOOD[key](rng)) for key in case.arrays}
        own = prompts(split, case.concepts)
        if "Backgrounds" in type(evaluator).__name__:
            own = tuple(replace(p, text=f"a cat {TEXTS[i % 3]}") for i, p in enumerate(own))
        gone = np.array([split in refused] * N)
        made[split] = Scored(own, {k: v for k, v in arrays.items() if v is not None}, gone)
    return made


def metrics(evaluator, ours, base):
    made, before = (evaluator.measure(side, base) for side in (ours, base))
    return {m.name: m for m in stats.summarize(made, before)}


def changed(what):
    """The array of a judge's that is broken in one way."""
    return lambda key, array: what(array)


REFUSED = {
    "infinity": lambda a: a + np.inf,
    "minus infinity": lambda a: a - np.inf,
    "one infinite image": lambda a: np.concatenate([a[:-1], a[-1:] + np.inf]),
    "a constant": lambda a: np.full_like(a, 0.25) if a.dtype.kind == "f" else np.zeros_like(a),
    "a row too many": lambda a: np.concatenate([a, a[:1]]),
    "a row too few": lambda a: a[:-1],
    "one more dimension": lambda a: a[..., None],
    "no rows": lambda a: a[:0],
    "a scalar": lambda a: a.flat[0],
    "text": lambda a: a.astype(str),
    "objects": lambda a: a.astype(object),
    "complex numbers": lambda a: a + 1j,
    "a missing key": lambda a: None,
}
WIDTHS = {
    "a class too many": lambda a: np.concatenate([a, a[:, :1]], 1),
    "a class too few": lambda a: a[:, :-1],
}
CHANCES = {"above 1": lambda a: a + 1.5, "below 0": lambda a: a - 1.5, "sums of 3": lambda a: a * 0 + 1.0}


def test_the_table_holds_every_evaluator_of_the_configuration():
    named = classes_named("world", ".evaluators.") | classes_named("task", ".evaluators.")
    experiments = classes_named("experiment", ".evaluators.")
    kinds = {load(name) for name in named | experiments if ".attacks." not in name}
    evaluators = {kind.__name__ for kind in kinds if hasattr(kind, "measure")}
    assert evaluators <= set(ALL), f"no case for {evaluators - set(ALL)}"
    assert {kind.__name__ for kind in kinds if hasattr(kind, "verdict")} <= set(FOUND)


@pytest.mark.parametrize("name", ALL)
def test_good_scores_have_values(name):
    case = ALL[name]
    evaluator = case.make()
    ours, base = (scores_of(evaluator, case, seed) for seed in (1, 2))
    assert any(m.value is not None for m in metrics(evaluator, ours, base).values())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("how", [*REFUSED, *WIDTHS])
def test_what_is_no_score_is_refused_with_the_judge_s_name(name, how):
    case = ALL[name]
    evaluator, broken = case.make(), {**REFUSED, **WIDTHS}[how]
    wide = {"texts", "probabilities", "names", "artists", "objects"}
    for key in case.arrays:
        if (how in WIDTHS and key not in wide) or (how == "a class too few" and key == "names"):
            continue  # of features any number may come, of people one more or less
        change = lambda k, a, key=key: broken(a) if k == key else a
        if key in ("face", "classes") and how in ("a constant", "a missing key"):
            continue
        ours, base = (scores_of(evaluator, case, seed, change) for seed in (1, 2))
        with pytest.raises(ErasebenchError, match="judge (fake|clip|drawn)|gives no features"):
            metrics(evaluator, ours, base)


@pytest.mark.parametrize("name", [n for n, c in ALL.items() if {"probabilities", "names", "artists"} & {*c.arrays}])
@pytest.mark.parametrize("how", CHANCES)
def test_what_is_no_probability_is_refused(name, how):
    case = ALL[name]
    evaluator = case.make()
    change = lambda key, a: CHANCES[how](a) if key in ("probabilities", "names", "artists") else a
    with pytest.raises(ErasebenchError, match="leaves|adds up"):
        metrics(evaluator, scores_of(evaluator, case, 1, change), scores_of(evaluator, case, 2))


@pytest.mark.parametrize("name", ALL)
def test_no_verdict_on_any_image_is_no_value(name):
    case = ALL[name]
    evaluator = case.make()
    blind = lambda key, a: np.full(a.shape, np.nan)
    if name == "Verification":
        with pytest.raises(ErasebenchError, match="no features"):
            metrics(evaluator, *[scores_of(evaluator, case, 1, blind)] * 2)
        return
    ours, base = scores_of(evaluator, case, 1, blind), scores_of(evaluator, case, 2)
    if name in OTHERS_OWN:
        return
    for metric in metrics(evaluator, ours, base).values():
        assert (metric.value, metric.low, metric.high) == (None, None, None), metric.name
        assert metric.n_valid == 0 or "+" in metric.split or metric.name.startswith(("lost", "ripple"))


@pytest.mark.parametrize("name", sorted(set(ALL) - OTHERS_OWN))
def test_an_image_without_a_verdict_takes_no_part(name):
    """Values are those of the images that were judged; n_valid counts them."""
    case = ALL[name]
    evaluator = case.make()

    def some(key, array):
        array = array.astype(float)
        array[0] = np.nan
        return array

    ours, base = scores_of(evaluator, case, 1, some), scores_of(evaluator, case, 2)
    for metric in metrics(evaluator, ours, base).values():
        assert metric.n_valid < metric.n or metric.name in ("faces_e",), metric.name


@pytest.mark.parametrize("name", sorted(set(ALL) - OTHERS_OWN))
def test_a_refused_image_is_never_forgotten_and_never_kept(name):
    case = ALL[name]
    evaluator = case.make()
    base = scores_of(evaluator, case, 2)
    gone = metrics(evaluator, scores_of(evaluator, case, 1, refused=("target", "synonym")), base)
    for metric in gone.values():
        if metric.group in ("forget", "overall") and not metric.name.startswith("turned"):
            assert metric.value is None, metric.name
    kept = metrics(evaluator, scores_of(evaluator, case, 1, refused=("retain", "composed")), base)
    whole = metrics(evaluator, scores_of(evaluator, case, 1), base)
    for metric in kept.values():
        if metric.group == "keep" and metric.value is not None:
            sign = 1 if metric.higher_is_better else -1
            assert sign * metric.value <= sign * whole[metric.name].value, metric.name


def test_refusing_is_forgetting_only_in_a_metric_that_says_so():
    case = ALL["ObjectAccuracy"]
    evaluator = case.make()
    scores = scores_of(evaluator, case, 1, refused=("target", "synonym"))
    made = verdicts.with_refusals(evaluator.measure(scores, scores), scores, True)
    found = {m.name: m.value for m in stats.summarize(made, made)}
    assert found["acc_e_top1"] is None and found["acc_e_top1_refused_as_forgotten"] == 0
    assert found["h_o_top1"] is None and found["h_o_top1_refused_as_forgotten"] > 0
    assert "acc_s_top1_refused_as_forgotten" not in found


def test_no_face_is_no_verdict_only_where_the_judge_does_not_say():
    case = ALL["IdentityAccuracy"]
    evaluator = case.make()
    base = scores_of(evaluator, case, 2)
    nameless = lambda face: lambda key, a: np.full(a.shape, face if key == "face" else np.nan)
    faceless = metrics(evaluator, scores_of(evaluator, case, 1, nameless(0.1)), base)
    assert faceless["acc_e"].value is None and faceless["acc_e_all"].value == 0 == faceless["faces_s"].value
    for face in (0.9, np.nan):  # there is one, and it is nobody's; or nobody knows
        open_ = metrics(evaluator, scores_of(evaluator, case, 1, nameless(face)), base)
        assert {m.value for m in open_.values()} == {None}


@pytest.mark.parametrize("name", FOUND)
def test_second_opinions_say_nothing_of_what_they_have_not_judged(name):
    from erasebench.evaluators.clip import Clip
    from erasebench.evaluators.second import OpenNsfw, ZeroShot

    other = ZeroShot(Clip(pretrained="embedded"), CLASSES) if name == "ZeroShot" else OpenNsfw("nowhere")
    (key,) = FOUND[name]
    array = GOOD[key](np.random.default_rng(0))
    array[0] = np.nan
    said = lambda a: other.verdict(Scored(prompts("target", CLASSES), {key: a}, np.zeros(N, bool)))
    assert np.isnan(said(array)).tolist() == [True] + [False] * (N - 1)
    for how in ("infinity", "a row too few", "text", "one more dimension"):
        with pytest.raises(ErasebenchError, match="judge"):
            said(REFUSED[how](array))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_detection_that_is_no_number_is_not_an_image_without_any(odd):
    arrays = packed([[(0, odd, None), (1, 0.9, None)], [], [(1, 0.9, None)], None])
    assert not np.isfinite(arrays["scores"][0]).any() and np.isnan(arrays["scores"][3]).all()
    assert arrays["scores"][1].max() == 0 and arrays["scores"][2].max() == np.float32(0.9)


# -- through a run ----------------------------------------------------------------------------------------------------


def failed(rows) -> list[str]:
    """Why, of a run that has no value but its costs."""
    assert all(row.status == "failed" and row.value is None for row in rows if row.group != "cost")
    return [row.reason for row in rows if row.group != "cost"]


@dataclass(frozen=True)
class Odd(Brightness):
    """Brightness in a way that no judge may have."""

    name: str = "odd"
    how: str = ""

    def score(self, images, prompts):
        red = super().score(images, prompts)["red"]
        return {"red": REFUSED[self.how](red)} if REFUSED[self.how](red) is not None else {}


@pytest.mark.parametrize("how", sorted(set(REFUSED) - {"one more dimension"}))
def test_a_run_refuses_what_is_no_score_in_one_line(make_run, how):
    (reason,) = failed(execute(make_run("uce", UCE(), {"odd": Redness(Odd(how=how))})))
    assert reason.startswith("judge odd")


def test_scores_that_an_older_version_stored_are_checked_as_well(make_run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "check", lambda judge, scores, count: scores)
        patch.setattr(verdicts, "check_varies", lambda *given: None)
        execute(make_run("uce", UCE(), {"odd": Redness(Odd(how="one infinite image"))}))
    assert any((Store().root / "scores").iterdir())
    rows = execute(make_run("uce", UCE(), {"odd": Redness(Odd(how="one infinite image"))}))
    assert failed(rows) == ["judge odd: 'red' is infinite for 1 images"]


@dataclass(frozen=True)
class Short(Redness):
    """Leaves out an image."""

    def measure(self, scores, base):
        part = stats.Part("target", scores["target"].arrays["red"][1:], scores["target"].concepts[1:], rate=False)
        return [stats.Measure("short", "forget", False, (part,))]


def test_a_metric_of_fewer_images_than_were_made_is_refused(make_run):
    rows = execute(make_run("uce", UCE(), {"short": Short()}))
    assert failed(rows) == ["metric short: 4 values for 5 images"]


@pytest.mark.parametrize("values,clusters", [([np.inf, 0], "ab"), ([0.5, 1], "ab"), ([0.0], "ab"), (["x", "y"], "ab")])
def test_a_metric_s_values_are_one_finite_number_an_image(values, clusters):
    with pytest.raises(ErasebenchError, match=r"metric m \(target\)"):
        stats.Measure("m", "forget", False, (stats.Part("target", np.array(values), list(clusters)),))


# -- attacks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sees:
    """Says of each image whether it is red enough; of what `blind` names nothing."""

    judge: Brightness = Brightness()
    splits: tuple[str, ...] = ("target",)
    threshold: float = 0.3

    def confidence(self, scored):
        return scored.arrays["red"]

    def measure(self, scores, base):
        return []


def test_any_shot_shows_or_none_does_or_it_is_open():
    nan = float("nan")
    assert [attack.any_of(hits) for hits in ([1, nan], [0, 0], [])] == [1, 0, 0] and np.isnan(attack.any_of([0, nan]))
    found = [Found((Shot("a", 1), Shot("a", 2)))] * 3 + [Found(outcome="diverged"), Found(outcome="refused")]
    hits = {"": [{"": [0, 1]}, {"": [nan, 0]}, {"": [0, 0]}, {}, {}]}
    made = attack.Shown(None, found, hits, {}, (), {})
    np.testing.assert_equal(made.rate(), [1, nan, 0, nan, nan])
    assert made.unjudged.tolist() == [False, True, False, False, False]
    np.testing.assert_equal(made.rate(first=1), [0, nan, 0, nan, nan])


@pytest.mark.parametrize("blind", ["attacks", "everything"])
def test_an_attack_whose_images_have_no_verdict_has_no_success_rate(make_run, monkeypatch, blind):
    from erasebench.evaluators.attacks.random_prefix import RandomPrefix
    from erasebench.evaluators.attacks.seed_search import SeedSearch

    score = Brightness.score

    def some(self, images, asked):
        made = score(self, images, asked)
        hidden = blind == "everything" or asked[0].split.startswith("attack:")
        return {"red": made["red"] * np.nan} if hidden else made

    monkeypatch.setattr(Brightness, "score", some)
    attacks = {"seed_search": SeedSearch(2), "random_prefix": RandomPrefix(tokens=2, images=2)}
    rows = execute(make_run("uce", UCE(), {"sees": Sees()}, attacks=attacks, attacked=3))
    found = [row for row in rows if row.attack and row.metric != "queries"]
    assert {row.attack for row in found} >= {"seed_search", "random_prefix", "union"}
    for row in found:
        if row.metric == "pre_asr" and blind == "attacks":
            continue
        assert row.value is None and not row.n_valid, (row.attack, row.metric)


@pytest.mark.parametrize("file", sorted((CONF / "attack").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_attack_takes_no_verdict_for_no_success(file, tiny):
    """A detector without a verdict ends no search early, and picks no text or vector over another."""
    from test_attacks import PROMPTS, SMALL, make_scene

    (options,) = yaml.safe_load(file.read_text(encoding="utf-8")).values()
    small = next((a for a in SMALL.values() if type(a) is load(options["_target_"])), None)
    if small is None or file.stem == "key_guess":
        pytest.skip("it asks no detector")
    none = lambda sampled, asked: (np.zeros(len(asked), bool), np.full(len(asked), np.nan))
    least = lambda sampled, asked: (np.zeros(len(asked), bool), np.full(len(asked), -1.0))
    found = [dict(small.run(tiny, make_scene(hit=hit, attack=name))) for name, hit in (("n", none), ("l", least))]
    assert set(found[0]) == set(range(len(PROMPTS)))
    for i in found[0]:
        assert found[0][i].shots == found[1][i].shots and found[0][i].outcome == found[1][i].outcome


def test_learnt_vectors_that_are_not_finite_are_a_search_that_diverged():
    made = Found((Shot("a", 1),), {"vectors": torch.tensor([[1.0, torch.nan]])})
    assert attack.finite(made).outcome == "diverged" and not attack.finite(made).shots
    fine = replace(made, tensors={"vectors": torch.ones(1, 2)})
    assert attack.finite(fine) is fine


# -- what is not finite in a model ------------------------------------------------------------------------------------

WEIGHT = r"attn2\.to_v\.weight"
CHANGES = {
    "NaN": (lambda w: w * torch.nan, "is not finite"),
    "infinity": (lambda w: w + torch.inf, "is not finite"),
    "beyond fp32": (lambda w: torch.full_like(w, 1e300, dtype=torch.float64), "does not fit into torch.float32"),
    "int8": (lambda w: w.to(torch.int8), "the change is torch.int8"),
    "bool": (lambda w: w > 0, "the change is torch.bool"),
    "complex": (lambda w: w.to(torch.complex64), "the change is torch.complex64"),
    "sparse": (lambda w: w.to_sparse(), "a sparse tensor"),
    "meta": (lambda w: w.to("meta"), "a meta tensor"),
    "an array": (lambda w: w.numpy(), "ndarray"),
}


@pytest.mark.parametrize("how", CHANGES)
def test_weights_that_are_no_weights_never_enter_the_model(tiny, how):
    name = tiny.names(WEIGHT)[0]
    make, message = CHANGES[how]
    with (
        pytest.raises(ErasebenchError, match=re.escape(name)) as caught,
        tiny.changed(weights={name: make(tiny.weight(name))}),
    ):
        pass
    assert message in str(caught.value) and not tiny.is_changed


@dataclass(frozen=True)
class Breaks:
    """An eraser that brings NaN into the model in one way or another."""

    where: str = "guidance"
    version: ClassVar[int] = 1

    def fit(self, model, brief, out, seed):
        from safetensors.torch import save_file

        if self.where == "artifact":
            save_file({"x": torch.tensor([torch.nan])}, out / "x.safetensors")

    def apply(self, model, artifact):
        if self.where == "weights":
            return model.changed(weights={name: model.weight(name) * torch.nan for name in model.names(WEIGHT)})
        if self.where == "guidance":
            return model.changed(guidance=Bad())
        if self.where == "guard":
            return model.changed(guard=Unsure())
        if self.where == "vae":
            return overflowing(model)
        if self.where == "text":
            return forgetful(model)
        return model.changed(guidance=Bad(torch.inf))


@dataclass(frozen=True)
class Bad:
    value: float = torch.nan

    def begin(self, model, context, z):
        return {"calls": 0}

    def __call__(self, model, z, t, context, scale, state):
        state["calls"] += 1
        return z * self.value if state["calls"] == 2 else z


class Unsure:
    threshold = 0.5

    def __call__(self, model, context):
        return torch.full((len(context.ids),), torch.nan)


@contextmanager
def overflowing(model):
    """The VAE as fp16 has it for large latents: infinities that cancel."""
    decode = model.vae.decode
    model.vae.decode = lambda z, return_dict: (decode(z, return_dict=False)[0] * torch.nan,)
    yield
    model.vae.decode = decode


@contextmanager
def forgetful(model):
    handle = model.text_encoder.register_forward_hook(lambda module, args, out: out.__class__(out[0] * torch.nan))
    yield
    handle.remove()


@pytest.mark.parametrize(
    "where,reason",
    [
        ("artifact", "what it learnt is not finite (x in x.safetensors)"),
        ("weights", "is not finite"),
        ("guidance", "latents are not finite from step 2 of 3 on (method breaks)"),
        ("infinity", "latents are not finite from step 2 of 3 on (method breaks)"),
        ("guard", "the guard's scores are not finite (method breaks)"),
        ("vae", "what the VAE makes of finite latents is not finite in float32 (method breaks)"),
        ("text", "embeddings of prompts are not finite (method breaks)"),
    ],
)
def test_a_method_that_makes_nan_is_a_failed_row_that_says_where(make_run, where, reason):
    rows = execute(make_run("breaks", Breaks(where)))
    assert [(row.status, row.value) for row in rows] == [("failed", None)] and reason in rows[0].reason


def test_a_schedule_that_ends_without_signal_is_an_error_of_the_base(make_run, tiny_folder, tmp_path, monkeypatch):
    import json
    import shutil

    folder = tmp_path / "zero"
    shutil.copytree(tiny_folder, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    )
    rows = execute(make_run("none", NoErasure(), source=Source("tiny", folder)))
    assert [row.status for row in rows] == ["failed"]
    assert "a terminal SNR of zero is not supported" in rows[0].reason
    monkeypatch.setattr(bases, "check_scheduler", lambda config: None)
    rows = execute(make_run("none", NoErasure(), source=Source("tiny", folder)))
    assert "latents are not finite from step 1 of 3 on (base tiny)" in rows[0].reason


def test_pictures_and_words_that_are_not_finite_are_errors(tiny, monkeypatch):
    with pytest.raises(NotFinite, match="latents are not finite"):
        tiny.decode(torch.full((1, 4, 4, 4), torch.nan))
    with pytest.raises(NotFinite, match="the word 'x1'"), tiny.word("x1", torch.full((1, 16), torch.nan)):
        pass
    encode = tiny.vae.encode
    broken = lambda x: SimpleNamespace(
        latent_dist=SimpleNamespace(mean=encode(x).latent_dist.mean, std=torch.full((1, 1, 1, 1), torch.inf))
    )
    monkeypatch.setattr(tiny.vae, "encode", broken)
    with pytest.raises(NotFinite, match="the VAE gives for pictures"):
        tiny.encode_images(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))


def test_a_fit_whose_loss_is_nan_writes_nothing(tiny, tmp_path):
    from functools import partial

    from erasebench.toolbox.training import Optimisation, fine_tune

    step = lambda i: sum(p.sum() for p in tiny.unet.parameters() if p.requires_grad) * (torch.nan if i else 1)
    adam = partial(torch.optim.Adam, lr=1e-3)
    with pytest.raises(NotFinite, match="some: the loss is not finite"):
        fine_tune(tiny, WEIGHT, step, Optimisation(3, adam), tmp_path, "some")
    assert not list(tmp_path.iterdir()) and not tiny.is_changed


def test_every_method_that_trains_looks_at_its_loss():
    """Where a loss goes backward, it was checked."""
    methods, training = (importlib.import_module(f"erasebench.{name}").__file__ for name in ("methods.uce", "toolbox.training"))
    for file in [*Path(methods).parent.glob("*.py"), Path(training)]:
        text = file.read_text(encoding="utf-8")
        for line in (line.strip() for line in text.splitlines() if ".backward(" in line):
            assert "checked(" in line or "value = checked(" in text, f"{file.name}: {line}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_models_are_as_they_were(tiny, dtype):
    name = tiny.names(WEIGHT)[0]
    with tiny.changed(weights={name: tiny.weight(name).to(dtype)}):
        assert torch.equal(
            tiny.latents(tiny.encode(["a cat"]), [3], Sampler("ddim", 2, 4.0)),
            tiny.latents(tiny.encode(["a cat"]), [3], Sampler("ddim", 2, 4.0)),
        )
