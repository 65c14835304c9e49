"""Regression test of all measurements: python -m erasebench regress

The runs of conf/regress.yaml (every method on one task, every task of the embedded world with three methods, an
attack) are carried out as the command line would, one after another in one process, with a store of their own that
starts empty, and their rows are compared with the goldens in results/reference/regress. It takes some minutes on two
cores.

Fits are shortened by the overrides of each run, not left out. With stored weights, a change in the code of a fit
would go unnoticed; the weights would weigh tens of megabytes, and every rise of a method's version would need new
ones.

These must be exactly the same: the set of rows; the subject, number of prompts, judge, method, sampler and base of
each (EXACT below); the bytes that a method learnt; and the U-Net evaluations that it took. A value that comes from
images must lie in the golden's interval, since another processor rounds differently; a move within it is listed and
is no fault. If all images agree, an interval is as narrow as rounding, and some values have none: there, the effect
of one image is tolerated (`allowed`). Seconds and memory are not compared.

    python -m erasebench regress --only object_uce --results out       some runs; their rows and images stay in out/runs
    python -m erasebench regress --accept "CLIP judges at 336 px"      new goldens, from a clean checkout, with the reason

Exit codes: 0 nothing moved out of its interval, 1 something did, or a run failed, 2 bad use.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from .. import config, provenance
from ..contracts import ErasebenchError
from ..report.runs import json_of, plain
from ..rows import Row, replace_file, text_of, write_table
from . import readme

if TYPE_CHECKING:
    from ..run.specification import Run

LIST = Path(str(resources.files("erasebench.conf"))) / "regress.yaml"
METHODS = LIST.parent / "method"
GOLDENS = Path(__file__).resolve().parents[2] / "results" / "reference" / "regress"
README = GOLDENS.parents[2] / "README.md"  # its table of methods is brought up to date with the goldens
CHANGES = "CHANGES.md"
KEY = ("metric", "split", "attack", "judge", "threshold")
# fmt: off
EXACT = (
    "status", "schema", "method", "method_version", "params", "base", "revision", "world", "task", "task_version",
    "n_concepts", "target", "subset", "seed", "sampler", "unet_calls", "n_dropped", "prompts_sha256", "judge_version",
    "group", "higher_is_better", "ci_method", "n",
)
# fmt: on
MEASURED = ("n_valid", "value", "low", "high")
COLUMNS = (*KEY, *EXACT, *MEASURED)  # by name, so that a new column of rows changes no golden
CLOCKED = ("fit_seconds", "peak_memory_mb", "slowdown", "seconds_per_success")
FOLLOWS = ("unet_calls_per_success",)  # from asr and unet_calls, which are compared
COUNTED = ("mace_",)  # metrics that are sums over images, unlike the others, which are means
DITTO = "〃"  # in a golden: same as in the line above

Line = dict[str, str]  # a row's compared columns, as a row file has them


@dataclass(frozen=True)
class Move:
    """Difference from the golden: its run, its rows, and whether it is a fault."""

    run: str
    rows: tuple[str, ...]
    what: str
    was: str
    now: str
    within: str = ""
    fault: bool = True


def line_of(row: Row) -> Line:
    values = asdict(row)
    return {name: "" if values[name] is None else str(values[name]) for name in COLUMNS}


def keyed(lines: Sequence[Line], where: object) -> dict[tuple[str, ...], Line]:
    """Return key -> line. Raises ErasebenchError if two rows share a key."""
    made: dict[tuple[str, ...], Line] = {}
    for line in lines:
        key = tuple(line[name] for name in KEY)
        if key in made:
            raise ErasebenchError(f"{where}: two rows of {label(line)}")
        made[key] = line
    return made


def label(line: Line) -> str:
    split = "" if line["attack"] else line["split"]  # an attack's split has the attack's name
    return " ".join(part for part in (line["attack"], line["metric"], split and f"({split})") if part) or "the run"


def write(lines: Sequence[Line], path: Path) -> None:
    """Write a golden.

    A cell that equals the one above is written as a ditto mark: most columns are constant over a run.
    """
    buffer = io.StringIO()
    body, above = [], dict.fromkeys(COLUMNS)
    for line in lines:
        body.append([DITTO if line[name] and line[name] == above[name] else line[name] for name in COLUMNS])
        above = line
    write_table([COLUMNS, *body], buffer)
    replace_file(path, buffer.getvalue().encode(), "")


def read(path: Path) -> list[Line]:
    """Read a golden.

    Raises ErasebenchError, with file, line and column, if the file is not a golden.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *body = csv.reader(file, strict=True)
    except FileNotFoundError as error:
        raise ErasebenchError(f"{path}: no such golden; a first one is made with --accept") from error
    except (OSError, ValueError, csv.Error) as error:
        raise ErasebenchError(f"{path}: not a golden ({error})") from error
    if tuple(header) != COLUMNS:
        odd = ", ".join(sorted(set(header) ^ set(COLUMNS))) or "in another order"
        raise ErasebenchError(f"{path}: not a golden of this version (columns that differ: {odd})")
    lines: list[Line] = []
    for number, cells in enumerate(body, start=2):
        if len(cells) != len(COLUMNS) or (not lines and DITTO in cells):
            raise ErasebenchError(f"{path}:{number}: damaged, {len(cells)} cells that do not make a row")
        line = {
            name: lines[-1][name] if cell == DITTO else text_of(cell) for name, cell in zip(COLUMNS, cells, strict=True)
        }
        for name in ("params", "n", *MEASURED):
            try:
                (json.loads if name == "params" else float)(line[name] or "0")
            except ValueError as error:
                raise ErasebenchError(f"{path}:{number}: column {name} holds {line[name]!r}") from error
        lines.append(line)
    keyed(lines, path)
    return lines


