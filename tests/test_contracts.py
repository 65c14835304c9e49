"""Capabilities are asked for by `isinstance` of a protocol; the type checker knows every attribute of the core."""

import ast
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from erasebench.methods.latent_guard import LatentGuard
from erasebench.methods.none import NoErasure

from erasebench.contracts import DecidesSuccess, ErasebenchError, IsBase, Skips

ROOT = Path(__file__).parents[1]
# what is asked of objects that are no plugins: (file, attribute, why)
PROBES = {
    ("erasebench/model/source.py", "return_dict", "configurations of transformers and diffusers"),
    ("erasebench/model/schedulers.py", "sigmas", "schedulers of diffusers: those that interpolate timesteps have them"),
    ("erasebench/defaults.py", "__path__", "modules: only packages have one"),
    ("erasebench/provenance.py", "__path__", "modules: only packages have one"),
    ("erasebench/provenance.py", "origin", "find_spec gives None for what is no module"),
    ("erasebench/store/remote.py", "errno", "exceptions of file systems of fsspec"),
    ("erasebench/store/remote.py", "local_file", "file systems of fsspec"),
    ("erasebench/rows.py", "strerror", "an OSError has one, a ValueError of a path none"),
    ("erasebench/store/local.py", "errno", "an OSError has one, SafetensorError none"),
    ("erasebench/store/local.py", "filename", "an OSError has one, SafetensorError none"),
    ("erasebench/arguments.py", "__name__", "annotations: a class has one, a union none"),
    ("erasebench/report/tables.py", None, "a row, or None where a table has a gap"),
}


def probes(tree: ast.AST) -> list[tuple[str | None, int]]:
    """(attribute, line) of every hasattr, and of every getattr with a default; None for one that a variable names."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    asked = [n for n in calls if (n.func.id, len(n.args)) in (("hasattr", 2), ("getattr", 3))]
    return [(n.args[1].value if isinstance(n.args[1], ast.Constant) else None, n.lineno) for n in asked]


def test_no_plugin_is_probed_for_an_attribute():
    allowed = {(file, attribute) for file, attribute, _ in PROBES}
    found = [
        f"{file}:{line}: {attribute}"
        for folder in ("erasebench", "methods", "evaluators")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for attribute, line in probes(ast.parse(path.read_text(encoding="utf-8")))
        if ((file := path.relative_to(ROOT).as_posix()), attribute) not in allowed
    ]
    assert not found, found


def test_a_probe_is_found():
    tree = ast.parse('x = hasattr(a, "b") or getattr(a, "c", 1)\ny = getattr(a, n, 0)')
    assert set(probes(tree)) == {("b", 1), ("c", 1), (None, 2)}
    assert not probes(ast.parse('x = getattr(a, "b")'))  # it fails where there is none


@dataclass(frozen=True)
class Uncalibrated:
    """Whose threshold is not there yet."""

    @property
    def threshold(self):
        raise ErasebenchError("not yet")

    def confidence(self, scored):
        return scored


def test_who_decides_is_asked_without_a_threshold():
    assert isinstance(Uncalibrated(), DecidesSuccess) and not isinstance(NoErasure(), DecidesSuccess)


def test_a_flag_counts_where_it_is_there():
    assert isinstance(NoErasure(), IsBase) and NoErasure.is_base
    assert not isinstance(LatentGuard(), IsBase | Skips)


def mypy(cache: Path, *given: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), *given]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True)


def test_the_core_has_no_undeclared_attribute(tmp_path):
    done = mypy(tmp_path / "cache")
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from erasebench.contracts import DecidesSuccess, Evaluator, Scored\n\n\n"
        "def told(e: Evaluator, scored: Scored) -> object:\n"
        "    if isinstance(e, DecidesSuccess):\n"
        "        return e.confidence(scored)\n"
        "    return e.confidence(scored)\n"
    )
    done = mypy(tmp_path / "cache", str(wrong))
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1 and 'wrong.py:7: error: "Evaluator" has no attribute "confidence"' in errors[0], done.stdout
