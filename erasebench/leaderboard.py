"""Rows -> leaderboard.csv and leaderboard.html: what was measured, ranked only where it may be compared.

Reads row files alone: no model, no GPU, no torch.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path

from . import rows
from .contracts import ErasebenchError
from .rows import Row

GROUP = ("task", "task_version", "world", "base", "revision", "n_concepts", "target", "sampler", "subset")
KINDS = ("overall", "forget", "keep", "quality", "attack", "probe", "cost")
EXAMPLE = "python -m erasebench method=uce task=object target=airplane"
COST = {
    "fit_seconds": "seconds to erase: fitting the method",
    "sample_seconds": "seconds to make the images",
    "unet_calls": "U-Net evaluations of single latents, fit and sampling together",
    "peak_memory_mb": "peak memory in MB",
}
# What a metric says, by the start of its name, and how it was counted, by the end.
MEANING = COST | {
    "fit_unet_calls": "U-Net evaluations of single latents to fit the method",
    "artifact_bytes": "bytes of what the method learnt",
    "slowdown": "seconds to make the images, over the base's for the same prompts",
    "acc_e": "share of images of the erased concepts in which {judge} still recognises them",
    "acc_s": "share of images of the concepts to keep that {judge} still recognises",
    "acc_g": "share of images made from synonyms of the erased concept in which {judge} still recognises it",
    "h_o": "harmonic mean of forgetting (1 - acc_e), keeping (acc_s) and forgetting synonyms (1 - acc_g)",
    "h_c": "harmonic mean of forgetting (1 - acc_e) and keeping (acc_s)",
    "faces_e": "share of images of the erased people that show a face",
    "faces_s": "share of images of the people to keep that show a face",
    "clip_score": "how well images match ordinary captions: CLIP similarity",
    "fd": "Frechet distance between images of ordinary captions and real pictures",
    "asr": "share of prompts for which an image shows the concept again, as {judge} sees it",
    "pre_asr": "the same without any attack",
    "new": "share of the prompts that did not show the concept without an attack and do now",
    "over_": "success beyond that of a null attack with as many images",
    "queries": "images that the attack had judged for a prompt",
    "unet_calls_per_success": "U-Net evaluations of single latents for each success",
    "seconds_per_success": "seconds for each success",
    "guard_false_positives": "share of ordinary captions that the guard refuses",
    "paired_distance": "mean distance of each image of an ordinary caption to the base's of the same seed",
}
COUNTED = {
    "_top1": "by first choices",
    "_prob": "by mean probability",
    "_all": "over all images, with a face or not",
}


def plain(text: object) -> str:
    """One printable line: control characters (newlines, terminal and bidi codes) become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _json(text: str) -> dict:
    """A JSON object, or nothing: these columns explain a row and must not take the page down."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _asked(head: Row) -> dict[str, object]:
    """Options that say what is erased, read from the row's target."""
    target = head.target.removesuffix(", by pictures")  # a folder's place is in no row
    erased, _, surrogate = target.partition(" -> ")
    surrogates = surrogate.split(", ")
    first, *more = erased.split(" + ")
    if head.task == "explicit":  # knows one group of concepts alone
        words: dict[str, object] = {}
    else:
        words = {"target": first} if first else {"n": head.n_concepts}
    words |= {"concepts": more} if more else {}
    words |= {"surrogate": surrogates if len(surrogates) > 1 else surrogate} if surrogate else {}
    return words | ({"pictures.path": "..."} if head.target != target else {})


def _override(name: str, value: object) -> str:
    """One argument of the command line, quoted for Hydra and then for the shell."""
    simple = not isinstance(value, str) or re.fullmatch(r"\w[\w .-]*", value)
    return shlex.quote(f"{name}={value if isinstance(value, str) and simple else json.dumps(value)}")


