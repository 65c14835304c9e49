"""Upload of rows to Weights & Biases: one W&B run for each run, under its own id.

The upload follows a run (track=wandb), or sends row files. It reads only row files and the sheets beside them, so a
later upload equals that of the run itself. The rows are complete before anything is sent, and never depend on it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from .. import rows
from ..contracts import ErasebenchError
from ..store.local import home
from .runs import SHEET_BYTES, Run, json_of, labels, plain

log = logging.getLogger("erasebench")
PROJECT = "erasebench"  # unless WANDB_PROJECT names another
ENDS = ("", "_low", "_high", "_n_valid")  # suffixes of a metric's name
MOST_PIXELS = 4096  # longest side of a sheet
WAIT = 120  # seconds to wait for a server that does not answer
ABOUT = (
    *("run_id", "method", "method_version", "artifact", "task", "task_version", "world", "base", "revision"),
    *("n_concepts", "target", "subset", "seed", "sampler", "n_dropped", "commit", "dirty", "device", "batch"),
)


def names(run: Run) -> dict[tuple, str]:
    """Return column key -> name of the metric in W&B.

    It is the leaderboard's name, with underscores for characters that W&B can neither sort nor filter by. An attack
    is always named, so that runs under one attack and under several have the same names.
    """
    beside = [(metric, "", *rest) for metric, attack, *rest in run.cells if attack]
    said, found, taken = labels([*run.cells, *beside]), {}, set()
    for key in run.cells:
        name = re.sub(r"^(?=\d)|[^a-zA-Z0-9_]", "_", said[key])
        while not taken.isdisjoint(name + end for end in ENDS):
            name += "_"
        found[key] = name
        taken.update(name + end for end in ENDS)
    return found


def numbers(run: Run) -> dict[str, float]:
    """Return every metric and its interval."""
    found = {}
    for key, name in names(run).items():
        row = run.cells[key]
        said = zip(ENDS, (row.value, row.low, row.high, row.n_valid), strict=True)
        found |= {name + end: value for end, value in said if value is not None}
    return found


def settings(run: Run) -> dict[str, Any]:
    """Return the settings of the run and the origin of its rows."""
    attacks = {row.attack: json_of(row.attack_params) for row in run.rows if row.attack}
    head = run.head
    return {
        **{name: getattr(head, name) for name in ABOUT},
        "params": json_of(head.params),
        "attacks": attacks,
        "command": run.command,
        "packages": json_of(head.packages),
    }


def open_sheet(run: Run) -> tuple[Any, dict[str, Any]] | None:
    """Return the run's sheet and its own description.

    Returns None if the file is not a sheet of this run.
    """
    from PIL import ExifTags, Image

    try:
        if not run.sheet.is_file() or run.sheet.stat().st_size > SHEET_BYTES:
            return None
        with Image.open(run.sheet, formats=["WEBP"]) as image:
            said = json.loads(image.getexif().get(ExifTags.Base.ImageDescription, "{}"))
            if said["run"] != run.head.run_id or not 0 < said["columns"] <= image.width <= MOST_PIXELS >= image.height:
                return None
            if not {*said["sides"]} <= {"base", "erased"} or not all(
                isinstance(prompt, str) and isinstance(seed, int)
                for line in said["shows"].values()
                for prompt, seed in line
            ):
                return None
            return image.convert("RGB"), said
    except Exception:  # exceptions of readers of damaged images have no common class
        return None


def pictures(run: Run) -> list[dict[str, Any]]:
    """Return the columns of the run's sheet.

    Each has split, prompt, seed, base, and erased unless the run is the base's own. Returns nothing for an explicit
    task, or for a sheet that is not this run's: no sheet is made if an explicit concept is erased.
    """
    if run.head.task == "explicit" or (opened := open_sheet(run)) is None:
        return []
    sheet, said = opened
    side, gap = sheet.width // said["columns"], 8
    sides, found = said["sides"], []
    for line, (split, columns) in enumerate(said["shows"].items()):
        top = line * (len(sides) * side + gap)
        for i, (prompt, seed) in enumerate(columns):
            cut = {
                name: sheet.crop((i * side, top + j * side, (i + 1) * side, top + (j + 1) * side))
                for j, name in enumerate(sides)
            }
            found.append({"split": split, "prompt": prompt, "seed": seed, **cut})
    return found


def send(run: Run, group: str = "") -> str:
    """Send one run; returns its destination. Raises any exception of W&B."""
    import wandb
    from requests.utils import get_netrc_auth

    usual = wandb.setup().settings
    if usual.mode == "disabled":
        return "not sent, WANDB_MODE=disabled"
    known = usual.api_key or usual.identity_token_file or get_netrc_auth(usual.base_url)
    mode = usual.mode if known or usual.mode != "online" else "offline"  # instead of asking at a prompt
    folder = Path(os.environ.get("WANDB_DIR") or home())
    folder.mkdir(parents=True, exist_ok=True)
    run_id = run.head.run_id
    if not re.fullmatch(r"[\w-]{1,100}", run_id, re.ASCII):  # W&B takes neither longer ids nor other characters
        run_id = hashlib.sha256(run_id.encode()).hexdigest()[:32]
    opened = wandb.init(
        project=usual.project or PROJECT,
        id=run_id,
        name=run_id,
        group=group[:128] or None,
        job_type=run.head.task,
        tags=[run.status],
        notes="\n".join(run.reasons),
        config=settings(run),
        dir=folder,
        mode=mode,
        reinit="create_new",  # never another's run that is open in this process
        settings=wandb.Settings(
            console="off",
            silent=True,
            # no data of the sending machine, which need not be the one that measured
            host="",
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            disable_git=True,
            save_code=False,
            init_timeout=30,
            finish_timeout=WAIT,
            finish_timeout_raises=True,
        ),
    )
    with opened:
        tables = {"rows": wandb.Table(columns=list(rows.NAMES), data=[[*asdict(row).values()] for row in run.rows])}
        if shown := pictures(run):
            data = [[v if isinstance(v, str | int) else wandb.Image(v) for v in line.values()] for line in shown]
            tables["images"] = wandb.Table(columns=list(shown[0]), data=data)
        opened.log(numbers(run) | tables)
        opened.summary.update({"status": run.status, "reason": "; ".join(run.flaws)})
        opened.finish(exit_code=int(run.status == "failed"))
    if not opened.offline:
        return f"sent to {opened.url}"
    why = " (no account: WANDB_API_KEY, or `wandb login`)" if usual.mode == "online" else ""
    return f"kept offline{why}; to send it: wandb sync {Path(opened.dir).parent}"


def mirror(path: Path, group: str = "") -> bool:
    """Send every run of a row file.

    Any failure is one line of warning; returns False then.
    """
    try:
        if not (read := sorted(rows.read(path), key=lambda row: row.run_id)):
            raise ErasebenchError(f"{path}: holds no rows")
        for _, same in groupby(read, key=lambda row: row.run_id):
            run = Run(tuple(same), path.with_suffix(".webp"))
            log.info("W&B: %s", plain(f"{run.head.run_id} {send(run, group)}"))
    except (Exception, SystemExit) as error:  # no fault of a service may cost a sweep its next run
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        log.warning("W&B: %s", plain(f"{path} was not sent ({why}); later: python -m erasebench wandb {path}"))
        return False
    return True
