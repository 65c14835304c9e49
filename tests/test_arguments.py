"""Words of the command line: what Hydra's grammar cannot read is told how to be quoted, and lists are lists."""

import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_cli import erasebench

from erasebench import arguments, config
from erasebench.contracts import ErasebenchError

VALUES = [
    "epoch=3-step=200.safetensors", "/x/a (v1).st", "~/x", "O'Brien", "a,b.st", "${a", "a#b", "né.txt", 'say "hi"', "a\\", "{x", "$HOME `x`",
]  # fmt: skip


def value_of(word):
    """The text that a word of a shell's command line gives its key."""
    (argument,) = shlex.split(word)
    override = OverridesParser.create().parse_override(argument)
    return OmegaConf.create({"a": override.value()}).a


@pytest.mark.parametrize("value", VALUES)
def test_the_quoted_word_gives_the_value(value):
    assert value_of(arguments.quoted("a.b", value)) == value


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=20))
def test_any_text_can_be_quoted(value):
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return  # has been quoted already
    if "\\$" in value or "\\\\" in value:
        return  # OmegaConf reads backslashes before an interpolation in its own way
    assert value_of(arguments.quoted("a.b", value)) == value


@pytest.mark.parametrize("value", [v for v in VALUES if v not in ("a,b.st", "a\\", "{x")])
def test_what_hydra_cannot_read_is_told_how_it_is_quoted(value):
    with pytest.raises(ErasebenchError) as caught:
        config.check_words(["method=checkpoint", f"method.path={value}"])
    assert f"method.path={value}" in str(caught.value)
    assert value_of(str(caught.value).partition("quote it: ")[2]) == value


def test_flags_and_their_values_are_no_values_of_keys():
    words = ["-m", "--config-dir", "a (v1)", "target=cat,dog", "~method", "+world.objects.x={surrogate: a b}", "-cd", "b=(c"]
    assert arguments.overrides_of(words) == ["target=cat,dog", "~method", "+world.objects.x={surrogate: a b}"]
    config.check_words(["-m", "--config-dir", "a (v1)", "target=cat,dog", "+world.objects.x={surrogate: a b}"])


def test_a_flag_may_stand_anywhere():
    words = ["n=1", "-m", "target=cat,dog", "--config-dir", "a b", "images=2"]
    assert arguments.flags_first(words) == ["-m", "--config-dir", "a b", "n=1", "target=cat,dog", "images=2"]


@pytest.fixture
def composed():
    GlobalHydra.instance().clear()
    with initialize_config_module("erasebench.conf", version_base="1.3"):
        yield lambda *words: compose("config", list(words))


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["concepts=dog"], "concepts", ["dog"]),
        (["concepts=[dog,bird]"], "concepts", ["dog", "bird"]),
        (["other_words=misspelt"], "other_words", ["misspelt"]),
        (["surrogate=dog"], "surrogate", "dog"),
        (["surrogate=7"], "surrogate", ["7"]),
        (["results=7"], "results", "7"),
        (["target=null"], "target", None),
        (["world.objects.cat.synonyms=puss"], "world.objects.cat.synonyms", ["puss"]),
        (["world.templates.object='a {c}'"], "world.templates.object", ["a {c}"]),
        (["world.people.erase=Bob"], "world.people.erase", ["Bob"]),
        (["method=dark_miner", "method.preserved=anchor"], "method.preserved", ["anchor"]),
        (["method=gie", "method.scales=3"], "method.scales", [3]),
        (["method=speed", "method.vocabulary=captions"], "method.vocabulary", "captions"),
        (["attack=probe_noise", "attack.probe_noise.etas=1.2"], "attack.probe_noise.etas", [1.2]),
        (["task=celebrity", "task.sizes=1"], "task.sizes", [1]),
    ],
)
def test_a_word_where_a_list_is_wanted_is_a_list_of_it(composed, words, key, value):
    made = composed(*words)
    arguments.check_values(made)
    arguments.check_plugins(made)
    found = OmegaConf.select(made, key)
    assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == value


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("target=[cat,dog]", "target=[cat,dog]: one value is needed"),
        ("target={a:1}", "target={a: 1}: one value is needed"),
        ("target=1e5", "text is needed, which is quoted"),
        ("target=true", "target=true: text is needed"),
        ("results=[a]", "results=[a]: one value is needed"),
        ("concepts=[[dog]]", "concepts=[[dog]]: a list of words is needed"),
        ("surrogate={a:1}", "surrogate={a: 1}: a list of words is needed"),
        ("prompts=own.csv", "prompts=own.csv: it has several parts, prompts.path= is one"),
        ("sampler=3", "sampler=3: it has several parts"),
        ("method.scales=x", "method.scales=x: a list of float is needed"),
        ("method.scales=[1,x]", "method.scales=[1,x]: a list of float is needed"),
    ],
)
def test_a_list_where_a_word_is_wanted_is_refused(composed, word, said):
    words = ["method=gie"] if word.startswith("method.") else []
    with pytest.raises(ErasebenchError) as caught:
        made = composed(*words, word)
        arguments.check_values(made)
        arguments.check_plugins(made)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("method=[uce]", "one method is needed; -m method=uce"),
        ("task=[object,style]", "one task is needed; -m task=object,style"),
        ("uce", "key=value is needed"),
    ],
)
def test_groups_take_one_choice(word, said):
    with pytest.raises(ErasebenchError, match=said):
        config.check_words([word])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=checkpoint", "method.path=epoch=3.st"], "error: method.path=epoch=3.st: Hydra cannot read this value: quote it"),
        (["method=checkpoint", "method.path=a,b.st"], "error: method.path=a,b.st: a comma means a sweep, which needs -m"),
        (["concepts={a: 1}"], "error: Error merging override concepts={a: 1}: Cannot merge"),
    ],
)  # fmt: skip
def test_the_command_line_answers_in_one_line(tmp_path, words, said):
    done = erasebench(*words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(said) and len(done.stderr.splitlines()) == 1
    assert not list(Path(tmp_path).iterdir())