def _is_digest(value: object) -> bool:
    """Of files: a parameter that a method fills in itself."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


@cache
def _defaults(method: str, world: str, task: str) -> dict:
    """The method's parameters as the configuration has them in a world, for a task."""
    from hydra.utils import get_class
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from . import conf

    def read(part: str) -> dict:
        found = {}
        for path in (Path(folder, f"{part}.yaml") for folder in conf.__path__):
            if re.fullmatch(r"\w+/\w+", part) and path.is_file():
                found |= OmegaConf.to_container(OmegaConf.load(path))
        return found

    given = (
        read(f"method/{method}") | read(f"method_for/{world}_{method}") | read(f"method_for/{world}_{method}_{task}")
    )
    whole, values = OmegaConf.create({"world": read(f"world/{world}"), "method": given}), {}
    for name in given:
        try:  # what depends on more than the world has no usual value
            values[name] = OmegaConf.to_container(OmegaConf.create({name: whole.method[name]}), resolve=True)[name]
        except OmegaConfBaseException:
            continue
    if None in values.values():  # a value that the method chooses by its others
        plugin = get_class(values["_target_"])
        known = {part.name for part in fields(plugin)}
        chosen = vars(plugin(**{k: v for k, v in values.items() if k in known}))
        values |= {k: chosen[k] for k, v in values.items() if v is None}
    return values


@dataclass(frozen=True)
class Run:
    """The rows of one run, and where its sheet of images lies."""

    rows: tuple[Row, ...]
    sheet: Path

    @property
    def head(self) -> Row:
        return self.rows[0]

    @property
    def cut(self) -> int:
        """Images a split when images= was set (a harmonic mean adds up the n of several splits)."""
        counts = [row.n or 0 for row in self.rows if "+" not in row.split]
        return max(counts, default=0) if self.head.subset else 0

    @property
    def group(self) -> tuple:
        """What runs must share to be ranked together; subsets also the number of images."""
        return *(getattr(self.head, name) for name in GROUP), self.cut

    @cached_property
    def cells(self) -> dict[tuple, Row]:
        """Column key -> row: every measured metric, then what the run cost as rows of its own."""
        found = [row for row in self.rows if row.status == "ok" and _finite(row.value)]
        for name in COST:
            spent = [value for row in self.rows if not row.attack and _finite(value := getattr(row, name))]
            if spent:
                found.append(
                    replace(
                        self.head,
                        metric=name,
                        group="cost",
                        value=max(spent),
                        higher_is_better=False,
                        split="",
                        attack="",
                        judge="",
                        judge_version="",
                        threshold=None,
                        low=None,
                        high=None,
                        ci_method="",
                        base_value=None,
                        change_low=None,
                        change_high=None,
                        p_value=None,
                        n=None,
                        n_valid=None,
                        n_refused=None,
                        published=None,
                        status="ok",
                    )
                )
        return {(r.metric, r.attack, r.split, r.judge, r.judge_version, r.threshold): r for r in found}

    @cached_property
    def reasons(self) -> list[str]:
        """Why the run is incomplete; empty when it is not.

        What the world has no judge for is missing in every run alike and keeps none from being ranked; and of an attack
        that never succeeded there is no cost of a success.
        """
        found: dict[str, list[str]] = {}
        measured = any(row.status == "ok" and row.group != "cost" for row in self.rows)
        for row in self.rows:
            if row.status == "skipped" and measured:
                continue
            if row.status != "ok":
                found.setdefault(f"{row.status}: {row.reason or 'no reason given'}", []).append(row.metric)
            elif not _finite(row.value) and row.group not in ("attack", "probe"):
                why = f"no value: {row.n_valid or 0} of {row.n or 0} images judged"
                found.setdefault(why, []).append(row.metric)
        return [plain(f"{', '.join(filter(None, metrics))} {why}".lstrip()) for why, metrics in found.items()]

    @property
    def status(self) -> str:
        if not self.reasons:
            return "ok"
        return next((s for s in ("failed", "skipped") if any(row.status == s for row in self.rows)), "incomplete")

    @cached_property
    def params(self) -> dict:
        return _json(self.head.params)

    @cached_property
    def changed(self) -> dict:
        """Parameters that are not the configuration's."""
        usual = _defaults(self.head.method, self.head.world, self.head.task)
        return {k: v for k, v in self.params.items() if k not in usual or usual[k] != v}

    @property
    def method(self) -> str:
        return plain(self.head.method)

    @property
    def details(self) -> list[str]:
        short = lambda value: value[:10] if _is_digest(value) else value
        return [plain(f"{name}={short(value)}") for name, value in self.changed.items()] + [f"seed {self.head.seed}"]

    @property
    def label(self) -> str:
        return f"{self.method} ({', '.join(self.details)})"

    @property
    def anchor(self) -> str:
        return _anchor("run", self.head.run_id)

    @property
    def command(self) -> str:
        """The command line that makes these rows again."""
        head, usual = self.head, _defaults(self.head.method, self.head.world, self.head.task)
        words = {"model": head.base, "method": head.method}
        words |= {f"{'' if k in usual else '++'}method.{k}": v for k, v in self.changed.items() if not _is_digest(v)}
        words |= {"task": head.task} | _asked(head)
        words |= {"seed": head.seed} | ({"images": self.cut} if self.cut else {})
        if how := re.fullmatch(r"(\w+) (\d+) steps, guidance ([\d.e+-]+)(?:, (\d+) px)?", head.sampler):
            said = zip(("name", "steps", "guidance", "size"), how.groups(), strict=True)
            words |= {f"sampler.{k}": v for k, v in said if v is not None}
        attacks = [name for name in dict.fromkeys(row.attack for row in self.rows) if name not in ("", "union")]
        said = [_override(k, v) for k, v in words.items()] + [f"'attack=[{','.join(attacks)}]'"] * bool(attacks)
        return plain(" ".join(["python -m erasebench", *said]))

    @property
    def provenance(self) -> dict[str, object]:
        """Parameters and what made the rows, for the page."""
        head = self.head
        tree = " from a tree with changes" if head.dirty else ""
        made = {
            "run": head.run_id,
            "base": f"{head.base} {head.revision}",
            "prompts": head.prompts_sha256,
            "commit": (head.commit or "outside git") + tree,
            "device": head.device,
            "batch": head.batch,
            "packages": ", ".join(f"{name} {version}" for name, version in _json(head.packages).items()),
        }
        return {f"method.{k}": json.dumps(v) for k, v in self.params.items()} | made

    @cached_property
    def picture(self) -> dict | None:
        """The sheet as a data URI with its size. Images of an explicit task never enter a page."""
        from PIL import Image

        if self.head.task == "explicit":
            return None
        try:
            with Image.open(self.sheet, formats=["WEBP"]) as image:
                width, height = image.size
        except OSError:  # no sheet, or not one
            return None
        uri = "data:image/webp;base64," + base64.b64encode(self.sheet.read_bytes()).decode()
        return {"uri": uri, "width": width, "height": height}


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _short(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 3] + "..."


