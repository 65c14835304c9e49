"""Check of a file of rows before submission, and verification by re-running.

python -m erasebench verify results/runs/<id>.csv                       # its faults, and the costs of verification
python -m erasebench verify results/runs/<id>.csv --rerun               # verified, if the same numbers come out
python -m erasebench verify results/runs/<id>.csv --rerun model.path=/base      # a place on the disk, which rows do not keep

A submission is one file, results/runs/<id>.csv, with its sheet of images beside it; rows of others are merged
without conflict.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .. import config, provenance
from ..analysis.forecast import planned
from ..contracts import ErasebenchError
from ..maintain import regress
from ..options import ALONE, command_of
from ..rows import Row, read, replace_file
from ..run.specification import Run
from . import seals
from .runs import json_of, plain


def faults(path: Path, rows: Sequence[Row], command: Sequence[str]) -> tuple[list[tuple[str, str]], list[Run]]:
    """Return the checks with their faults, and the command's run.

    Each check is (subject, fault or ""). The second value has at most one run: the one that the command of the rows
    makes here.
    """
    head, runs = rows[0], []
    config.alone(lambda run: runs.append(run) or [], command)
    made = runs[0].id if runs else "nothing: see above"
    failed = [row.reason for row in rows if row.status == "failed"]
    here = json.loads(provenance.packages())
    was = json_of(head.packages)
    differing = {name: (version, here.get(name)) for name, version in was.items() if here.get(name) != version}
    checks = [
        ("one run, in a file of its name", "" if {row.run_id for row in rows} == {path.stem} else f"it holds {', '.join(sorted({r.run_id for r in rows}))}"),
        ("nothing failed", "; ".join(failed)),
        ("made from a clean checkout", "" if head.commit and head.dirty is False else "of a tree with changes, or outside git"),
        ("its options make this very run here", "" if made == head.run_id else f"they make {made}: other hyperparameters, prompts, judges or base"),
        ("made with the packages that are here", "; ".join(f"{name} {then}, here {now}" for name, (then, now) in differing.items()) if was else "they do not say which"),
    ]  # fmt: skip
    return checks, runs


def rerun(path: Path, rows: Sequence[Row], command: Sequence[str]) -> dict | None:
    """Run the same command from an empty store and compare the rows.

    Returns the number of values that are identical and of those within the interval. If the rows are not reproduced,
    prints a table of the moves and returns None.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = regress.carry_out({path.stem: [*command, *ALONE]}, Path(folder))[path.stem]
    moves = regress.compare(path.stem, [regress.line_of(row) for row in rows], made)
    moves += doubtful(path.stem, rows, made)
    if any(move.fault for move in moves):
        print(regress.table(moves))
        return None
    within = sum(len(move.rows) for move in moves if move.what == "value")
    return {"identical": sum(row.value is not None for row in rows) - within, "within": within}


def doubtful(run: str, rows: Sequence[Row], made: Sequence[Row]) -> list[regress.Move]:
    """Return the moves of intervals and base values.

    The rows claim these besides their values, and they are not reproduced: an interval of another width, a better
    base. A value within an interval that its writer chose shows nothing.
    """
    by_key = lambda some: dict(zip(regress.keyed([*map(regress.line_of, some)], run), some, strict=True))
    claims, found = by_key(rows), by_key(made)
    moves = []
    for key, claim in claims.items():
        again = found.get(key)
        if again is None or again.value is None or again.metric in (*regress.CLOCKED, *regress.FOLLOWS):
            continue
        line = regress.line_of(again)
        low, high = regress.allowed(line)
        for name in ("low", "high", "base_value", "change_low", "change_high"):
            was, now = getattr(claim, name), getattr(again, name)
            if (was is None) != (now is None) or (
                was is not None and abs(was - now) > max((high - low) / 4, 1e-6 * abs(now))
            ):
                moves.append(regress.Move(run, (regress.label(line),), name, str(was), str(now)))
    return moves


def submit(path: Path, again: bool, more: Sequence[str]) -> int:
    rows = read(path)
    if not rows:
        raise ErasebenchError(f"{path}: no rows")
    command = command_of(path, rows[0].overrides, more)
    if again:
        seals.secret()  # fails before hours of work rather than after them
    checks, runs = faults(path, rows, command)
    for what, wrong in checks:
        print(plain(f"{'wrong' if wrong else 'ok':6}{what}{': ' + wrong if wrong else ''}"))
    if not runs or checks[3][1]:
        print("These rows cannot be verified here.")
        return 1
    if not again:
        plan = planned(runs[0])
        images = sum(n for n, _ in plan.images.values())
        print(plain(f"To verify: python -m erasebench verify {path} --rerun {' '.join(more)}".rstrip()))
        print(
            f"That makes {images} images and takes {images * plan.per_image:,} U-Net evaluations, and its fit and attacks."
        )
        for what in plan.missing:
            print(plain(f"Missing here: {what}"))
        return int(any(wrong for _, wrong in checks))
    if (found := rerun(path, rows, command)) is None:
        print("Not verified: other numbers come out.")
        return 1
    commit, dirty = provenance.git()
    if dirty or not commit:
        print("Not verified: the same numbers come out, but of a tree with changes, or outside git.")
        return 1
    found |= {
        "rows_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "commit": commit,
        "date": str(datetime.datetime.now(datetime.UTC).date()),
        "packages": json.loads(provenance.packages()),
    }
    note = path.with_suffix(".verified.json")
    replace_file(note, (json.dumps(seals.sealed(found), indent=1, sort_keys=True) + "\n").encode(), "")
    print(plain(f"Verified: {found['identical']} values identical, {found['within']} within their intervals; {note}"))
    return 0


def report(file: Path, rerun: bool, more: Sequence[str]) -> int:
    """Check a file of rows, or verify it; returns an exit code."""
    try:
        return submit(file, rerun, more)
    except ErasebenchError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
