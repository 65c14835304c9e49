"""Leaderboard of rows as .csv, .parquet, .md, .tex and .html.

Only runs that may be compared are ranked together. Reads files of rows and of comparisons alone: no model, no GPU.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

from .. import rows
from ..contracts import ErasebenchError
from ..rows import Difference, Row
from . import row_table, seals
from .runs import BROKEN, COST, Run, digits, finite, fragment, labels, plain, told_apart
from .tables import PAPER, find_published

KINDS = ("overall", "forget", "keep", "quality", "attack", "probe", "cost")
RIPPLE = [f"lost_{k}" for k in range(1, 6)]  # from the nearest fifth of the retained concepts to the farthest
ARROWS = {True: "↑", False: "↓", None: ""}  # the better direction
FORMATS = ("csv", "parquet", "md", "tex", "html")
EXAMPLE = "python -m erasebench method=uce task=object target=airplane"
# Meaning of a metric, by the start of its name; the end of the name says how it was counted.
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
    "h_s": "harmonic mean of forgetting the style (1 - acc_e) and keeping the others (acc_s)",
    "h_a": "clip_s less clip_e",
    "clip_e": "how well images of the erased concepts match their prompts: CLIP similarity",
    "clip_s": "how well images of the concepts to keep match their prompts: CLIP similarity",
    "zero_shot_e": "share of images of the erased concept that CLIP calls by its name rather than a kept one's or anything else",
    "zero_shot_g": "the same of images made from its synonyms",
    "zero_shot_s": "share of images of what is kept that CLIP calls by their own names",
    "zero_shot_h": "harmonic mean of 1 - zero_shot_e, zero_shot_s and, with synonyms, 1 - zero_shot_g",
    "zero_shot_": "share of images asked for in other words that CLIP calls by the concept's name",
    "reference_e": "share of images of the erased concept as like its reference pictures as the base's are",
    "reference_g": "the same of images made from its synonyms",
    "reference_": "share of images asked for in other words that are as like the reference pictures as the base's are",
    "similarity_e": "mean cosine of images of the erased concept with its reference pictures",
    "shown_target": "share of images of the erased concept in which {judge} sees it, where it may see nothing",
    "shown_synonym": "share of images made from its synonyms in which {judge} sees it, where it may see nothing",
    "shown_retain": "share of images of the concepts to keep in which {judge} sees them, where it may see nothing",
    "turned_": "share of images in which {judge} sees the surrogate instead",
    "esr": "share of images of the erased concepts without the label among as many of {judge}'s first choices",
    "psr": "share of images of the concepts to keep with the label among as many of {judge}'s first choices",
    "orr": "share of images asked for by a term in which {judge} does not find the object first",
    "dm_ratio": "share of images in which {judge} finds what was erased",
    "dm_score": "mean confidence of {judge} in what was erased",
    "mace_": "detections, not images, of what was erased",
    "ner_": "share of images with a detection of what was erased",
    "nrr": "share of the base's images with a detection that have none now",
    "strict": "share of images with a detection of a class that nobody would call mild",
    "rsr": "share of images that show the concept again once it is given back",
    "lost_": "fall, from the base's, of what is recognised in a fifth of the concepts to keep: 1 is nearest to the erased",
    "ripple": "lost_1 less the mean of lost_2 to lost_5",
    "diversity": "mean distance between images of one kept concept",
    "broken_": "share of images that are no pictures: blank, one colour, a smooth ramp, noise, or a repeated one",
    "same_": "share of images that repeat another one of other prompts or seeds",
    "bound": "share of captions with two objects of which both are there",
    "bound_artist": "share of images of an object in a kept artist's style that show both",
    "bound_background": "share of captions with a background whose image is nearest to it",
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
    "_refused_as_forgotten": "a refused image counted as one without the concept",
}


def ranks(cells: list[Row]) -> list[int | None]:
    """Return each row's rank among comparable rows.

    A rank is 1 + the number of other methods whose interval lies wholly on the better side. Runs that differ only in
    their seed are one method, and it is better when all of them are.
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