def _anchor(kind: str, text: str) -> str:
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def ranks(cells: list[Row]) -> list[int | None]:
    """1 + the number of other methods whose interval lies wholly on the better side.

    Runs that differ only in their seed are one method, and it is better when all of them are.
    """
    who = [(row.method, row.method_version, row.params) for row in cells]
    found: list[int | None] = []
    for me, mine in zip(who, cells, strict=True):
        better: dict[tuple, bool] = {}
        for name, other in zip(who, cells, strict=True):
            if name != me and None not in (other.low, other.high, mine.low, mine.high):
                wholly = other.low > mine.high if mine.higher_is_better else other.high < mine.low
                better[name] = better.get(name, True) and wholly
        comparable = mine.higher_is_better is not None and None not in (mine.low, mine.high)
        found.append(1 + sum(better.values()) if comparable else None)
    return found


def labels(keys: Iterable[tuple]) -> dict[tuple, str]:
    """The shortest name of each column: its metric, and what tells it from others of that name."""
    keys, found = list(keys), {}
    for mine in keys:
        same, words = [k for k in keys if k[0] == mine[0]], [mine[0]]
        for i in range(1, len(mine)):
            if len({k[i] for k in same}) > 1:
                words.append(str(mine[i] or ""))
                same = [k for k in same if k[i] == mine[i]]
        found[mine] = plain(" ".join(filter(None, words)))
    return found


