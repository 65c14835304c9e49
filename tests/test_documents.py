"""Every command in the documents, in order, in one folder for each document: what composes runs with `dry_run=true`, the rest
for real. Files that a document gives are written first, as they stand there; <id> is that of a run made before."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from glob import glob
from pathlib import Path

import pytest

from erasebench import cli, provenance, rows
from erasebench.mini import nets

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
COMPOSES = ("run", "audit", "check", "compare", "graph", "moved", "verdict")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# what a reader has and we have not: another model folder, a data set, ten minutes
INSTEAD = {"/any/diffusers/folder": str(ROOT / "erasebench/mini/weights/sd")}
MORE = {"regress": ["--only", "object_none"]}
FEWER = "method=none,uce"  # of the methods that an experiment sweeps (test_experiments.py)


def blocks(document: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))


def commands(document: str) -> list[str]:
    found = [line for language, text in blocks(document) if not language for line in text.splitlines()]
    return [line.split("  #")[0].strip() for line in found if line.startswith("python -m ")]


def run(line: str, capsys, monkeypatch) -> tuple[int, str]:
    """(exit status, what was printed)"""
    _, _, module, *arguments = shlex.split(line, comments=True)
    arguments = [path for argument in arguments for path in (sorted(glob(argument.replace("<id>", "*"))) or [argument])]
    verb, options = cli.split(arguments) if module == "erasebench" else ("", arguments)
    arguments += MORE.get(verb, [])
    arguments = [
        INSTEAD.get(value := argument.rpartition("=")[2], value).join([argument[: -len(value)], ""])
        for argument in arguments
    ]
    if verb in COMPOSES and any("=" in option for option in options) and "dry_run=true" not in options:
        arguments.append("dry_run=true")
        if any(re.match("experiment=(attacks|mace_|darkminer_)", argument) for argument in arguments):
            arguments.append(FEWER)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
        code = 0
    except SystemExit as done:
        code = done.code or 0
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Results of one run on the embedded model, as short as can be."""
    folder = tmp_path_factory.mktemp("measured")
    done = subprocess.run(
        [sys.executable, "-m", "erasebench", "method=uce", "images=1", "sampler.steps=4"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ERASEBENCH_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "results/runs").glob("*.csv")
    rows.write([replace(row, commit="abc123", dirty=False) for row in rows.read(path)], path)  # as of a clean checkout
    return folder / "results"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_runs(document, measured, tmp_path, monkeypatch, capsys):
    shutil.copytree(measured, tmp_path / "results")
    shutil.copytree(ROOT / "results" / "reference", tmp_path / "results" / "reference")  # as in a checkout
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ERASEBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(provenance, "git", lambda: ("abc123", False))  # a reader's checkout is clean
    drawings = nets.drawings
    monkeypatch.setattr(nets, "drawings", lambda use=None: drawings(use)[:: 1 if use else 16])  # test_audit.py takes all
    for _, text in blocks(document):
        if match := re.match(r"# ([\w/]+\.(?:py|yaml))\b", text):
            (tmp_path / match[1]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / match[1]).write_text(text)
    for line in commands(document):
        code, said = run(line, capsys, monkeypatch)
        assert code == 0, f"{line}\n{said}"


def test_documents_name_files_that_are_there():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert "://" in link or ((ROOT / document).parent / link).exists(), f"{document}: {link}"
