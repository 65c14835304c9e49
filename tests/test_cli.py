"""The command line as a user meets it: help, choices, mistakes, sweeps, and every way of installing it."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import build_pipeline

from erasebench.clauses.methods import CLAUSES
from erasebench.rows import read_all

ROOT = Path(__file__).resolve().parent.parent


def erasebench(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "erasebench", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return build_pipeline(tmp_path_factory.mktemp("cli") / "model")


def test_help_lists_every_choice_of_every_group(tmp_path):
    out = erasebench("--help", cwd=tmp_path).stdout
    for group in ("method", "model", "task", "world"):
        names = sorted(f.stem for f in (ROOT / "conf" / group).glob("*.yaml"))
        assert f"{group}: {', '.join(names)}\n" in out
    assert not list(tmp_path.iterdir())


def test_help_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; sys.argv = ['erasebench', '--help']\nimport erasebench.__main__ as m\ntry: m.main()\nexcept SystemExit: pass\n"
        "print([x for x in ('torch', 'diffusers', 'transformers', 'pandas', 'wandb') if x in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.endswith("[]\n")


MISTAKES = [
    (["method=ucee"], "unknown method 'ucee': did you mean 'uce'?"),
    (["method=none,esdd", "-m"], "unknown method 'esdd': did you mean 'esd'?"),
    (["task=objects"], "unknown task 'objects': did you mean 'object'?"),
    (["model=minni"], "unknown model 'minni': did you mean 'mini'?"),
    (["metod=uce"], "unknown option 'metod': did you mean 'method'?"),
    (["method=esd", "method.stepz=3"], "unknown method. 'stepz': did you mean 'steps'?"),
    (["target=aeroplane"], "unknown target 'aeroplane': did you mean airplane?"),
    (["n=0"], "n=0: a whole number, at least 1"),
    (["task=celebrity", "n=1000"], "erases 1, 5, 10, 100 people"),
    (["method=esd", "method.steps=many"], "method.steps='many': int is needed"),
    (["method=uce", "method.token_set=lost"], "choose from last, last_to_end"),
    (["sampler.steps=0"], "at least one step"),
    (["images=0"], "images=0: a whole number, at least 1"),
    (["batch=many"], "batch=many: a whole number"),
    (["model.path=/nowhere"], "model folder /nowhere does not exist"),
    (["other_words=[mispelt]"], "did you mean misspelt?"),
    (["other_words=[language]"], "other_words=language: world mini has none for this task"),
    (["task=explicit", "world.explicit.prompts.path=/no.csv"], "/no.csv: no such file"),
    (["task=imagenette", "world.judges.yolo.folder=/nowhere"], "/nowhere: no yolo.safetensors and yolo.json"),
    (["concepts=[dgo]"], "unknown concept 'dgo': did you mean dog"),
]


@pytest.mark.parametrize("arguments,message", MISTAKES)
def test_mistakes_are_one_clear_line_and_a_non_zero_exit(tmp_path, monkeypatch, capfd, caplog, arguments, message):
    from erasebench import config
    from erasebench.run.run import execute

    monkeypatch.chdir(tmp_path)
    assert config.main(execute, list(arguments), launch=True) != 0
    output = capfd.readouterr().err + caplog.text
    assert message in output and "Traceback" not in output
    assert len([line for line in output.splitlines() if "error: " in line]) == 1


@pytest.mark.parametrize("arguments,message", [MISTAKES[0], MISTAKES[6], MISTAKES[8], MISTAKES[10]])
def test_the_command_itself_says_so_too(tmp_path, arguments, message):
    done = erasebench(*arguments, cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert len([line for line in done.stderr.splitlines() if "error" in line]) == 1


def test_names_and_numbers_are_refused_before_anything_heavy_is_imported(tmp_path):
    code = """
import sys
from erasebench import config
for word in ("target=aeroplane", "images=0", "concepts=[dgo]", "other_words=[mispelt]"):
    assert config.main(print, [word])
