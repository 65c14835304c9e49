"""What somebody's row may say of a run is a list: anything else is refused in one line, whatever it is made of."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from erasebench import config, options
from erasebench.contracts import ErasebenchError

ROOT = Path(__file__).resolve().parents[1]
QUICK = settings(derandomize=True, deadline=None, max_examples=100)

FOREIGN = [
    "hydra.run.dir=/tmp/x",
    "hydra.sweep.dir=x",
    "hydra.job_logging.handlers.file.filename=x",
    "hydra/job_logging=default",
    "hydra/launcher=joblib",
    "hydra.searchpath=[file://x]",
    "hydra.mode=MULTIRUN",
    "--config-dir=evil",
    "-cd",
    "--multirun",
    "+method.path=x",
    "++method.erase_scale=2",
    "+hydra.run.dir=x",
    "+new=1",
    "~method",
    "~method.erase_scale=1",
    "method@other=uce",
    "method@_global_=uce",
    "+method@x=uce",
    "method._target_=os.system",
    "method.first._target_=os.system",
    "method={_target_: os.system}",
    "method.first={_target_: os.system, command: x}",
    "world.judges.clip={a: [{_target_: os.system}]}",
    "method._partial_=true",
    "method._args_=[x]",
    "target=${oc.env:HOME}",
    "target='${oc.env:HOME}'",
    "sampler.name=${oc.decode:x}",
    "sampler={name: '${oc.env:HOME}'}",
    "target=cat,dog",
    "target=choice(cat,dog)",
    "seed=range(0,1000000)",
    "target=glob(*)",
    "seed=shuffle(1,2)",
    "method=../../../../tmp/evil",
    "method=nope",
    "world=../x",
    "attack=[../x]",
    "experiment=nope",
    "part=../x",
    "values/all=mini/uce",
    "defaults=[x]",
    "nope=1",
    "Method=uce",
    "method/x=uce",
    "method.path=/etc/passwd",
    "method.path=~/x",
    "method.path=erased.safetensors",
    "method.path=someone/repository",
    "method.folder=../x",
    "method.templates=words.txt",
    "method.vocabulary=words.txt",
    "model.path=/x",
    "model.path=relative/folder",
    "model.hub=someone/model",
    "model={path: /x}",
    "model.path=https://host/x",
    "pictures.path=pictures",
    "pictures={path: /x}",
    "pictures={path: x, start: picture}",
    "world={captions: {path: x.txt}}",
    "prompts.path=x.csv",
    "world.captions.path=x.txt",
    "world.explicit.prompts.hub=a/b",
    "world.judges.clip.pretrained=x.pt",
    "world.judges.clip.architecture=hf-hub:a/b",
    "attack.mma_image.folder=x",
    "attack.replay.source=../../x",
    "target=/etc/passwd",
    "target=file:///x",
    "target='a\nb'",
    "target=a\x1b[31m",
    "target=\ud800",
    "target=[" + "[" * 3000,
    "target=" + "x" * 100_000,
    "target",
    "",
    "=",
    "=x",
    "target={",
    "target='",
]
LEGITIMATE = [
    ["task=object", "method=uce", "target=airplane"],
    ["method=gie", "method.scale=-3"],
    ["task=celebrity", "n=10", "seed=3", "images=8"],
    ["attack=[cce,udatk]", "attack.cce.steps=10", "attacked=4"],
    ["task=style", "target='Aldo Verne'", "other_words=[misspelt]"],
    ["surrogate=[dog,horse]", "concepts=[cat, dog]"],
    ["surrogate=a\\ picture", "target=AC/DC"],
    ["model=sd14", "world=photo", "sampler.steps=30", "speed=fast"],
    ["experiment=attacks", "part=airplane"],
    ["method=age", "method.vocabulary=captions", "method.trajectories=null"],
    ["method=mace", "method.templates=null", "method.preserved=[anchor,zero]"],
    ["world.objects.cat.surrogate=a dog", "task.evaluators.objects.template='a {c}'"],
    ["model.path=embedded", "prompts.each=2"],
]


@pytest.mark.parametrize("word", FOREIGN, ids=lambda word: ascii(word)[:40])
def test_rows_may_not_say(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ErasebenchError) as caught:
        config.again(["method=uce", word])
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("words", LEGITIMATE, ids=" ".join)
def test_what_decides_a_run_is_kept_as_it_is(words):
    assert config.again(words) == words


def test_options_of_a_machine_are_no_part_of_a_row_and_are_left_out():
    theirs = [
        "results=/x",
        "track=wandb",
        "store.url=s3://x",
        "executor=ray",
        "executor.address=h:1",
        "table.name=../x",
    ]
    assert config.again(["method=uce", *theirs, "+store.url=x", "dry_run=true"]) == ["method=uce"]
    assert config.repeatable(["method=uce", *theirs]) == ("method=uce",)


def test_what_a_row_may_not_say_can_be_said_beside_it():
    for word in (
        "method.path=/x/y",
        "+world.objects.x={surrogate: sky}",
        "method._target_=mine.Method",
        "results=here",
    ):
        assert config.again(["method=uce", word], [word]) == ["method=uce", word]
    assert config.again(["model.path=...", "seed=1"], ["model.path=/x", "seed=2"]) == ["model.path=/x", "seed=2"]
    with pytest.raises(ErasebenchError, match=r"give model\.path="):
        config.again(["model.path=..."])
    for odd in ("--config-dir=x", "word", "-m"):
        with pytest.raises(ErasebenchError, match="no option"):
            config.again([], [odd])


@pytest.mark.parametrize("odd", ["", "x", "{", "null", "1", '"method=uce"', '{"method": "uce"}', "[1]", "[null]", '[["a"]]',
                                 "[" * 100_000, json.dumps(["seed=1"] * 1000), '["\\ud800"]', "NaN"])  # fmt: skip
def test_overrides_that_are_no_list_of_options_are_one_line(odd):
    try:
        assert options.command_of(Path("a.csv"), odd) == []
        assert odd == ""  # rows of before have none
    except ErasebenchError as error:
        assert re.match("a.csv: ", str(error)) and len(str(error).splitlines()) == 1


def test_allowed_options_are_those_of_the_configuration():
    known = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())
    assert options.run_keys() >= {*known} - {"defaults", "hydra", *config.ELSEWHERE}
    assert not options.run_keys() & {"hydra", "defaults", "results", "track", "store", "table", "executor", "device"}


def test_every_option_that_a_file_is_read_by_is_known_as_a_place():
    """The names by which methods, evaluators and loaders turn an option into a path."""
    named = set()
    for part in ("methods", "evaluators", "erasebench"):
        for source in (ROOT / part).rglob("*.py"):
            named |= {
                *re.findall(r"\bPath\((?:self|spec|given|config|prompts|pictures)[.\[]\"?(\w+)", source.read_text())
            }
    assert (
        named - {"results", "data", "out", "origin"} <= {*options.PLACES} and "path" in named
    )  # data, out: a script's own arguments; origin: where a module lies


def test_own_places_become_dots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("words.txt", "u", "cat"):
        (tmp_path / name).touch()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.csv").touch()
    given = {
        "method.templates=words.txt": "method.templates=...",
        "prompts.path=a/b.csv": "prompts.path=...",
        f"pictures={{path: {tmp_path}/a, start: picture}}": "pictures=...",
        "method.path=/not/there": "method.path=...",
        f"method.path={tmp_path}/x,{tmp_path}/y": "method.path=...",
        "method.variant=u": "method.variant=u",
        "target=cat": "target=cat",
        "model.hub=CompVis/stable-diffusion-v1-4": "model.hub=CompVis/stable-diffusion-v1-4",
        "method.vocabulary=captions": "method.vocabulary=captions",
    }
    assert dict(zip(given, config.repeatable([*given]), strict=True)) == given


words = st.one_of(
    st.text(max_size=40),
    st.sampled_from(FOREIGN[:70]),
    st.sampled_from([word for some in LEGITIMATE for word in some]),
    st.builds(lambda key, mark, value: f"{key}{mark}{value}", st.sampled_from(["method", "target", "world.objects", "x"]),
              st.sampled_from(["=", ".a=", "@b=", "=,"]), st.text("ab,[]{}()'\"$:~+-./\\ _", max_size=20)),
)  # fmt: skip


@QUICK
@given(st.lists(words, max_size=4), st.lists(words, max_size=2))
def test_any_command_line_is_a_command_line_or_one_line(overrides, more):
    try:
        made = config.again(overrides, more)
    except ErasebenchError as error:
        assert len(str(error).splitlines()) == 1 and str(error).isprintable()
        return
    theirs = [word for word in made if word not in more]
    assert not any(re.match(r"hydra|[-+~]", word) or "_target_" in word or "${" in word for word in theirs)