def allowed(golden: Line) -> tuple[float, float]:
    """Return the range in which a value may lie.

    It is the golden's interval. If that is narrower than the effect of one image (1/n for a mean, 1 for a count),
    both ends move out by the difference.

    A bootstrap over images that all agree has no width (nothing lost: [0, 0]), one over probabilities near 0 has the
    width of their rounding, and a mean without an interval has none; yet on another processor one image may fall on
    the other side. A value that does not come from images, such as bytes, may not move.
    """
    value = float(golden["value"])
    low, high = (float(golden[end] or value) for end in ("low", "high"))
    images = golden["n_valid"] or golden["n"]
    one = 1 / float(images) if images else 0.0
    slack = max(0.0, (1.0 if golden["metric"].startswith(COUNTED) else one) - (high - low))
    return low - slack, high + slack


def compare(run: str, golden: Sequence[Line], rows: Sequence[Row]) -> list[Move]:
    """Return the moves of a run; the same move in several rows counts once."""
    before, now = keyed(golden, run), keyed([line_of(row) for row in rows], run)
    why = {row.metric: f"{row.status}: {row.reason}" for row in rows if row.status != "ok"}
    moves: list[Move] = []
    for key in dict.fromkeys((*now, *before)):
        if key not in now:
            moves.append(Move(run, (label(before[key]),), "row", "there", "missing"))
        elif key not in before:
            moves.append(Move(run, (label(now[key]),), "row", "not there", why.get(key[0], "there")))
        else:
            moves += compare_lines(run, before[key], now[key])
    together: dict[tuple, list[str]] = {}
    for move in moves:
        together.setdefault((move.what, move.was, move.now, move.within, move.fault), []).extend(move.rows)
    return [Move(run, tuple(rows), *same) for same, rows in together.items()]


def compare_lines(run: str, before: Line, now: Line) -> Iterator[Move]:
    name = (label(before),)
    for column in EXACT:
        if before[column] != now[column]:
            yield Move(run, name, column, *said(column, before[column], now[column]))
    was, value = before["value"], now["value"]
    if was == value or before["metric"] in (*CLOCKED, *FOLLOWS):
        return
    if "" in (was, value):
        yield Move(run, name, "value", was or "none", value or "none")
        return
    low, high = allowed(before)
    within = f"[{low:.4g}, {high:.4g}]" if low < high else ""
    yield Move(run, name, "value", *shown(was, value), within, not low <= float(value) <= high)


def shown(*values: str) -> list[str]:
    """Return numbers in the shortest form in which they still differ."""
    short = [f"{float(value):.5g}" for value in values]
    return short if len(set(short)) == len(values) else list(values)


