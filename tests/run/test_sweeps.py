"""Sweeps whose jobs are other processes: joblib's, submitit's, and those of a Slurm that is a few shell lines."""

import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import hydra
import pytest
from hydra.types import RunMode

from erasebench import config
from erasebench.model import devices
from erasebench.rows import read
from erasebench.run.run import execute

SWEEP = ["-m", "method=none,uce", "task=object", "target=cat,nothing", "images=2", "sampler.steps=2"]
COLUMNS = ("run_id", "metric", "split", "value", "low", "high", "n")
SBATCH = """#!/bin/sh
# runs the array, two jobs at a time, once the pickled jobs have their numbers
for last; do :; done
cp "$last" {place}/script
export SLURM_ARRAY_JOB_ID=42 SLURM_ARRAY_TASK_COUNT=4 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1
export SLURM_JOB_NODELIST=here SLURM_NODEID=0 SLURM_LOCALID=0 SLURM_PROCID=0
run() {{ for task; do SLURM_JOB_ID=4$task SLURM_ARRAY_TASK_ID=$task sh "$last"; done; }}
(run 0 1 & run 2 3 & wait) >/dev/null 2>{place}/slurm.log &
echo "Submitted batch job 42"
"""
SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do case "$1" in --output|--error) shift;; esac; shift; done
exec "$@"
"""
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
for task in 0 1 2 3; do
  test -f {place}/home/sweeps/.submitit/42_$task/42_${{task}}_0_result.pkl && state=COMPLETED || state=RUNNING
  echo "42_$task|$state|here"
done
"""


def launch(launcher, place, **environment):
    """(exit code, what it said, its rows)"""
    words = [*SWEEP, f"results={place}", f"hydra/launcher={launcher}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-m", "erasebench", *words], env=env, capture_output=True, text=True, timeout=300
    )
    rows = [row for path in sorted((place / "runs").glob("*.csv")) for row in read(path)]
    return done.returncode, done.stderr, [tuple(getattr(r, c) for c in COLUMNS) for r in rows if r.group != "cost"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    place = tmp_path_factory.mktemp("plain")
    code, said, rows = launch("basic", place, ERASEBENCH_HOME=str(place / "home"))
    assert code == 1 and len(rows) > 20 and "unknown target 'nothing'" in said
    return rows


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "submitit_slurm"])
def test_a_sweep_gives_the_same_rows_wherever_its_jobs_run(launcher, plain, tmp_path):
    """Jobs of one sweep want the same originals, and two of them fail."""
    package, _ = config.LAUNCHERS[launcher]
    pytest.importorskip(f"hydra_plugins.{package}")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in (
        ("sbatch", SBATCH.format(place=tmp_path)),
        ("srun", SRUN),
        ("sacct", SACCT.format(place=tmp_path)),
    ):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    code, said, rows = launch(launcher, tmp_path / "results", PATH=f"{tools}:{os.environ['PATH']}")
    assert rows == plain
    assert code == 1 and "job 1: unknown target 'nothing'" in said and "job 3: unknown target" in said
    assert "job 0" not in said and "Traceback" not in said
    if launcher == "submitit_slurm":
        script = (tmp_path / "script").read_text()
        assert "#SBATCH --array=0-3%4" in script and "#SBATCH --gpus-per-node=1" in script
    left = [p for p in (tmp_path / "home" / "sweeps").iterdir() if p.name not in (".submitit", "multirun.yaml")]
    assert not left


