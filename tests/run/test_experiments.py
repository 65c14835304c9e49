"""Every table of the seed papers composes, and a dry run says what it would take."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import Redness
from erasebench.methods.none import NoErasure
from erasebench.methods.uce import UCE

from erasebench.analysis import forecast
from erasebench.run.run import execute

ROOT = Path(__file__).resolve().parents[2]
PHOTO = ("darkminer_table11", "gie_table5")
# Hydra parses every file anew for each of the two hundred jobs, twice: here a file is parsed once, a job composed once
RUN = """
import contextlib, copy, functools, io, json, sys
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf
from erasebench import config
parse, parsed = OmegaConf.load, {}
def load(file):
    if file.name not in parsed:
        parsed[file.name] = parse(file)
    return copy.deepcopy(parsed[file.name])
OmegaConf.load = load
Sweeper.validate_batch_is_legal = lambda self, batch: None
said = {}
for name, more in json.loads(sys.argv[1]).items():
    sys.argv = ["erasebench", f"experiment={name.split()[0]}", "dry_run=true", *more]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = config.main(None, sys.argv[1:])
    said[name] = code, out.getvalue()
print(json.dumps(said))
"""


def fewer(name: str, given: set[str]) -> list[str]:
    """Of what an experiment sweeps over more than three choices, the first and the last, as two hundred jobs take minutes."""
    spec = yaml.safe_load((ROOT / "conf" / "experiment" / f"{name}.yaml").read_text())
    swept = spec.get("hydra", {}).get("sweeper", {}).get("params", {})
    choices = {key: re.split(r",(?![^\[]*\])", str(value)) for key, value in swept.items() if key not in given}
    return [f"{key}={listed[0]},{listed[-1]}" for key, listed in choices.items() if len(listed) > 3]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """name -> (exit code, what the dry run printed), all in one process"""
    folder = tmp_path_factory.mktemp("experiments")
    pd.DataFrame({"prompt": ["a street"] * 3, "sd_seed": [1, 2, 3]}).to_csv(folder / "i2p.csv", index=False)
    (folder / "captions.txt").write_text("a cat\na dog\n")
    photo = [f"world.explicit.prompts.path={folder}/i2p.csv", f"world.captions.path={folder}/captions.txt"]
    names = sorted(f.stem for f in (ROOT / "conf" / "experiment").glob("*.yaml"))
    asked = {name: photo if name in PHOTO else [] for name in names}
    asked["mace_table2 without prompts"] = ["model=sd14", "method=none"]
    asked["everything"] = ["method=none,mace", "part=truck,celebrity,explicit"]  # test_schedule.py has the rest
    for name in names:
        asked[name] = asked[name] + fewer(name, {word.partition("=")[0] for word in asked[name]})
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(asked)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ERASEBENCH_HOME": str(folder / "home")},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_table_of_the_seed_papers_has_its_file(said):
    wanted = {f"mace_table{i}" for i in (1, 2, 3, 4)} | {"mace_figure7"}
    wanted |= {f"darkminer_table{i}" for i in range(1, 13)} | {f"gie_table{i}" for i in range(1, 6)}
    assert wanted | {"slides_objects", "slides_ner", "slides_kpop"} <= set(said)


def test_every_experiment_dry_runs(said):
    for name in said.keys() - {"mace_table2 without prompts"}:
        code, out = said[name]
        last = out.strip().splitlines()[-1]
        assert code == 0 and "GPU hours" in last and not last.startswith("0 runs"), (name, out)


def test_mace_s_first_table_erases_every_class_of_both_worlds():
    read = lambda path: yaml.safe_load((ROOT / "conf" / path).read_text())
    targets = read("experiment/mace_table1.yaml")["hydra"]["sweeper"]["params"]["target"].split(",")
    assert targets == list(read("world/photo.yaml")["objects"]) == list(read("world/mini.yaml")["objects"])


def test_a_dry_run_names_what_is_missing_and_the_licences_of_the_judges(said):
    out = said["darkminer_table11"][1]
    assert "missing: " in out  # no hub here: no weights
    assert "missing: quality: Inception is not here: give the file" in out
    assert "nudenet-3.4.2, AGPL-3.0" in out


def test_a_dry_run_without_prompts_says_so_and_downloads_nothing(said):
    code, out = said["mace_table2 without prompts"]
    assert code == 0 and "explicit on sd14: missing: AIML-TUDA/i2p could not be loaded" in out
    assert out.strip().endswith("1 more runs, whose prompts are not here (a dry run downloads nothing)")


def test_a_dry_run_counts_what_the_store_has_and_shared_images_once(make_run):
    runs = [make_run(name, eraser, {"redness": Redness()}) for name, eraser in (("none", NoErasure()), ("uce", UCE()))]
    fresh = forecast.report([forecast.planned(run) for run in runs], [], 100)
    count = len(runs[0].plan.prompts)
    assert (
        f"2 runs, {2 * count} images to make, {2 * count * 3 * 2} U-Net evaluations" in fresh and "fit to do" in fresh
    )
    execute(runs[0])
    assert f"{count} images to make" in forecast.report([forecast.planned(run) for run in runs], [], 100)
    execute(runs[1])
    done = forecast.report([forecast.planned(run) for run in runs], [], 100)
    assert "2 runs, 0 images to make, 0 U-Net evaluations, 0.0 GPU hours" in done and "fit to do" not in done