def said(column: str, was: str, now: str) -> tuple[str, str]:
    """Return two values of a column in words.

    For a method's hyperparameters, only those that differ.
    """
    if column == "params":
        a, b = json_of(was), json_of(now)  # rows may have been written by somebody else
        differ = [name for name in a | b if a.get(name) != b.get(name)]
        was, now = (", ".join(f"{name}={side.get(name)}" for name in differ) for side in (a, b))
    if column == "prompts_sha256":
        was, now = was[:12], now[:12]
    return was or "nothing", now or "nothing"


def table(moves: Sequence[Move]) -> str:
    """Return the moves as a table, faults first."""
    lines = [("run", "row", "what", "was", "is", "may be", "")]
    for move in sorted(moves, key=lambda move: not move.fault):
        which = move.rows[0] + (f" and {len(move.rows) - 1} more" if len(move.rows) > 1 else "")
        cells = (move.run, which, move.what, move.was, move.now, move.within)
        lines.append((*map(plain, cells), "MOVED" if move.fault else "moved, inside"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def listed(path: Path) -> dict[str, list[str]]:
    """Return run -> the words of its command line.

    The words follow `python -m erasebench`.
    """
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    runs = (runs_of_methods(given["every"]) if "every" in given else {}) | given["runs"]
    return {name: shlex.split(f"{given['common']} {words}") for name, words in runs.items()}


def runs_of_methods(task: str) -> dict[str, str]:
    """Return the run of each method, named <task>_<method>.

    Its words come from the line `# regress:` of the method's configuration; a line without a task is appended to
    `task`.
    """
    runs = {}
    for method, said in readme.listed(METHODS).items():
        words = said.get("regress", "")
        if words.startswith(readme.LEFT_OUT):
            continue
        words = words if "task=" in words else f"{task} {words}"
        own = [word for word in words.split() if word.startswith("method.")]
        others = [word for word in words.split() if word not in own]
        name = next(word.removeprefix("task=") for word in others if word.startswith("task="))
        runs[f"{name}_{method}"] = " ".join([*others, f"method={method}", *own])
    return runs


@contextmanager
def alone(results: Path | None) -> Iterator[Path]:
    """Provide an empty temporary store, and a folder for results.

    The folder is temporary unless one is given. Meanwhile the log shows only warnings and errors.
    """
    log = logging.getLogger("erasebench")
    level, before = log.level, {name: os.environ.pop(name, None) for name in ("ERASEBENCH_HOME", "ERASEBENCH_STORE")}
    with tempfile.TemporaryDirectory(prefix="erasebench-regress-") as folder:
        os.environ["ERASEBENCH_HOME"] = str(Path(folder, "home"))
        log.setLevel(logging.WARNING)
        try:
            yield results or Path(folder, "results")
        finally:
            log.setLevel(level)
            del os.environ["ERASEBENCH_HOME"]
            os.environ.update({name: value for name, value in before.items() if value is not None})


def carry_out(chosen: Mapping[str, Sequence[str]], results: Path | None) -> dict[str, list[Row]]:
    """Return the rows of every run.

    Runs are made in order, so that originals are made once.
    """
    made = {}
    with alone(results) as folder:
        for name, words in chosen.items():
            start = time.perf_counter()
            made[name] = rows_of([*words, f"results={json.dumps(str(folder))}"])
            print(f"{name:26}{time.perf_counter() - start:7.1f} s{len(made[name]):5} rows", flush=True)
    return made


def rows_of(words: list[str]) -> list[Row]:
    """Return the rows of a command line.

    Returns none if the command cannot be carried out; the log says why.
    """
    from ..run.run import execute

    rows: list[Row] = []

    def job(run: Run) -> list[Row]:
        rows.extend(execute(run))
        return rows

    with suppress(SystemExit):  # Hydra exits if it cannot compose a run: the others can still be compared
        config.main(job, words)
    return rows


def failure(rows: Sequence[Row]) -> str:
    """Return why a run did not finish, or an empty text."""
    if not rows:
        return "it could not be carried out: see above"
    return next((row.reason or "for no reason given" for row in rows if row.status == "failed"), "")


def check_accept(reason: str) -> str:
    """Return the reason as one line.

    Raises ErasebenchError if it is empty, or if git cannot identify the code that makes the rows.
    """
    if not (reason := " ".join(reason.split())):
        raise ErasebenchError('--accept needs a reason: --accept "what changed, and why it is right"')
    commit, dirty = provenance.git()
    if not commit or dirty:
        where = "this checkout has changes that are not committed" if commit else "this is no git checkout"
        raise ErasebenchError(f"goldens are made from a clean checkout alone, and {where}")
    return reason


def accept(
    chosen: Mapping[str, Sequence[str]], known: Collection[str], results: Path | None, goldens: Path, reason: str
) -> int:
    """Carry the runs out, write their goldens, and note the reason.

    Goldens of unknown runs are removed. Returns 1, and writes nothing, if a run failed.
    """
    made = carry_out(chosen, results)
    if failed := {name: why for name, rows in made.items() if (why := failure(rows))}:
        print(*(f"{name} failed: {plain(why)}" for name, why in failed.items()), "nothing was written", sep="\n")
        return 1
    goldens.mkdir(parents=True, exist_ok=True)
    contents = lambda: {path.stem: path.read_bytes() for path in goldens.glob("*.csv")}
    before = contents()
    for name in before.keys() - known:
        (goldens / f"{name}.csv").unlink()
    for name, rows in made.items():
        write([line_of(row) for row in rows], goldens / f"{name}.csv")
    after = contents()
    changed = sorted(name for name in before | after if before.get(name) != after.get(name))
    if not changed:
        print("the goldens are the same: nothing to accept")
        return 0
    path = goldens / CHANGES
    history = path.read_text(encoding="utf-8") if path.is_file() else "# Why the goldens changed\n\n"
    day, commit = datetime.datetime.now(datetime.UTC).date(), provenance.git()[0]
    line = f"- {day}, at {commit}: {plain(reason)} ({', '.join(changed)})\n"
    replace_file(path, (history + line).encode(), "")
    print(f"{len(changed)} goldens in {goldens}, and the reason in {CHANGES} beside them: commit both")
    if goldens == GOLDENS:
        readme.report(README)
    return 0


def opened(chosen: Collection[str], known: Collection[str], goldens: Path) -> dict[str, list[Line]]:
    """Return the golden of each run.

    Raises ErasebenchError for a golden that is missing, damaged, or belongs to no run.
    """
    if not goldens.is_dir():
        raise ErasebenchError(f"{goldens}: no goldens; a checkout has them, an installed package does not")
    if orphans := sorted({path.stem for path in goldens.glob("*.csv")} - set(known)):
        raise ErasebenchError(f"{goldens / orphans[0]}.csv: there is no such run any more; --accept removes it")
    return {name: read(goldens / f"{name}.csv") for name in chosen}


def report(moves: Sequence[Move], golden: Mapping[str, Sequence[Line]]) -> int:
    """Print the moves; returns 1 if any of them is a fault."""
    if moves:
        print(f"\n{table(moves)}\n")
    faults, inside = (sum(move.fault is fault for move in moves) for fault in (True, False))
    rows = sum(len(lines) for lines in golden.values())
    print(f"{len(golden)} runs, {rows} rows: {faults} moved; {inside} moved inside their intervals")
    return int(faults > 0)


def carry_out_list(
    only: Sequence[str] | None = None,
    results: Path | None = None,
    why: str | None = None,
    runs: Path = LIST,
    goldens: Path = GOLDENS,
) -> int:
    """Carry out a list of runs and compare them with their goldens.

    `only` selects some of the runs; with `why`, new goldens are accepted instead. Returns an exit code.
    """
    try:
        known = listed(runs)
        for name in only or ():
            config.refuse_unknown("run", name, list(known))
        chosen = {name: words for name, words in known.items() if only is None or name in only}
        if why is not None:
            return accept(chosen, known, results, goldens, check_accept(why))
        golden = opened(chosen, known, goldens)
        made = carry_out(chosen, results)
        return report([move for name in chosen for move in compare(name, golden[name], made[name])], golden)
    except ErasebenchError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