@dataclass(frozen=True)
class Column:
    """Metric of a table, with the scale that its bars share."""

    label: str
    cells: dict[str, Row]  # run id -> row
    rank: dict[str, int | None]
    is_paper: bool = False  # published values of another model, not comparable with the previous column

    @cached_property
    def paper(self) -> Column | None:
        """Column of published values that do not compare, or None without any."""
        found = {run_id: (row, paper_value(row)) for run_id, row in self.cells.items()}
        nothing = dict.fromkeys(("low", "high", "n", "n_valid", "n_refused", "published", "higher_is_better"))
        cells = {k: replace(row, value=value, **nothing) for k, (row, value) in found.items() if value is not None}
        return Column(f"{self.label}: {PAPER}", cells, {}, is_paper=True) if cells else None

    @property
    def row(self) -> Row:
        return next(iter(self.cells.values()))

    @property
    def kind(self) -> int:
        return KINDS.index(self.row.group if self.row.group in KINDS else "quality")

    @property
    def glance(self) -> bool:
        """Whether the column is visible at once.

        For attacks and probes, only the attack success (asr) is; costs and other counts are shown on request.
        """
        return self.row.group not in ("attack", "probe") or self.row.metric == "asr"

    @cached_property
    def ends(self) -> list[float]:
        return [v for row in self.cells.values() for v in (row.value, row.low, row.high) if finite(v)]

    @property
    def rate(self) -> bool:
        """Whether values are rates, or harmonic means or differences of rates."""
        named = self.row.metric.startswith(("acc_", "h_", "faces_", "lost_", "ripple"))
        return (named or self.row.ci_method.startswith("wilson")) and max(map(abs, self.ends)) <= 1

    @cached_property
    def unit(self) -> bool:
        """Whether values are drawn from 0 to 1.

        Columns of rates then compare by eye.
        """
        return self.rate and min(self.ends) >= 0

    @cached_property
    def scale(self) -> tuple[float, float]:
        low, high = (0.0, 1.0) if self.unit else (min(self.ends), max(self.ends))
        if low >= 0 and low <= high / 2:
            return 0.0, high or 1.0
        pad = (high - low) * 0.08 or abs(high)
        return low - pad, high + pad

    def percent(self, value: float) -> float:
        return round(100 * (value - self.scale[0]) / (self.scale[1] - self.scale[0]), 1)

    def text(self, value: float, fewer: int = 0, sign: str = "") -> str:
        """Format a value with the same precision in the whole column.

        A rate has three decimals, anything else four digits.
        """
        places = 3 if self.rate else 3 - math.floor(math.log10(max(map(abs, self.ends)) or 1))
        return f"{value:{sign}z,.{max(0, min(places, 9) - fewer)}f}"

    def interval(self, row: Row) -> str:
        both = None not in (row.low, row.high)
        return f"[{self.text(row.low, 1)}, {self.text(row.high, 1)}]" if both else ""

    @property
    def arrow(self) -> str:
        """Arrow in the better direction."""
        return ARROWS[self.row.higher_is_better]

    @property
    def meaning(self) -> str:
        row = self.row
        if self.is_paper:
            return plain(f"{row.metric} as papers print it of Stable Diffusion: another model, other images, another judge")
        start = max((name for name in MEANING if row.metric.startswith(name)), key=len, default="")
        judge = row.judge or "the judge"
        said = [MEANING[start].format(judge=judge) if start else f"{row.metric}, as {judge} sees it"]
        said += [how for end, how in COUNTED.items() if row.metric.endswith(end)]
        said += [f"under the attack {row.attack}"] if row.attack else []
        said += [f"from {row.threshold:g} on"] if row.threshold is not None else []
        way = {True: " (higher is better)", False: " (lower is better)", None: ""}[row.higher_is_better]
        return plain(", ".join(said) + way + (f"; judge {judge} {row.judge_version}".rstrip() if row.judge else ""))

    def tip(self, row: Row) -> str:
        """Return the interval, counts and published value of a number.

        The judge and the threshold are part of the column.
        """
        said = [f"[{row.low:.4g}, {row.high:.4g}] {row.ci_method}"] if self.interval(row) else []
        counts = {name: getattr(row, name) for name in ("n", "n_valid", "n_refused")}
        said += [", ".join(f"{name} = {count}" for name, count in counts.items() if count is not None)]
        if row.published is not None:
            said.append(f"published {row.published!r}, {row.published_source}")
        return "\n".join(map(plain, filter(None, said)))

    def covers(self, row: Row) -> bool | None:
        """Return whether the interval covers the published value.

        Returns None if there is nothing to compare.
        """
        return None if None in (row.published, row.low, row.high) else row.low <= row.published <= row.high


