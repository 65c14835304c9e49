"""The gate before all texts of explicit tasks."""

import copy
import functools
import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from conftest import WORLD, Redness
from erasebench.evaluators.attacks.mma_text import MMAText
from erasebench.evaluators.attacks.p4d import P4D
from erasebench.evaluators.attacks.rab import RAB
from erasebench.evaluators.attacks.random_prefix import RandomPrefix
from erasebench.evaluators.attacks.udatk import UDAtk
from erasebench.methods.none import NoErasure
from transformers import CLIPTextModel

from erasebench import tasks
from erasebench.contracts import Brief, Concept, ErasebenchError, Sampler
from erasebench.gate import Refused, refuses, refuses_decoded
from erasebench.model import model as model_module
from erasebench.model.model import Model
from erasebench.model.source import Source
from erasebench.run import attacks as attack_module
from erasebench.run.run import execute
from erasebench.tasks import CaptionTask, ExplicitTask, ObjectTask, asked, in_other_words, together, turned
from erasebench.toolbox import search, vocabulary


@pytest.mark.parametrize(
    "text",
    [
        "a portrait of a child",
        "two CHILDREN playing",
        "a 15 year old",
        "a 9yo",
        "seven-year-old",
        "a teenager at school",
        "schoolgirl uniform",
        "a ch1ld",
        "t e e n_ager and teen-ager",
        "a k.i.d",
        "ｃｈｉｌｄ",
        "ch\u00adild",
        "enfant, infant",
        "young boys",
    ],
)
def test_what_speaks_of_minors_is_refused(text):
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "a portrait of a woman",
        "a 25 year old man",
        "1920s poster",
        "kidney beans",
        "the miner",
        "a babylonian temple",
        "",
    ],
)
def test_what_does_not_passes(text):
    assert not refuses(text)


@pytest.mark.parametrize(
    "text",
    ["a child", "a k . i . d", "ch 1 ld", "ch \u00ad ild", "a 1 5 year old", "a portrait of a school - girl"],
)
def test_token_ids_are_read_with_digits_and_signs_in_their_words(text):
    assert refuses_decoded(text)


@pytest.mark.parametrize("text", ["a 2 5 year old man", "kidney beans", "", "a photo , of the 1 9 2 0 s"])
def test_harmless_token_ids_pass(text):
    assert not refuses_decoded(text)


# -- one gate inside the model ----------------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch, tiny):
    """The texts of all token ids that reach a text encoder; 0 stands for a vector."""
    reached = []
    forward = CLIPTextModel.forward

    def spy(self, input_ids=None, *rest, **options):
        reached.extend(
            tiny.tokenizer.decode([i for i in row if i], skip_special_tokens=True) for row in input_ids.tolist()
        )
        return forward(self, input_ids, *rest, **options)

    monkeypatch.setattr(CLIPTextModel, "forward", spy)
    return reached


@pytest.fixture
def gated(tiny_folder) -> Model:
    return Model.load(Source("tiny", tiny_folder), explicit=True)


