"""What is here, what is missing and how to get it, and what could run now: python -m erasebench.doctor

Asks the same plugins as a run does, downloads nothing and loads no weights. Exits with 0 where the embedded world can run whole.
"""

from __future__ import annotations

import argparse
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

from . import config
from .contracts import ErasebenchError
from .redaction import masked
from .run import Run
from .store import Store

MODELS = ("mini", "sd14")  # a model of each world


def requirements() -> tuple[dict[str, str], dict[str, str]]:
    """(package -> version of what is installed, package -> how to get it of what is not)."""
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

    from .devices import unseen_gpu

    cores = f"{os.cpu_count()} processor cores"
    if not torch.cuda.is_available():
        none = unseen_gpu() or "no GPU"
        return f"{cores}, {none}: the embedded world takes minutes, Stable Diffusion days"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join([cores, *(f"{gpu.name} with {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)])


def storage() -> tuple[str, bool]:
    """(where the store is, how full; whether it can be written)."""
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
    """(task, model) -> what is missing, for every task on a model of each world. Asks what a dry run asks."""
    from .dry import planned

    found: dict[tuple[str, str], list[str]] = {}

    def note(runs: list[Run], uncounted: list[tuple[str, str, str]], rate: float) -> None:
        for task, model, why in uncounted:
            found[task, model] = [why]
        for run in runs:
            found[run.plan.task, run.source.name] = list(planned(run).missing)

    tasks = sorted(path.stem for path in (Path(str(resources.files("erasebench.conf"))) / "task").glob("*.yaml"))
    words = ["-m", f"task={','.join(tasks)}", f"model={','.join(MODELS)}", "method=none", "dry_run=true"]
    logging.disable(logging.INFO)  # every job is announced
    try:
        config.main(lambda run: [], words, note)
    finally:
        logging.disable(logging.NOTSET)
    return {(task, model): found.get((task, model), ["it could not be composed"]) for task in tasks for model in MODELS}


def report(argv: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="python -m erasebench.doctor", description=__doc__.splitlines()[0]).parse_args(argv)
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


def main(argv: Sequence[str]) -> int:
    try:
        return report(argv)
    except ErasebenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