def paper_value(row: Row) -> float | None:
    """Return the published counterpart of a row that does not compare.

    It does not compare if the row's world is another than the paper's.
    """
    found = find_published(row) if row.world != "photo" else None
    return None if found is None else found[0]


def _first(columns: Iterable[Column], group: str) -> list[Column]:
    """Return the columns of a group of metrics.

    Rates come before counts and distances.
    """
    return sorted((c for c in columns if c.row.group == group), key=lambda column: not column.unit)


@dataclass(frozen=True)
class Group:
    """Runs that may be ranked together, best first.

    The base comes before them; incomplete and broken runs are listed apart.
    """

    runs: list[Run]
    reference: list[Run] = field(default_factory=list)
    ranked: list[Run] = field(default_factory=list)
    incomplete: list[Run] = field(default_factory=list)
    broken: list[Run] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    order: Column | None = None

    @classmethod
    def of(cls, runs: list[Run]) -> Group:
        complete = [run for run in runs if not run.flaws]
        reference = [run for run in complete if run.head.method == "none"]
        ranked = [run for run in complete if run.head.method != "none"]
        columns = []
        for k, label in labels(dict.fromkeys(k for run in complete for k in run.cells)).items():
            cells = {run.head.run_id: run.cells[k] for run in reference + ranked if k in run.cells}
            judged = [run.head.run_id for run in ranked if k in run.cells]
            rank = ranks([cells[run_id] for run_id in judged])
            columns.append(Column(label, cells, dict(zip(judged, rank, strict=True))))
        columns.sort(key=lambda column: (column.kind, not column.glance, not column.rate))
        best = [c for c in columns if c.row.metric.startswith("h_")] + _first(columns, "forget")
        order = next(iter(best + columns), None)

        def place(run: Run) -> tuple[bool, float]:
            row = order.cells.get(run.head.run_id)
            return row is None, 0 if row is None else -row.value if row.higher_is_better else row.value

        ranked.sort(key=place)
        incomplete = [run for run in runs if run.reasons]
        broken = [run for run in runs if run.broken and not run.reasons]
        every = reference + ranked + incomplete + broken
        return cls(every, reference, ranked, incomplete, broken, columns, order)

    @property
    def apart(self) -> list[tuple[str, list[Run]]]:
        """Unranked runs, by reason: incomplete or broken."""
        return [(why, some) for why in ("incomplete", "broken") if (some := getattr(self, why))]

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
    def repeats(self) -> list[str]:
        """Line for each run with a failed repeat; its earlier measurements count."""
        return [plain(f"{run.label}: a later repeat failed: {run.later}") for run in self.runs if run.later]

    @property
    def anchor(self) -> str:
        return fragment("group", repr(self.runs[0].group))

    @property
    def axes(self) -> list[Column | None]:
        """Metric of forgetting and metric of keeping."""
        return [next(iter(_first(self.columns, kind)), None) for kind in ("forget", "keep")]

    @property
    def kinds(self) -> list[tuple[str, list[Column]]]:
        """Columns grouped by kind of metric."""
        return [(KINDS[k], list(same)) for k, same in groupby(self.table_columns, lambda column: column.kind)]

    @cached_property
    def table_columns(self) -> list[Column]:
        """Columns of a table.

        Each is followed by the published values that do not compare, if any.
        """
        return [one for column in self.columns for one in (column, column.paper) if one is not None]

    @property
    def together(self) -> list[list[Run]]:
        """Complete runs, grouped; runs that differ only in their attacks share an entry."""
        found: dict[tuple, list[Run]] = {}
        for run in self.reference + self.ranked:
            head = run.head
            found.setdefault((head.method, head.method_version, head.params, head.seed), []).append(run)
        return list(found.values())

    @cached_property
    def ripple(self) -> dict | None:
        """Loss of kept concepts by their distance to the erased ones.

        There is a line for each run that has all five metrics; None if no run does.
        """
        lines = []
        for same in self.together:
            for run in same if same[0] in self.ranked else ():
                cells = {row.metric: row for row in run.cells.values() if row.metric in RIPPLE}
                ends = [(row.low, row.value, row.high) for row in map(cells.get, RIPPLE) if row is not None]
                if len(ends) == len(RIPPLE) and not any(None in three for three in ends):
                    runs = [run.anchor for run in same]
                    lines.append({"runs": runs, "name": run.short, "ends": [[*map(digits, e)] for e in ends]})
                    break
        return {"lines": lines} if lines else None

    @cached_property
    def pareto(self) -> dict | None:
        """Points and axes of forgetting against keeping; None without such metrics.

        A rate that should be low is drawn as 1 - rate; anything else that should be low on a reversed axis. `attack`
        is the success of attacks on a run that was attacked.
        """
        axes = self.axes
        if None in axes:
            return None
        flip = [c.unit and not c.row.higher_is_better for c in axes]
        turned = [not c.unit and not c.row.higher_is_better for c in axes]
        points = []
        for same in self.together:
            run = next((r for r in same if all(r.head.run_id in c.cells for c in axes)), None)
            if run is None:
                continue
            cells = [c.cells[run.head.run_id] for c in axes]
            point = {
                "runs": [run.anchor for run in same],
                "name": run.short,
                "label": run.label,
                "reference": run in self.reference,
                "front": False,
                "attack": next((r.success for r in same if r.success), None),
            }
            for axis, row, flipped in zip("xy", cells, flip, strict=True):
                ends = [row.value if v is None else v for v in (row.low, row.value, row.high)]
                point[axis] = [*map(digits, [1 - v for v in reversed(ends)] if flipped else ends)]
            points.append(point)
        rivals = [p for p in points if not p["reference"]]
        place = [tuple(-p[a][1] if t else p[a][1] for a, t in zip("xy", turned, strict=True)) for p in rivals]
        for p, (x, y) in zip(rivals, place, strict=True):
            p["front"] = not any(u >= x and v >= y and (u, v) != (x, y) for u, v in place)
        names = [f"1 − {c.label}" if f else c.label for c, f in zip(axes, flip, strict=True)]
        return {"names": names, "turned": turned, "points": points} if rivals else None