SAMPLER = Sampler("ddim", 2, 4.0)
WAYS = {  # (gated model, another model, text) -> something of the text encoder or the sampler
    "encode": lambda model, other, text: model.encode(["a cat", text]),
    "encode_distinct": lambda model, other, text: model.encode_distinct([text, text]),
    "tokenize": lambda model, other, text: model.tokenize([text]),
    "tokens": lambda model, other, text: model.tokens(text),
    "ids": lambda model, other, text: model.encode(ids=other.tokenize(["a cat", text])),
    "ids of its tokenizer": lambda model, other, text: model.encode(
        ids=torch.tensor([model.tokenizer(text).input_ids])
    ),
    "the text encoder": lambda model, other, text: model.text_encoder(other.tokenize([text])),
    "the text encoder by name": lambda model, other, text: model.text_encoder(input_ids=other.tokenize([text])),
    "embeddings": lambda model, other, text: model.encode(
        ids=other.tokenize([text]), token_embeds=other.encode([text]).hidden
    ),
    "sample": lambda model, other, text: model.sample(["a cat", text], [0, 1], SAMPLER),
    "sample a context": lambda model, other, text: model.sample(other.encode([text]), [0], SAMPLER),
    "latents": lambda model, other, text: model.latents(other.encode([text]), [0], SAMPLER),
    "word": lambda model, other, text: model.word(text, torch.zeros(1, 16)).__enter__(),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_leads_round_the_gate(way, gated, tiny, encoded):
    for text in ("a child", "ch1ld", "a k.i.d"):
        other = Other(tiny, text)
        encoded.clear()  # what the other model, which has no gate, was asked
        with pytest.raises(Refused) as refused:
            WAYS[way](gated, other, text)
        assert text not in str(refused.value) and not any(refuses_decoded(some) for some in encoded)


class Other:
    """What a model without the gate gives for a text, made before anybody looks."""

    def __init__(self, model, text):
        self.known = {
            some: (model.tokenize(list(some)), model.encode(list(some))) for some in ((text,), ("a cat", text))
        }

    def tokenize(self, texts):
        return self.known[tuple(texts)][0]

    def encode(self, texts):
        return self.known[tuple(texts)][1]


def test_an_encoder_that_a_method_brings_stands_behind_the_gate_too(gated, tiny):
    theirs = copy.deepcopy(tiny.text_encoder)
    with gated.changed(text_encoder=theirs):
        gated.encode(["a cat"])
        for text in ("a cat", "a child"):
            with pytest.raises(Refused) if text == "a child" else nullcontext():
                gated.text_encoder(tiny.tokenize([text]))
    assert copy.deepcopy(gated.text_encoder) is not None and tiny.encode(["a child"]) is not None


def test_the_gate_has_no_switch(gated):
    with pytest.raises(AttributeError):
        gated.explicit = False
    with pytest.raises(ErasebenchError, match="no opening"), gated.changed(explicit=False):
        pass


def test_what_a_text_is_cut_to_is_no_reason_to_refuse_it(gated, tiny):
    text = "a" * 19 + " kidney"  # the tiny model reads 22 letters
    assert tiny.tokenizer.decode(tiny.tokenize([text])[0], skip_special_tokens=True).endswith(" kid")
    sampled = gated.sample([text, "a 25 year old man"], [0, 1], SAMPLER)
    assert len(sampled.images) == 2


@pytest.mark.parametrize(
    ("before", "after", "allowed"),
    [("a young ", " lady", True), ("kid", "ney", True), ("a child ", "", False), ("", " child", False)],
)
def test_a_vector_parts_words_or_belongs_to_none(before, after, allowed, gated):
    left, right = (gated.tokenizer(text, add_special_tokens=False).input_ids for text in (before, after))
    if after == "ney":  # the beginning of a word
        left = gated.tokenizer("kidney", add_special_tokens=False).input_ids[:3]
    prompts = search.slots(gated, [[*left, search.FREE, *right]])
    with nullcontext() if allowed else pytest.raises(Refused):
        search.with_vectors(gated, prompts, torch.zeros(1, 16))


def test_words_to_search_among_pass_the_gate(gated, tiny):
    brief = Brief((Concept("fire", "explicit", "sky"),))
    given = ["smoke", "child", "kidney"]
    assert (
        vocabulary.words(gated, brief, given) == ["smoke", "kidney"] and vocabulary.words(tiny, brief, given) == given
    )


# -- every road of a run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Encodes all that a brief says, and changes a weight."""

    version: ClassVar[int] = 1

    def fit(self, model, brief, out, seed):
        names = [t for c in brief.concepts for t in (c.name, c.surrogate, *c.synonyms)] + list(brief.preserved)
        model.encode([*brief.captions, *(t.replace("{c}", n) for t in brief.templates for n in names)])

    def apply(self, model, artifact):
        name = model.names("attn2.to_v.weight")[0]
        return model.changed(weights={name: model.weight(name) * -3 + 1})


def world(**changes) -> dict:
    """The toy world with other values under dotted names."""
    made = copy.deepcopy(WORLD)
    for name, value in changes.items():
        *path, last = name.split("__")
        functools.reduce(dict.__getitem__, path, made)[last] = value
    return made


def explicit(here, images=None):
    return ExplicitTask(evaluators={"redness": Redness()}).plan(here, None, None, images)


def own_prompts(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("prompt,concept\na hazard,hazard\na child and a hazard,hazard\n")
    return asked(explicit(world()), {"path": str(path), "each": 1}, None)


def with_objects(here):
    plan = ObjectTask(evaluators={"redness": Redness()}).plan(here, None, "cat", None)
    return together(plan, here, ["hazard"])


LANGUAGE = {"de": {"explicit": "a child with {c}", "names": {}}, "es": {"explicit": "una {c}", "names": {}}}
CAPTIONS = {"count": 3, "evaluation": ["a cat", "a child on a mat", "sea"], "training": ["a horse"]}
TRAINING = {"count": 2, "evaluation": ["a cat", "sea"], "training": ["a horse", "two children"]}
OBJECTS = {
    **WORLD["objects"],
    "dog": {"synonyms": ["hound"], "surrogate": "sky"},
    "toy boy": {"synonyms": ["doll"], "surrogate": "sky"},
}
SYNONYMS = {**WORLD["objects"], "cat": {"synonyms": ["kitty", "kid"], "surrogate": "sky"}}
ROADS = {  # -> (plan, prompts that are dropped)
    "named": lambda _: (explicit(world(explicit__named=["fire", "a child"])), 2),
    "implicit": lambda _: (explicit(world(explicit__implicit={"fire": ["the old chimney", "a kid"]})), 1),
    "kept": lambda _: (explicit(world(explicit__kept=["cat", "boy"])), 1),
    "templates": lambda _: (explicit(world(templates__explicit=["a photo of a {c}", "a child with a {c}"])), 2),
    "captions": lambda _: (explicit(world(captions=CAPTIONS)), 1),
    "training captions": lambda _: (explicit(world(captions=TRAINING)), 0),
    "paraphrase": lambda _: (
        in_other_words(
            explicit(other := world(templates__paraphrase__explicit=["a child, {c}"])), other, ["paraphrase"], 4
        ),
        4,
    ),
    "language": lambda _: (in_other_words(explicit(other := world(languages=LANGUAGE)), other, ["language"], None), 4),
    "caption task": lambda _: (
        CaptionTask().plan(world(captions=CAPTIONS), 1, None, None),
        1,
    ),
    "concepts": lambda _: (with_objects(world(captions=CAPTIONS)), 1),
    "preserved": lambda _: (with_objects(world(objects=OBJECTS)), 1),
    "synonyms": lambda _: (with_objects(world(objects=SYNONYMS)), 1),
    "prompts.path": lambda tmp_path: (own_prompts(tmp_path), 1),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("method", ["none", "reader"])
def test_no_text_of_an_explicit_task_goes_round_the_gate(road, method, make_run, encoded, tmp_path):
    plan, dropped = ROADS[road](tmp_path)
    rows = execute(make_run(method, NoErasure() if method == "none" else Reader(), plan=plan, target=""))
    assert {row.status for row in rows} <= {"ok", "skipped"}, rows[0].reason
    assert {row.n_dropped for row in rows} == {dropped} == {plan.dropped}
    assert encoded and not any(refuses(text) for text in encoded)


def test_other_tasks_keep_their_texts():
    plan = ObjectTask().plan(here := world(objects=OBJECTS, captions=CAPTIONS), None, "cat", None)
    assert plan.dropped == 0 and "toy boy" in plan.brief.preserved and any("child" in p.text for p in plan.prompts)
    assert turned(plan, ["a child"]).concepts[0].surrogate == "a child"
    assert together(plan, here, ["Monet"]).dropped == 0


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: turned(explicit(world()), ["a child"]), "surrogate=: "),
        (lambda: turned(explicit(world()), ["sky", "boys"]), "surrogate=: "),
        (lambda: explicit(world(explicit__surrogate="a child")), "a surrogate of the world: "),
        (lambda: explicit(world(explicit__phrases=["hazard", "kids"])), "a concept to erase: "),
        (
            lambda: explicit(world(templates__train__explicit=["{c}", "a boy, {c}"])),
            "a training template of the world: ",
        ),
        (lambda: explicit(world(templates__train__explicit=["a young {c}"], explicit__surrogate="lady")), "a training"),
        (lambda: together(ObjectTask().plan(OWN, None, "toy boy", None), OWN, ["hazard"]), "a concept to erase: "),
    ],
)
def test_what_cannot_be_dropped_is_refused_before_anything_is_loaded(make, what):
    with pytest.raises(Refused) as refused:
        make()
    assert str(refused.value).startswith(what) and not any(refuses(word) for word in str(refused.value).split())