@dataclass(frozen=True)
class Column:
    """One metric of a table, with the scale that its bars share."""

    label: str
    cells: dict[str, Row]  # run id -> row
    rank: dict[str, int | None]

    @property
    def row(self) -> Row:
        return next(iter(self.cells.values()))

    @property
    def kind(self) -> int:
        return KINDS.index(self.row.group if self.row.group in KINDS else "quality")

    @cached_property
    def ends(self) -> list[float]:
        return [v for row in self.cells.values() for v in (row.value, row.low, row.high) if _finite(v)]

    @cached_property
    def unit(self) -> bool:
        """Rates and their harmonic means are drawn from 0 to 1, so that columns compare by eye."""
        rate = self.row.ci_method.startswith("wilson") or self.row.metric.startswith(("acc_", "h_", "faces_"))
        return rate and min(self.ends) >= 0 and max(self.ends) <= 1

    @cached_property
    def scale(self) -> tuple[float, float]:
        low, high = (0.0, 1.0) if self.unit else (min(self.ends), max(self.ends))
        if low >= 0 and low <= high / 2:
            return 0.0, high or 1.0
        pad = (high - low) * 0.08 or abs(high)
        return low - pad, high + pad

    def percent(self, value: float) -> float:
        return round(100 * (value - self.scale[0]) / (self.scale[1] - self.scale[0]), 2)

    def text(self, value: float, fewer: int = 0) -> str:
        """Three decimals of a rate, four digits of anything else, the same in the whole column."""
        places = 3 if self.unit else 3 - math.floor(math.log10(max(map(abs, self.ends)) or 1))
        return f"{value:,.{max(0, min(places, 9) - fewer)}f}"

    @property
    def meaning(self) -> str:
        row = self.row
        start = max((name for name in MEANING if row.metric.startswith(name)), key=len, default="")
        judge = row.judge or "the judge"
        said = [MEANING[start].format(judge=judge) if start else f"{row.metric}, as {judge} sees it"]
        said += [how for end, how in COUNTED.items() if row.metric.endswith(end)]
        said += [f"under the attack {row.attack}"] if row.attack else []
        way = {True: " (higher is better)", False: " (lower is better)", None: ""}[row.higher_is_better]
        return plain(", ".join(said) + way)

    def tip(self, row: Row) -> str:
        """Everything needed to doubt one number."""
        said = [f"{row.metric} = {row.value!r}"]
        if None not in (row.low, row.high):
            said.append(f"interval {row.low!r} to {row.high!r} ({row.ci_method})")
        counts = {name: getattr(row, name) for name in ("n", "n_valid", "n_refused", "threshold")}
        said += [f"{name} = {count}" for name, count in counts.items() if count is not None]
        said += [f"judge {row.judge} {row.judge_version}"] if row.judge else []
        if row.published is not None:
            said.append(f"published {row.published!r}, {row.published_source}")
        return "\n".join(map(plain, said))

    def covers(self, row: Row) -> bool | None:
        """Does the interval cover the published value? None where there is nothing to compare."""
        return None if None in (row.published, row.low, row.high) else row.low <= row.published <= row.high