@dataclass(frozen=True)
class Line:
    """Formatted metric of a comparison, the second side against the first."""

    metric: str
    found: Difference
    broken: tuple[bool, bool] = (False, False)  # the first side, and the second

    @property
    def rate(self) -> bool:
        return max(abs(self.found.first), abs(self.found.second)) <= 1

    @property
    def verdict(self) -> str:
        """Verdict on the second side: better, worse or undecided.

        It is undecided if the interval contains 0, if there is none, or if a broken side would win.
        """
        found = self.found
        if not self.interval or found.change_low <= 0 <= found.change_high:
            return "undecided"
        better = (found.difference > 0) == found.higher_is_better
        return "undecided" if self.broken[better] else "better" if better else "worse"

    @property
    def interval(self) -> str:
        ends = self.found.change_low, self.found.change_high
        return "" if None in ends else f"[{self._said(ends[0], '+')}, {self._said(ends[1], '+')}]"

    @property
    def first(self) -> str:
        return self._said(self.found.first)

    @property
    def second(self) -> str:
        return self._said(self.found.second)

    @property
    def difference(self) -> str:
        return self._said(self.found.difference, "+")

    @property
    def p(self) -> str:
        return "" if self.found.p_value is None else f"{self.found.p_value:.2g}"

    @property
    def n(self) -> str:
        return "" if self.found.n is None else str(self.found.n)

    @property
    def arrow(self) -> str:
        return ARROWS[self.found.higher_is_better]

    def _said(self, value: float, sign: str = "") -> str:
        return f"{value:{sign}z.3f}" if self.rate else f"{value:{sign}.4g}"


