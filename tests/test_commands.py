"""The one command: verbs, help, completion, and names of before."""

import os
import subprocess
import sys

import pytest

from erasebench import cli, renames

TWO = 2  # examples, at least, in the help of a verb


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_without_a_verb_all_are_listed(capsys, words):
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_has_a_paragraph_and_examples_of_its_own(capsys, verb):
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert cli.main(["help", verb]) == 0 and capsys.readouterr().out == out
    assert f"usage: erasebench {verb}" in out
    _, _, examples = out.partition("examples:\n")
    lines = [line.strip() for line in examples.splitlines() if line.startswith("  erasebench ")]
    named = [line for line in lines if line.split()[1] == verb or (verb == "run" and "=" in line)]
    assert len(named) >= TWO and len(named) == len(lines)
    text = (cli.load(verb).__doc__ or "").split()
    assert len(text) >= 20, "a paragraph"
    assert " ".join(out.split()).find(" ".join(text)) > 0


@pytest.mark.parametrize(
    "words, verb",
    [
        (["method=uce", "n=1"], "run"),
        (["-m", "method=uce,esd"], "run"),
        (["run", "n=1"], "run"),
        (["compare", "-m", "n=1"], "compare"),
        (["+n=1"], "run"),
        (["~attack=x"], "run"),
    ],
)
def test_options_need_no_verb(words, verb):
    found, rest = cli.split(words)
    assert found == verb and rest == (words if words[0] != verb else words[1:])


def test_an_unknown_verb_is_refused_with_the_nearest(capsys):
    assert cli.main(["leaderbord", "--results", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "did you mean 'leaderboard'?" in line


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("erasebench ")


@pytest.mark.parametrize("old, verb", renames.VERBS.items())
def test_a_command_of_before_names_its_verb(old, verb):
    assert verb in cli.VERBS
    with pytest.raises(ModuleNotFoundError, match=f"`erasebench {verb}` now"):
        __import__(f"erasebench.{old}")


def test_a_command_of_before_ends_in_one_line():
    done = run("erasebench.leaderboard", "--help")
    assert done.returncode != 0 and len(done.stderr.splitlines()) == 1 and "erasebench leaderboard" in done.stderr


@pytest.mark.parametrize("old, new", renames.MODULES.items())
def test_a_module_of_before_names_where_it_is(old, new):
    with pytest.raises(ModuleNotFoundError, match=f"is erasebench.{new} now"):
        __import__(f"erasebench.{old}")
    parts = new.split(".")
    assert os.path.exists(os.path.join(os.path.dirname(renames.__file__), *parts[:-1], f"{parts[-1]}.py"))


@pytest.mark.parametrize(
    "line, among",
    [
        ("erasebench lead", "leaderboard"),
        ("erasebench leaderboard --res", "--results"),
        ("erasebench run method=uc", "method=uce"),
        ("erasebench method=uc", "method=uce"),
        ("erasebench compare targ", "target="),
    ],
)
def test_a_shell_completes(tmp_path, line, among):
    told = tmp_path / "completions"
    done = run(
        "erasebench",
        _ARGCOMPLETE="1",
        _ARGCOMPLETE_IFS="\n",
        _ARGCOMPLETE_STDOUT_FILENAME=str(told),
        COMP_LINE=line,
        COMP_POINT=str(len(line)),
    )
    assert done.returncode == 0, done.stderr
    assert among in [word.strip() for word in told.read_text().splitlines()]