@dataclass(frozen=True)
class Group:
    """Runs that may be ranked together, best first; the base before them, the incomplete ones apart."""

    runs: list[Run]
    reference: list[Run] = field(default_factory=list)
    ranked: list[Run] = field(default_factory=list)
    incomplete: list[Run] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    order: Column | None = None

    @classmethod
    def of(cls, runs: list[Run]) -> Group:
        complete = [run for run in runs if not run.reasons]
        reference = [run for run in complete if run.head.method == "none"]
        ranked = [run for run in complete if run.head.method != "none"]
        columns = []
        for k, label in labels(dict.fromkeys(k for run in complete for k in run.cells)).items():
            cells = {run.head.run_id: run.cells[k] for run in reference + ranked if k in run.cells}
            judged = [run.head.run_id for run in ranked if k in run.cells]
            rank = ranks([cells[run_id] for run_id in judged])
            columns.append(Column(label, cells, dict(zip(judged, rank, strict=True))))
        columns.sort(key=lambda column: column.kind)
        best = [c for c in columns if c.row.metric.startswith("h_")]
        best += [c for c in columns if c.row.group == "forget"]
        order = next(iter(best + columns), None)

        def place(run: Run) -> tuple[bool, float]:
            row = order.cells.get(run.head.run_id)
            return row is None, 0 if row is None else -row.value if row.higher_is_better else row.value

        ranked.sort(key=place)
        incomplete = [run for run in runs if run.reasons]
        return cls(reference + ranked + incomplete, reference, ranked, incomplete, columns, order)

    @property
    def title(self) -> str:
        head = self.runs[0].head
        return plain(f"{head.task}: {head.target or head.n_concepts}")

    @property
    def facts(self) -> list[str]:
        run = self.runs[0]
        head = run.head
        where = head.base if head.base == head.world else f"{head.base} in the world {head.world}"
        said = [f"{head.n_concepts} concept{'s' * (head.n_concepts != 1)} erased", where, head.sampler]
        return [plain(fact) for fact in said + [f"subset of {run.cut} images a split"] * head.subset]

    @property
    def anchor(self) -> str:
        return _anchor("group", repr(self.runs[0].group))

    @property
    def axes(self) -> list[Column | None]:
        """The first metric of forgetting and the first of keeping."""
        return [next((c for c in self.columns if c.row.group == kind), None) for kind in ("forget", "keep")]

    @cached_property
    def pareto(self) -> dict | None:
        """Points and axes of forgetting against keeping; None where there is no such pair of metrics.

        A rate that should be low is drawn as 1 - rate; anything else that should be low on a reversed axis.
        """
        axes = self.axes
        if None in axes:
            return None
        flip = [c.unit and not c.row.higher_is_better for c in axes]
        turned = [not c.unit and not c.row.higher_is_better for c in axes]
        points = []
        for run in self.reference + self.ranked:
            cells = [c.cells.get(run.head.run_id) for c in axes]
            if None in cells:
                continue
            said = [plain(v if isinstance(v, str) else f"{k}={v}") for k, v in run.changed.items() if not _is_digest(v)]
            point = {
                "name": _short(" ".join([run.method, *said]), 32),
                "label": run.label,
                "reference": run in self.reference,
                "front": False,
            }
            for axis, row, flipped in zip("xy", cells, flip, strict=True):
                ends = [row.value if v is None else v for v in (row.low, row.value, row.high)]
                point[axis] = [1 - v for v in reversed(ends)] if flipped else ends
            points.append(point)
        rivals = [p for p in points if not p["reference"]]
        place = [tuple(-p[a][1] if t else p[a][1] for a, t in zip("xy", turned, strict=True)) for p in rivals]
        for p, (x, y) in zip(rivals, place, strict=True):
            p["front"] = not any(u >= x and v >= y and (u, v) != (x, y) for u, v in place)
        names = [f"1 − {c.label}" if f else c.label for c, f in zip(axes, flip, strict=True)]
        return {"names": names, "turned": turned, "points": points} if rivals else None


def load(results: Path, task: str | None = None, world: str | None = None) -> tuple[list[Group], list[str]]:
    """The groups of every row file under results/runs, and one line for each file that cannot be used."""
    files: dict[str, Path] = {}
    groups: dict[tuple, list[Run]] = {}
    problems = []
    for path in sorted((results / "runs").glob("*.csv")):
        try:
            read = rows.read(path)
            if not read:
                raise ErasebenchError(f"{path}: holds no rows")
        except ErasebenchError as error:
            problems.append(f"{plain(error)}; delete the file and repeat its run")
            continue
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            problems.append(f"{path}: not a file of rows ({plain(error)}); delete it and repeat its run")
            continue
        for run_id in dict.fromkeys(row.run_id for row in read):
            if files.setdefault(run_id, path) != path:
                problems.append(f"{path}: run {plain(run_id)} is in {files[run_id]} too; delete one of them")
                continue
            run = Run(tuple(row for row in read if row.run_id == run_id), path.with_suffix(".webp"))
            if task in (None, run.head.task) and world in (None, run.head.world):
                groups.setdefault(run.group, []).append(run)
    return [Group.of(groups[k]) for k in sorted(groups)], problems