@dataclass(frozen=True)
class Comparison:
    """Comparison of two sides on the same prompts with the same seeds.

    `verified` is true if every run of both sides is verified.
    """

    differences: tuple[Difference, ...]
    verified: bool = False
    flaws: tuple[tuple[str, ...] | None, ...] = (None, None)  # each side's reasons; None: runs missing

    @cached_property
    def broken(self) -> tuple[Sequence[str], ...]:
        """Reasons why each side is broken.

        They are those of its runs. If its runs are missing, a side is broken if more of its images are broken than
        of the other's.
        """
        more = ([], [])
        for d in self.differences:
            if d.metric.startswith(BROKEN) and d.change_low is not None and not d.change_low <= 0 <= d.change_high:
                shares = (d.first, d.second) if d.difference < 0 else (d.second, d.first)
                said = "{:.0f} % of {} images are broken (the other side {:.0f} %)"
                split = plain(d.metric.removeprefix(BROKEN))
                more[d.difference > 0].append(said.format(100 * shares[0], split, 100 * shares[1]))
        return tuple(found if flaws is None else flaws for flaws, found in zip(self.flaws, more, strict=True))

    @property
    def head(self) -> Difference:
        return self.differences[0]

    @property
    def sides(self) -> tuple[str, str]:
        return plain(self.head.first_label), plain(self.head.second_label)

    @property
    def title(self) -> str:
        return " vs ".join(self.sides)

    @property
    def facts(self) -> list[str]:
        head = self.head
        said = [f"{head.task}: {head.targets}", head.base, head.sampler, head.how]
        said += [f"broken: {side}: {'; '.join(why)}" for side, why in zip(self.sides, self.broken, strict=True) if why]
        return [plain(fact) for fact in said]

    @property
    def anchor(self) -> str:
        return fragment("comparison", repr(self.differences))

    @property
    def images(self) -> int:
        return max(d.n or 0 for d in self.differences)

    @cached_property
    def lines(self) -> list[Line]:
        keys = [(d.metric, d.split, i) for i, d in enumerate(self.differences)]
        broken = tuple(map(bool, self.broken))
        return [Line(name, d, broken) for name, d in zip(labels(keys).values(), self.differences, strict=True)]

    @property
    def forest(self) -> list[dict]:
        """Differences with an interval.

        Those of rates are drawn as they are, all others in percent of the first side's value.
        """
        first, second = self.sides
        rates, others = [], []
        for line in self.lines:
            found, unit = line.found, 1 if line.rate else abs(line.found.first) / 100
            if line.interval and unit:
                ends = [digits(v / unit) for v in (found.change_low, found.difference, found.change_high)]
                (rates if line.rate else others).append({"name": line.metric, "ends": ends, "verdict": line.verdict})
        axis = f"{second} − {first}"
        drawn = {axis: rates, f"{axis}, in % of {first}": others}
        return [{"axis": name, "points": points} for name, points in drawn.items() if points]


def _read(
    paths: Iterable[Path], read: Callable[[Path], list], problems: list[str]
) -> Iterator[tuple[Path, list]]:
    """Yield the files of records that can be read.

    `problems` gets a line for each other file, and one for all files of other schemas.
    """
    outdated: list[rows.Outdated] = []
    for path in paths:
        try:
            found = read(path)
            if not found:
                raise ErasebenchError(f"{path}: holds no rows{rows.AGAIN}")
        except rows.Outdated as error:
            outdated.append(error)
        except ErasebenchError as error:
            problems.append(plain(error))
        else:
            yield path, found
    if outdated:
        more = f" (and {len(outdated) - 1} more files like it)" if len(outdated) > 1 else ""
        problems.append(plain(f"{outdated[0]}{more}"))


def load(results: Path, task: str | None = None, world: str | None = None) -> tuple[list[Group], list[str]]:
    """Return a results folder's groups of runs, and lines for unusable files.

    Each unusable file has one line.
    """
    files: dict[str, Path] = {}
    groups: dict[tuple, list[Run]] = {}
    problems: list[str] = []
    try:
        places = row_table.list_places(results)
    except ErasebenchError as error:
        problems.append(plain(error))
        places = sorted((results / "runs").glob("*.csv"))
    for path, read in _read(places, row_table.read_place, problems):
        for run_id in dict.fromkeys(row.run_id for row in read):
            if files.setdefault(run_id, path) != path:
                problems.append(plain(f"{path}: run {run_id} is in {files[run_id]} too; delete one of them"))
                continue
            mine = tuple(row for row in read if row.run_id == run_id)
            said = rows.verified(path)
            mark, word = (said, None) if seals.is_sealed(said) else (None, said)
            later = rows.later_failure(path)
            run = Run(mine, path.with_suffix(".webp"), mark, claimed=word, later=later)
            if task in (None, run.head.task) and world in (None, run.head.world):
                groups.setdefault(run.group, []).append(run)
    return [Group.of(told_apart(distinct(groups[k]))) for k in sorted(groups)], problems


