"""The workflow of GitHub Actions, as far as it can be held without GitHub."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


@pytest.fixture(scope="module")
def steps(workflow):
    return workflow["jobs"]["check"]["steps"]


def test_it_makes_what_the_makefile_has(steps):
    made = re.findall(r"^make (\w+)$", "\n".join(step.get("run", "") for step in steps), re.MULTILINE)
    assert made == ["lint", "test", "rehearse", "regress"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}: \$\(INSTALLED\)", makefile, re.MULTILINE) for target in made)
    assert set(made) < set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())


def test_the_page_is_of_what_regress_left(steps):
    folder = re.search(r"erasebench regress --results (\S+)", (ROOT / "Makefile").read_text())[1]
    page = next(step["run"] for step in steps if "leaderboard" in step.get("run", ""))
    assert page.endswith(f"-m erasebench leaderboard --results {folder}")
    upload = next(step for step in steps if step.get("uses", "").startswith("actions/upload-artifact@"))
    assert upload["with"]["path"] == f"{folder}/leaderboard.html"
    assert "cancelled" in upload["if"]  # a page of what moved is wanted most


def test_actions_and_python_are_pinned_and_a_newer_push_ends_an_older(workflow, steps):
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    assert workflow["jobs"]["check"]["container"].startswith("python:3.11-")
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert workflow["permissions"] == {"contents": "read"}
    assert {"push", "pull_request"} == set(workflow[True])  # YAML 1.1 reads `on` as true


def test_uv_s_cache_is_the_one_that_is_kept(workflow, steps):
    cache = next(step["with"] for step in steps if step.get("uses", "").startswith("actions/cache@"))
    assert cache["path"] == workflow["jobs"]["check"]["env"]["UV_CACHE_DIR"]
    assert all((ROOT / name).is_file() for name in re.findall(r"'([\w.]+)'", cache["key"]))


def test_system_packages_are_those_of_a_bare_machine(steps):
    packages = lambda text: set(re.search(r"--no-install-recommends ([\w. -]+)", text)[1].split())
    run = next(step["run"] for step in steps if "apt-get" in step.get("run", ""))
    assert packages(run) == packages((ROOT / ".ci" / "run").read_text())