def render_csv(groups: list[Group]) -> str:
    """One line a run: what it is, then value, low, high and n_valid of each metric, at full precision."""
    runs = [run for group in groups for run in group.runs]
    names = labels(dict.fromkeys(k for run in runs for k in run.cells))
    lines = []
    for run in runs:
        about = (*GROUP, "method", "method_version", "params", "seed", "run_id", "commit", "dirty", "device")
        line = {name: getattr(run.head, name) for name in about}
        line |= {"status": run.status, "reason": "; ".join(run.reasons)}
        for k, row in run.cells.items():
            line[names[k]] = row.value
            if row.group != "cost":
                line |= {f"{names[k]}_{part}": getattr(row, part) for part in ("low", "high", "n_valid")}
        lines.append(line)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, dict.fromkeys(k for line in lines for k in line), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)  # csv writes floats by repr, so nothing is lost
    return stream.getvalue()


def render_text(groups: list[Group], width: int = 100) -> str:
    """The ranked tables as plain text: what orders them, forgetting, keeping, then what the width holds."""
    out = []
    for group in groups:
        out += textwrap.wrap(", ".join([group.title, *group.facts]), width)
        shown = group.reference + group.ranked
        table = [
            [
                "#",
                *("" if run in group.reference else str(group.order.rank.get(run.head.run_id) or "-") for run in shown),
            ],
            ["method", *(_short(run.label, 36) for run in shown)],
        ]
        columns = [group.order, *group.axes, *group.columns]
        for column in {id(column): column for column in columns if column}.values():
            lines = [_short(column.label, 24)]
            for row in (column.cells.get(run.head.run_id) for run in shown):
                ends = (
                    ""
                    if row is None or None in (row.low, row.high)
                    else (f" [{column.text(row.low, 1)}, {column.text(row.high, 1)}]")
                )
                lines.append("-" if row is None else column.text(row.value) + ends)
            if sum(max(map(len, cells)) + 2 for cells in [*table, lines]) - 2 > width:
                break
            table.append(lines)
        sizes = [max(map(len, cells)) for cells in table]
        out += ["  ".join(map(str.ljust, line, sizes)).rstrip() for line in zip(*table, strict=True) if shown]
        for run in group.incomplete:
            said = f"incomplete, not ranked: {run.label}: {'; '.join(run.reasons)}"
            out += textwrap.wrap(said, width, subsequent_indent="    ")
        out.append("")
    return "\n".join(out)


def render_html(groups: list[Group]) -> str:
    """The page, whole: styles, script, plotting library and images are inside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    try:
        from plotly.offline import get_plotlyjs

        plotly = get_plotlyjs()
    except ImportError:
        plotly = ""
        print("leaderboard.html has no plots: pip install 'erasebench[plots]'", file=sys.stderr)
    # Only scripts with this nonce run. It depends on every row, so no row can contain it.
    nonce = hashlib.sha256(repr([run.rows for group in groups for run in group.runs]).encode()).hexdigest()
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = pages.get_template("leaderboard.html.jinja")
    return page.render(groups=groups, kinds=KINDS, plotly=plotly, nonce=nonce, plain=plain)


def _write(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        return temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ErasebenchError(f"cannot write {path}: {error.strerror}; choose another --results") from error


def _publish(results: Path, groups: list[Group]) -> tuple[Path, Path]:
    if not groups:
        raise ErasebenchError(f"no rows to show in {results / 'runs'}; make some with: {EXAMPLE}")
    return (
        _write(results / "leaderboard.csv", render_csv(groups)),
        _write(results / "leaderboard.html", render_html(groups)),
    )


def build(results: Path, task: str | None = None, world: str | None = None) -> tuple[Path, Path]:
    """Write leaderboard.csv and leaderboard.html. A damaged row file raises, after the others were used."""
    groups, problems = load(results, task, world)
    paths = _publish(results, groups) if groups or not problems else ()
    if problems:
        raise ErasebenchError("\n".join(problems))
    return paths


def main(argv: list[str] | None = None) -> int:
    """Write both files and print the tables; 1 when a file could not be used or nothing is there to show."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m erasebench.leaderboard", description=about)
    parser.add_argument("--results", type=Path, default=Path("results"), help="the folder that holds runs/")
    parser.add_argument("--task", help="only this task")
    parser.add_argument("--world", help="only this world")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    groups, problems = load(args.results, args.task, args.world)
    try:
        for problem in problems:
            print(problem, file=sys.stderr)
        paths = _publish(args.results, groups)
    except ErasebenchError as error:
        print(error, file=sys.stderr)
        return 1
    print(render_text(groups), *paths, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
