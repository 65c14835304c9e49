"""Values of a method for a world: which block of its file counts for which task, and what wins over them."""

import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module

from erasebench import config, config_sources

CONF = Path(__file__).resolve().parent.parent / "conf"
NAMES = lambda group: {path.stem for path in (CONF / group).glob("*.yaml")}
BLOCKS = """\
all: {steps: 1, lr: 1.0, eta: 1.0}
object: {lr: 2.0, eta: 2.0}
object_task: {eta: 3.0}
orr: {eta: 4.0}
style: {defaults: [/values/kind/mini/mine/object], lr: 5.0}
"""


@pytest.fixture
def folder(tmp_path):
    """A folder of the user's with a method, its values for the embedded world, and an experiment."""
    files = {
        "method/mine.yaml": "_target_: mine.Mine\nsteps: 0\nlr: 0.0\neta: 0.0\n",
        "values/mini/mine.yaml": BLOCKS,
        "experiment/small.yaml": "# @package _global_\nmethod: {eta: 8.0}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "words,expected",
    [
        ("task=caption", (1, 1.0, 1.0)),
        ("task=celebrity", (1, 1.0, 1.0)),
        ("task=imagenette", (1, 2.0, 2.0)),
        ("task=object", (1, 2.0, 3.0)),
        ("task=orr", (1, 2.0, 4.0)),
        ("task=style", (1, 5.0, 2.0)),
        ("task=orr method.eta=9.0", (1, 2.0, 9.0)),
        ("task=orr experiment=small", (1, 2.0, 8.0)),
        ("task=orr model=sd14", (0, 0.0, 0.0)),
    ],
)
def test_the_narrowest_block_of_a_folder_of_ones_own_counts_and_what_is_asked_for_wins(folder, words, expected):
    with initialize_config_module("erasebench.conf", version_base="1.3"):
        made = compose("config", [f"hydra.searchpath=[file://{folder}]", "method=mine", *words.split()]).method
    assert (made.steps, made.lr, made.eta) == expected


def test_config_dir_gives_values_for_a_world(folder, monkeypatch):
    (folder / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\n\n@dataclass(frozen=True)\nclass Mine:\n"
        "    steps: int = 0\n    lr: float = 0.0\n    eta: float = 0.0\n    version: ClassVar[int] = 1\n"
        "    def fit(self, model, brief, out, seed): pass\n    def apply(self, model, artifact): pass\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("sys.argv", ["erasebench"])
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # of another test
    made = []
    words = ["--config-dir", str(folder), "method=mine", "task=orr", "dry_run=true"]
    assert config.main(lambda run: [], words, lambda runs, absent, rate: made.extend(runs)) == 0
    assert [(run.eraser.steps, run.eraser.lr, run.eraser.eta) for run in made] == [(1, 2.0, 4.0)]


def test_files_of_values_are_of_methods_and_worlds_and_their_blocks_of_tasks():
    tasks = {f"{task}_task" if task in NAMES("kind") else task for task in NAMES("task")}
    for file in sorted((CONF / "values").rglob("*.yaml")):
        assert file.stem in NAMES("method") and file.parent.name in NAMES("world"), file
        assert set(yaml.safe_load(file.read_text())) <= {"all", *NAMES("kind"), *tasks}, file


def test_every_task_but_captions_has_a_kind():
    assert set(config_sources.KINDS) == NAMES("task") - {"caption"}
    assert set(config_sources.KINDS.values()) == NAMES("kind")