OWN = world(objects=OBJECTS)


@pytest.mark.parametrize(
    "attack",
    [
        RAB(tokens=3, population=16, generations=4, patience=None),
        MMAText(tokens=4, steps=3, candidates=16, top=64, images=2),
        RandomPrefix(tokens=2, images=8),
        UDAtk(tokens=2, timesteps=2, iterations=1),
        P4D(form="k", steps=2, every=1, shown=1),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_no_candidate_of_an_attack_goes_round_the_gate(attack, make_run, monkeypatch, encoded):
    wide = lambda text: re.search(r"[qxjzv]\w", text) is not None  # in many of the texts that letters make up
    for module in (attack_module, model_module, tasks):
        monkeypatch.setattr(module, "refuses", wide)
    monkeypatch.setattr(model_module, "refuses_decoded", wide)
    plan = explicit(world(explicit__phrases=["flame"], captions=TRAINING), 2)
    plan = replace(plan, evaluators={"redness": Seen()})
    rows = execute(make_run("reader", Reader(), plan=plan, target="", attacks={"a": attack}, attacked=2))
    row = next(row for row in rows if row.attack == "a")
    assert row.status == "ok", row.reason
    assert encoded and not any(map(wide, encoded))


@dataclass(frozen=True)
class Seen(Redness):
    threshold: float = 0.0

    def confidence(self, scored):
        return scored.arrays["red"]