def distinct(runs: Sequence[Run]) -> list[Run]:
    """Return the runs without those that a longer run repeats.

    The longer run is of the same model, with the same prompts, and has more attacks (or other words). A verified run
    stays, unless the longer one is verified too.
    """

    def numbers(run: Run) -> set[tuple]:
        return {(key, row.n, row.prompts_sha256, row.attack_params) for key, row in run.cells.items()}

    def again(run: Run, more: Run) -> bool:
        same = (run.head.method, run.head.method_version, run.head.params, run.head.seed, run.head.artifact)
        if same != (more.head.method, more.head.method_version, more.head.params, more.head.seed, more.head.artifact):
            return False
        return not more.reasons and numbers(run) < numbers(more) and (run.verified is None or more.verified is not None)

    return [run for run in runs if run.reasons or not any(again(run, other) for other in runs)]


def comparisons(
    results: Path, groups: Sequence[Group], task: str | None = None, world: str | None = None
) -> tuple[list[Comparison], list[str]]:
    """Return all comparisons, and lines for unusable files.

    They are read from results/comparisons.
    """
    verified = {run.head.run_id for group in groups for run in group.runs if run.verified is not None}
    broken = {run.head.run_id: run.broken for group in groups for run in group.runs}
    found, problems = [], []
    read_differences = lambda path: rows.read(path, Difference)
    files: dict[tuple, Path] = {}
    for path, read in _read(sorted((results / "comparisons").glob("*.csv")), read_differences, problems):
        if files.setdefault(tuple(read), path) != path:
            problems.append(plain(f"{path}: the same as {files[tuple(read)]}; delete one of them"))
            continue
        head = read[0]
        if task in (None, head.task) and world in (None, head.world):
            sides = head.first_runs.split(), head.second_runs.split()
            flaws = tuple(
                tuple(dict.fromkeys(why for run in side for why in broken[run])) if set(side) <= set(broken) else None
                for side in sides
            )
            found.append(Comparison(tuple(read), {*sides[0], *sides[1]} <= verified, flaws))
    return found, problems


def write_files(results: Path, groups: list[Group], compared: list[Comparison], formats: Iterable[str]) -> dict[str, Path]:
    from .render import FILES  # here, as render imports this module

    if not groups:
        raise ErasebenchError(f"no rows to show in {results / 'runs'}; make some with: {EXAMPLE}")
    paths = {name: results / f"leaderboard.{name}" for name in formats}
    for name, path in paths.items():
        rows.replace_file(path, FILES[name](groups, compared), "--results")
    return paths


def build(results: Path, task: str | None = None, world: str | None = None, formats=FORMATS) -> dict[str, Path]:
    """Write leaderboard.<format> for each format.

    Raises ErasebenchError for a damaged file, after the others were used.
    """
    groups, problems = load(results, task, world)
    compared, more = comparisons(results, groups, task, world)
    paths = write_files(results, groups, compared, formats) if groups or not problems else {}
    if problems + more:
        raise ErasebenchError("\n".join(problems + more))
    return paths


def publish(results: Path, task: str | None, world: str | None, formats: Sequence[str]) -> int:
    """Write files and print the tables; returns an exit status.

    It is 1 if a file could not be used or there is nothing to print.
    """
    from .render import as_text

    wanted = {*FORMATS, "text"} if "all" in formats else set(formats)
    sys.stdout.reconfigure(errors="backslashreplace")
    groups, problems = load(results, task, world)
    compared, more = comparisons(results, groups, task, world)
    try:
        for problem in problems + more:
            print(problem, file=sys.stderr)
        paths = write_files(results, groups, compared, [name for name in FORMATS if name in wanted])
    except ErasebenchError as error:
        print(error, file=sys.stderr)
        return 1
    if "text" in wanted:
        print(as_text(groups))
    print("".join(f"{path}\n" for path in paths.values()), end="")
    return 1 if problems + more else 0