DIES = """
import os, signal
from dataclasses import dataclass
from typing import ClassVar

@dataclass(frozen=True)
class Dies:
    version: ClassVar[int] = 1

    def fit(self, model, brief, out, seed):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_job_that_is_killed_fails_alone(tmp_path):
    pytest.importorskip("submitit")
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "dies.yaml").write_text("_target_: dies.Dies\n")
    (tmp_path / "dies.py").write_text(DIES)
    words = [
        "--config-dir",
        str(tmp_path / "conf"),
        "-m",
        "method=dies,none",
        "target=cat",
        "images=2",
        "sampler.steps=2",
    ]
    words += [f"results={tmp_path / 'results'}", "hydra/launcher=submitit_local"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "erasebench", *words], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "died: Job" in done.stderr and "Traceback" not in done.stderr
    (rows,) = (read(path) for path in (tmp_path / "results" / "runs").glob("*.csv"))
    assert {row.status for row in rows} <= {"ok", "skipped"} and rows[0].method == "none"


@pytest.mark.parametrize(
    "words,message",
    [
        (["hydra/launcher=jobib"], "did you mean 'joblib'"),
        (["hydra/launcher=submitit_slurm"], "needs pip install 'erasebench[slurm]'"),
    ],
)
def test_a_launcher_that_is_not_there(words, message, capsys, monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    assert config.main(lambda run: [], words) == 2
    assert message in capsys.readouterr().err


def test_slurm_elsewhere_is_one_clear_line(capsys, monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert config.main(lambda run: [], ["-m", "hydra/launcher=submitit_slurm"]) == 2
    assert "no sbatch on this machine" in capsys.readouterr().err


@pytest.mark.parametrize("executor,gpus", [("local", 1), ("ray", 0)])
def test_the_outer_job_asks_for_no_gpu_where_ray_has_them(executor, gpus):
    pytest.importorskip("submitit")
    words = ["hydra/launcher=submitit_slurm", f"executor={executor}"]
    with hydra.initialize_config_module("erasebench.conf", version_base="1.3"):
        made = hydra.compose("config", words, return_hydra_config=True)
    assert made.hydra.launcher.gpus_per_node == gpus


@pytest.mark.parametrize(
    "launcher,executor,number,expected",
    [
        ("joblib_launcher.JoblibLauncher", "local", 5, "cuda:1"),
        ("submitit_launcher.LocalLauncher", "local", 4, "cuda:0"),
        ("submitit_launcher.LocalLauncher", "ray", 4, "cuda"),
        ("basic_launcher.BasicLauncher", "local", 5, "cuda"),
    ],
)
def test_jobs_side_by_side_take_turns_with_the_gpus_that_all_of_them_see(
    launcher, executor, number, expected, monkeypatch
):
    choices = SimpleNamespace(executor=executor)
    now = SimpleNamespace(
        mode=RunMode.MULTIRUN,
        launcher=SimpleNamespace(_target_=launcher),
        runtime=SimpleNamespace(choices=choices),
        job=SimpleNamespace(num=number),
    )
    monkeypatch.setattr(config.HydraConfig, "get", lambda: now)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert devices.own_device(*config.side_by_side()) == expected
    now.mode, now.job = RunMode.RUN, SimpleNamespace()  # a launcher, but no sweep: the job has no number
    assert devices.own_device(*config.side_by_side()) == "cuda"


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar

@dataclass(frozen=True)
class Raises:
    version: ClassVar[int] = 1
    how: str = "value"

    def __post_init__(self):
        if self.how == "value":
            raise ValueError("two\\nlines")
        if self.how == "empty":
            raise AssertionError
        if self.how == "exit":
            raise SystemExit(0)
        if self.how == "memory":
            raise MemoryError
        if self.how == "deep":
            self.__post_init__()

    def fit(self, model, brief, out, seed):
        raise SystemExit(0)
"""


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Words of a command line with methods of one's own: raises (at `how`), at_import, absent."""
    (tmp_path / "conf" / "method").mkdir(parents=True)
    targets = {"raises": "raises_.Raises\nhow: value", "at_import": "at_import_.Raises", "absent": "nosuch_.Thing"}
    for name, target in targets.items():
        (tmp_path / "conf" / "method" / f"{name}.yaml").write_text(f"_target_: {target}\n")
    (tmp_path / "raises_.py").write_text(PLUGIN)
    (tmp_path / "at_import_.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    return ["-m", "--config-dir", str(tmp_path / "conf"), f"results={tmp_path / 'results'}", "target=cat", "images=2"]


def errors(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("error: ")]


@pytest.mark.parametrize(
    "words,lines",
    [
        (["method=absent,at_import,none"], ["method: ImportError: No module named 'nosuch_'", "it called exit(0)"]),
        (["method=none", "target=nosuch,cat"], ["unknown target 'nosuch'"]),
    ],
)
def test_a_sweep_goes_on_after_a_job_that_cannot_be_built(plugins, words, lines, caplog):
    ran = []
    code = config.main(lambda run: ran.append(run) or [], [*plugins, *words])
    assert code == 1
    said = errors(caplog)
    assert ran and len(said) == len(lines)
    assert all(part in line and "\n" not in line for part, line in zip(lines, said, strict=True))


def test_whatever_a_plugin_raises_is_one_line_and_a_failed_job(plugins, caplog):
    ways = {"value": "ValueError: two lines", "empty": "AssertionError", "exit": "exit(0)", "memory": "MemoryError"}
    ways |= {"deep": "RecursionError", "fit": ""}
    ran = []
    words = [*plugins, "method=raises", f"method.how={','.join(ways)}"]
    assert config.main(lambda run: ran.append(run) or [], words) == 1
    said = errors(caplog)
    assert [run.eraser.how for run in ran] == ["fit"] and len(said) == 5
    assert all(part in line and "\n" not in line for part, line in zip(ways.values(), said, strict=False))


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyError(), RuntimeError("a\nb"), SystemExit(0)])
def test_whatever_a_job_raises_fails_it_alone(plugins, caplog, error):
    ran = []

    def job(run):
        ran.append(run)
        if len(ran) == 1:
            raise error
        return []

    assert config.main(job, [*plugins, "method=none", "seed=0,1"]) == 1
    assert len(ran) == 2 and len(errors(caplog)) == 1 and "\n" not in errors(caplog)[0]


def test_an_interrupt_ends_the_sweep(plugins):
    def job(run):
        raise KeyboardInterrupt

    assert config.main(job, [*plugins, "method=none", "seed=0,1"]) == 130


def test_an_outcome_that_cannot_be_kept_fails_the_command(plugins, caplog, monkeypatch):
    def keep(*args, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(config.Outcomes, "keep", keep)
    ran = []
    assert config.main(lambda run: ran.append(run) or [], [*plugins, "method=none", "seed=0,1"]) == 1
    assert len(ran) == 2 and any("No space left" in line for line in errors(caplog))


def test_a_device_that_is_not_there_is_a_failed_row_and_the_next_job_runs(plugins, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    rows = []
    job = lambda run: rows.append(execute(run)) or rows[-1]
    words = [*plugins, "method=none", "device=cuda,banana,cpu", "sampler.steps=1", "task.evaluators={}"]
    assert config.main(job, words) == 1
    reasons = [[row.reason for row in made if row.status == "failed"] for made in rows]
    assert reasons[0] == ["device=cuda: no GPU here"] and "device=banana: choose" in reasons[1][0] and not reasons[2]
    assert any(row.status == "ok" for row in rows[2]) and "traceback" not in caplog.text


@dataclass(frozen=True)
class Leaves:
    version: ClassVar[int] = 1

    def fit(self, model, brief, out, seed):
        raise SystemExit(0)


def test_a_fit_that_calls_exit_is_a_failed_row(make_run):
    (row,) = execute(make_run("leaves", Leaves()))
    assert row.status == "failed" and row.reason.startswith("SystemExit")