print([x for x in ("torch", "diffusers", "transformers", "pandas", "wandb") if x in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stdout == "[]\n", done.stderr


def test_results_that_cannot_be_written_are_found_at_once(tmp_path, tiny_model):
    done = erasebench(f"model.path={tiny_model}", "results=/dev/null/x", cwd=tmp_path)
    assert done.returncode == 1 and "choose another folder with results=" in done.stderr


def test_a_sweep_goes_on_after_a_failed_job_and_ends_with_a_non_zero_exit(tmp_path, tiny_model):
    done = erasebench(
        "-m",
        "method=none,uce",
        "target=zeppelin,cat",
        f"model.path={tiny_model}",
        "images=1",
        "sampler.steps=1",
        cwd=tmp_path,
        ERASEBENCH_HOME=str(tmp_path / "home"),
    )
    rows = read_all(tmp_path / "results" / "runs")
    assert done.returncode == 1 and done.stderr.count("unknown target 'zeppelin'") == 2
    assert {row.method for row in rows if row.target == "cat" and row.status == "ok"} == {"none", "uce"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "results"]


def test_an_experiment_ends_with_its_table_and_two_methods_are_compared(tmp_path, tiny_model):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "small.yaml").write_text(
        "# @package _global_\nimages: 2\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params: {method: 'none,uce'}\n"
        "table: {name: small, title: A small one, across: target, metrics: {acc_e_top1: acc_e}}\n"
    )
    common = [f"model.path={tiny_model}", "sampler.steps=1"]
    environment = {"ERASEBENCH_HOME": str(tmp_path / "home")}
    done = erasebench("--config-dir", "conf", "experiment=small", *common, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "results" / "small.md").read_text()
    assert table.startswith("# A small one") and "| none | " in table and "| uce | " in table
    rows = read_all(tmp_path / "results" / "runs")
    assert {row.n for row in rows if row.metric == "acc_e_top1"} == {2}
    # what repeats one job of the sweep, and no place on this disk
    said = {row.method: json.loads(row.overrides) for row in rows}
    assert said["uce"] == ["method=uce", "experiment=small", "model.path=...", "sampler.steps=1"]
    done = erasebench("compare", "method=none,uce", "images=2", *common, cwd=tmp_path, **environment)
    assert done.returncode == 0 and "acc_e_top1" in done.stdout, done.stderr


def test_configs_list_every_hyperparameter_and_choose_their_world():
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    import erasebench.config

    with initialize_config_module("erasebench.conf", version_base="1.3"):
        for file in (ROOT / "conf" / "method").glob("*.yaml"):
            given = erasebench.config.keys_of(file.parent, file.stem) - {"_target_"}
            plugin = instantiate(compose("config", [f"method={file.stem}"]).method)
            assert given == {field.name for field in fields(plugin)}, file
        assert compose("config", ["model=sd14"]).world.name == "photo"
        assert compose("config", []).world.name == "mini"
        assert compose("config", ["method=esd"]).method.steps == 300
        assert compose("config", ["model=sd14", "method=mace", "target=ship"]).method.ridge == 1000
        assert compose("config", ["model=sd14", "method=mace"]).method.ridge == 100
        assert compose("config", ["model=sd14", "method=mace", "task=celebrity"]).method.ridge == 0
        assert compose("config", ["experiment=mace_table4"], return_hydra_config=True).n == 100
        assert compose("config", ["method=esd", "model=sd15"]).method.steps == 1000
        for model in ("sd14", "sd15", "sd20", "sd21", "sdxl"):
            assert compose("config", [f"model={model}"]).world.name == "photo"
            assert re.fullmatch("[0-9a-f]{40}", compose("config", [f"model={model}"]).model.revision)


def test_somebody_elses_method_needs_no_packaging(tmp_path, tiny_model):
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "mine.yaml").write_text("_target_: mine.Mine\nfactor: 0.0\n")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\n\n@dataclass(frozen=True)\nclass Mine:\n"
        "    factor: float = 1.0\n    version: ClassVar[int] = 1\n"
        "    def fit(self, model, brief, out, seed): pass\n"
        "    def apply(self, model, artifact):\n"
        "        return model.changed(weights={n: model.weight(n) * self.factor for n in model.names(r'attn2\\.to_v')})\n"
    )
    common = ["--config-dir", "conf", "method=mine", f"model.path={tiny_model}", "images=2", "sampler.steps=2"]
    environment = {"ERASEBENCH_HOME": str(tmp_path / "home"), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    erasebench(*common, cwd=tmp_path, **environment)
    assert {row.method for row in read_all(tmp_path / "results" / "runs")} == {"mine"}
    done = erasebench("check", *common, "method.factor=2.0", cwd=tmp_path, **environment)
    assert done.returncode == 0 and done.stdout.count("  ok  ") == 1 + len(CLAUSES), done.stdout + done.stderr
    done = erasebench("check", *common, "method.factor=1.0", cwd=tmp_path, **environment)
    assert done.returncode == 1 and "no image changed" in done.stdout


@pytest.mark.parametrize("how", ["wheel", "editable", "wheel inside a checkout"])
def test_every_way_of_installing_finds_methods_and_configs(tmp_path, how):
    """Built from a clean copy; the dependencies are those of this environment."""
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", "runs", "*.parquet")
    shutil.copytree(ROOT, copy, ignore=ignore)
    venv.create(tmp_path / "venv")  # pip and setuptools, too, are those of this environment
    python = tmp_path / "venv" / "bin" / "python"
    site = next(Path(p) for p in sys.path if p.endswith("site-packages"))
    (next((tmp_path / "venv").glob("lib/*/site-packages")) / "outer.pth").write_text(str(site))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    flags = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    target = ["-e", str(copy)] if how == "editable" else [str(copy)]
    subprocess.run([python, "-m", "pip", "install", *flags, *target], check=True, env=environment)
    where = copy if how == "wheel inside a checkout" else tmp_path
    code = (
        "import erasebench, erasebench.methods.uce as m, erasebench.conf, importlib.util as u; "
        "from erasebench.report.render import as_html; "
        "print(m.__file__); print(u.find_spec('methods') is None and b'plotly' in as_html([], []))"
    )
    found = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    file, whole = found.stdout.split()
    assert whole == "True" and file.startswith(str(copy if how == "editable" else tmp_path / "venv"))
    done = subprocess.run(
        [python, "-m", "erasebench", "--help"], cwd=where, capture_output=True, text=True, env=environment
    )
    assert re.search(r"^method: .*\besd\b", done.stdout, re.MULTILINE), done.stderr


@pytest.mark.parametrize("error,code,said", [("KeyboardInterrupt", 130, ["error: interrupted"]), ("BrokenPipeError", 141, [])])
def test_a_command_that_is_stopped_says_so_in_one_line(error, code, said):
    """A library that is imported changes nothing of how its program ends."""
    program = "import sys; sys.argv = ['{}']; import erasebench; raise {}"
    run = lambda first: subprocess.run(
        [sys.executable, "-c", program.format(first, error)], capture_output=True, text=True
    )
    stopped = run("-m")
    assert stopped.returncode == code and stopped.stderr.splitlines() == said
    assert "Traceback" in run("somebody.py").stderr
