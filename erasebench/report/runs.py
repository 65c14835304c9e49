"""Run as shown on the leaderboard: numbers by column, name, and command."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..rows import Row
from ..stats import LEVEL, wilson

BROKEN, SAME = "broken_", "same_"  # prefixes, before a split, of metrics of broken and of repeated images
GROUP = ("task", "task_version", "world", "base", "revision", "n_concepts", "target", "sampler", "subset")
SHEET_BYTES = 2_000_000  # largest sheet in a page
POINTS = 300  # most points of a curve
COST = {
    "fit_seconds": "seconds to erase: fitting the method",
    "sample_seconds": "seconds to make the images",
    "unet_calls": "U-Net evaluations of single latents, fit and sampling together",
    "peak_memory_mb": "peak memory in MB",
}

UNSAID = dict.fromkeys(("threshold", "low", "high", "base_value", "change_low", "change_high", "p_value")) | {
    **dict.fromkeys(("n", "n_valid", "n_refused", "published")),
    **dict.fromkeys(("split", "attack", "judge", "judge_version", "ci_method", "by_concept"), ""),
    "status": "ok",
}


def plain(text: object) -> str:
    """Return text as one printable line.

    Control characters (newlines, terminal and bidi codes) become escapes.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def json_of(text: str, kind: type = dict) -> dict | list:
    """Return a JSON object or list; empty if the text is none.

    The columns that it reads explain a row and must not take the page down.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return kind()
    return found if isinstance(found, kind) and _is_shallow(found) else kind()


def _is_shallow(value: object, most: int = 20) -> bool:
    """Return whether a value is nested at most `most` levels deep.

    Deeper lists would fail when they are written or drawn again.
    """
    level = [value]
    for _ in range(most):
        level = [v for some in level for v in (some.values() if isinstance(some, dict) else some)]
        level = [v for v in level if isinstance(v, dict | list)]
    return not level


def _is_digest(value: object) -> bool:
    """Return whether a value is a digest of files.

    A method fills in such a parameter itself.
    """
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _curves(notes: dict, within: str = "") -> Iterator[tuple[str, list[float]]]:
    """Yield the lists of numbers in a fit's notes, with names."""
    for key, value in notes.items():
        name = f"{within} {key}".strip()
        if isinstance(value, dict):
            yield from _curves(value, name)
        elif isinstance(value, list) and len(value) > 1 and all(map(_number, value)):
            yield plain(name), value


def labels(keys: Iterable[tuple]) -> dict[tuple, str]:
    """Return the shortest name of each column.

    It is the metric, and the parts that distinguish it from others of that name.
    """
    keys, found = list(keys), {}
    for mine in keys:
        same, words = [k for k in keys if k[0] == mine[0]], [mine[0]]
        for i in range(1, len(mine)):
            if len({k[i] for k in same}) > 1:
                words.append(str(mine[i] or ""))
                same = [k for k in same if k[i] == mine[i]]
        found[mine] = plain(" ".join(filter(None, words)))
    return found


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: object) -> bool:
    """Return whether a value is a finite JSON number.

    JSON's integers may be beyond any float.
    """
    return type(value) in (int, float) and -1e300 < value < 1e300


def digits(value: float) -> float:
    """Round to four significant digits, which are enough to draw."""
    return float(f"{value:.4g}")


def _each(text: str) -> dict[str, list[float] | None]:
    """Return concept -> [rate, low, high, images judged] from a row's by_concept.

    The value is None if no image was judged.
    """
    found: dict[str, list[float] | None] = {}
    for name, said in json_of(text).items():
        match said:
            case [None, 0]:
                found[name] = None
            case [int() | float() as rate, int() as n] if 0 <= rate <= 1 and 0 < n < 1e9:
                found[name] = [*(round(v, 3) for v in (rate, *wilson(round(rate * n), n))), n]
    return found


def found_again(how: str, said: dict) -> str:
    """Return the result of re-running in one line."""
    counts = (("identical", "values identical"), ("within", "within the interval"))
    found = [f"{said[key]} {what}" for key, what in counts if isinstance(said.get(key), int)]
    found += [f"at commit {short(said['commit'], 60)}"] if isinstance(said.get("commit"), str) else []
    return plain(": ".join(filter(None, [how, ", ".join(found)])))


def short(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 3] + "..."


def fragment(kind: str, text: str) -> str:
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def exceeds(row: Row) -> bool:
    """Return whether a share significantly exceeds the base's.

    The change must exceed 0 by its interval. That interval resamples concepts, and a method that breaks every image
    of two people in ten stays within it: if images are paired, McNemar's test decides too. Neither is conclusive for
    two images, but all images against none of the base's is plain. Without a change, the share's own interval is
    compared with the base's value.
    """
    before = row.base_value if finite(row.base_value) else 0.0
    if row.value <= before:
        return False
    if row.value == 1 and before == 0:
        return True
    if row.change_low is None:
        return row.low is None or row.low > before
    return row.change_low > 0 or (row.p_value is not None and row.p_value < 1 - LEVEL)


def breakage(rows: Iterable[Row]) -> list[str]:
    """Return the reasons why a run of these rows is broken; empty if none.

    A run is broken if more images of a split are broken (blank, noise or repeats) than of the base's.

    To every judge of concepts such images are a success, so no number of the run is evidence of forgetting.
    """
    share = {row.metric: row for row in rows if row.metric.startswith((BROKEN, SAME)) and row.status == "ok"}
    found = []
    for name, row in share.items():
        if not name.startswith(BROKEN) or not finite(row.value) or not exceeds(row):
            continue
        split = name.removeprefix(BROKEN)
        repeated = share[SAME + split].value or 0 if SAME + split in share else 0
        kind = "repeat one another" if 2 * repeated > row.value else "are blank or noise"
        base = f" (base {100 * row.base_value:.0f} %)" if finite(row.base_value) else ""
        found.append(plain(f"{100 * row.value:.0f} % of {split} images {kind}{base}"))
    return found


@dataclass(frozen=True)
class Run:
    """Rows of one run, with its provenance.

    sheet: path of its sheet of images; verified: result of re-running it; apart: parameters that distinguish it from
    other runs of its method; later: reason why a repeat failed; claimed: result of re-running as reported by
    somebody else.
    """

    rows: tuple[Row, ...]
    sheet: Path
    verified: dict | None = None
    apart: frozenset[str] = frozenset()
    later: str = ""
    claimed: dict | None = None  # result of re-running, as reported by somebody else

    @property
    def head(self) -> Row:
        return self.rows[0]

    @property
    def images(self) -> int:
        """Number of images of the largest split.

        Harmonic means are left out: they add up the n of several splits.
        """
        return max((row.n or 0 for row in self.rows if "+" not in row.split), default=0)

    @property
    def cut(self) -> int:
        """Number of images in each split if images= was set, else 0."""
        return self.images if self.head.subset else 0

    @property
    def attacks(self) -> list[str]:
        return [name for name in dict.fromkeys(row.attack for row in self.rows) if name not in ("", "union")]

    @property
    def group(self) -> tuple:
        """Key that runs must share to be ranked together.

        For subsets, it includes the number of images.
        """
        return *(getattr(self.head, name) for name in GROUP), self.cut

    @cached_property
    def cells(self) -> dict[tuple, Row]:
        """Column key -> row: every measured metric, then costs as rows of their own."""
        found = [row for row in self.rows if row.status == "ok" and finite(row.value)]
        for name in COST:
            spent = [value for row in self.rows if not row.attack and finite(value := getattr(row, name))]
            if spent:
                found.append(
                    replace(self.head, metric=name, group="cost", value=max(spent), higher_is_better=False, **UNSAID)
                )
        return {(r.metric, r.attack, r.split, r.judge, r.judge_version, r.threshold): r for r in found}

    @cached_property
    def reasons(self) -> list[str]:
        """Reasons why the run is incomplete; empty if it is complete.

        A metric without a judge in this world is missing in every run alike and keeps none from being ranked; an
        attack that never succeeded has no cost of a success, and images that a guard refused leave nothing to judge.
        """
        found: dict[str, list[str]] = {}
        measured = any(row.status == "ok" and row.group != "cost" for row in self.rows)
        for row in self.rows:
            if row.status == "skipped" and measured:
                continue
            if row.status != "ok":
                found.setdefault(f"{row.status}: {row.reason or 'no reason given'}", []).append(row.metric)
            elif not finite(row.value) and row.group not in ("attack", "probe") and not self.all_refused(row):
                why = f"no value: {row.n_valid or 0} of {row.n or 0} images judged"
                found.setdefault(why, []).append(row.metric)
        return [plain(f"{', '.join(filter(None, metrics))} {why}".lstrip()) for why, metrics in found.items()]

    def all_refused(self, row: Row) -> bool:
        """Return whether a guard refused every image without a verdict."""
        return bool(row.n_refused) and row.n_refused + (row.n_valid or 0) >= (row.n or 0)

    @cached_property
    def broken(self) -> list[str]:
        """Reasons why the run is broken; empty if it is not."""
        return breakage(self.rows)

    @property
    def flaws(self) -> list[str]:
        """Reasons why the run is not ranked."""
        return self.reasons + self.broken

    @property
    def status(self) -> str:
        if not self.reasons:
            return "broken" if self.broken else "ok"
        return next((s for s in ("failed", "skipped") if any(row.status == s for row in self.rows)), "incomplete")

    @cached_property
    def params(self) -> dict:
        return json_of(self.head.params)

    @property
    def overrides(self) -> list[str]:
        return [plain(word) for word in json_of(self.head.overrides, list)]

    @cached_property
    def told(self) -> dict:
        """Parameters shown with the run.

        They are those given on the command line, and those that distinguish the run from others of its method.
        """
        asked = {found[1] for word in self.overrides if (found := re.match(r"\+{0,2}method\.(\w+)", word))}
        return {k: v for k, v in self.params.items() if v is not None and k in asked | self.apart}

    @property
    def method(self) -> str:
        return plain(self.head.method)

    @property
    def details(self) -> list[str]:
        short = lambda value: value[:10] if _is_digest(value) else value
        said = [plain(f"{name}={short(value)}") for name, value in self.told.items()]
        attacks = len(self.attacks)
        said += [f"{attacks} attack{'s' * (attacks != 1)}"] * bool(attacks) + [f"seed {self.head.seed}"]
        return said + ["source changed"] * self.is_outdated

    @cached_property
    def is_outdated(self) -> bool:
        """Whether source code changed since its part was made, version unchanged.

        That is the source of the method, a judge or an attack.
        """
        notes = [{**json_of(row.fit_notes), **json_of(row.attack_params)} for row in self.rows]
        return any(said.get(key) is True for said in notes for key in ("source_changed", "judge_source_changed"))

    @property
    def label(self) -> str:
        return f"{self.method} ({', '.join(self.details)})"

    @property
    def short(self) -> str:
        """Name for a plot."""
        said = [plain(v if isinstance(v, str) else f"{k}={v}") for k, v in self.told.items() if not _is_digest(v)]
        return short(" ".join([self.method, *said]), 32)

    @property
    def anchor(self) -> str:
        return fragment("run", self.head.run_id)

    @property
    def command(self) -> str:
        """Command line that makes these rows again."""
        return shlex.join(["python", "-m", "erasebench", *self.overrides])

    @property
    def provenance(self) -> dict[str, object]:
        """Parameters and origin of the rows, for the page."""
        head = self.head
        tree = " from a tree with changes" if head.dirty else ""
        made = {
            "run": head.run_id,
            "base": f"{head.base} {head.revision}",
            "prompts": head.prompts_sha256,
            "commit": (head.commit or "outside git") + tree,
            "device": head.device,
            "batch": head.batch,
            "packages": ", ".join(f"{name} {version}" for name, version in json_of(head.packages).items()),
        }
        if self.claimed is not None:
            made["verified"] = found_again("by somebody else's word, and not checked here", self.claimed)
        notes = {f"fit.{k}": v for k, v in json_of(head.fit_notes).items() if not isinstance(v, list | dict)}
        return {f"method.{k}": json.dumps(v) for k, v in self.params.items()} | notes | made

    @property
    def mark(self) -> str:
        """Result of re-running in one line; empty for an unverified run."""
        return "" if self.verified is None else found_again("verified by re-running", self.verified)

    @property
    def curves(self) -> list[dict]:
        """Curves that a fit noted step by step (a loss, a score).

        Each has every `step`th value.
        """
        found = []
        for name, values in _curves(json_of(self.head.fit_notes)):
            step = -(-len(values) // POINTS)
            found.append({"name": name, "step": step, "values": [digits(v) for v in values[::step]]})
        return found

    @property
    def by_concept(self) -> list[dict]:
        """Rates of each split, concept by concept.

        Each split has its metrics (label, group), and for each concept [name, [value, low, high, images judged] or
        None, ...].
        """
        shown = {key: each for key, row in self.cells.items() if (each := _each(row.by_concept))}
        found = []
        for split in dict.fromkeys(self.cells[key].split for key in shown):
            here = {key: each for key, each in shown.items() if self.cells[key].split == split}
            names = [(label, self.cells[key].group) for key, label in labels(here).items()]
            concepts = dict.fromkeys(name for each in here.values() for name in each)
            lines = [[plain(name), *(each.get(name) for each in here.values())] for name in concepts]
            found.append({"split": plain(split), "metrics": names, "concepts": lines})
        return found

    @property
    def success(self) -> tuple[float, str] | None:
        """(attack success, attack): of all attacks together, or of the strongest."""
        found = [r for r in self.cells.values() if r.metric == "asr" and r.group == "attack"]
        best = max(found, key=lambda row: (row.attack == "union", row.value), default=None)
        return None if best is None else (best.value, plain(best.attack))

    @cached_property
    def picture(self) -> dict | None:
        """Sheet of images as a data URI with its size.

        None if there is no readable sheet. Images of an explicit task never enter a page.
        """
        from PIL import Image

        if self.head.task == "explicit":
            return None
        try:
            if not self.sheet.is_file() or self.sheet.stat().st_size > SHEET_BYTES:
                return None
            content = self.sheet.read_bytes()
            with Image.open(io.BytesIO(content), formats=["WEBP"]) as image:
                width, height = image.size
        except Exception:  # missing or damaged sheet: exceptions of image readers have no common class
            return None
        uri = "data:image/webp;base64," + base64.b64encode(content).decode()
        return {"uri": uri, "width": width, "height": height}


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, with the parameters that distinguish those of one method."""
    seen: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        for name, value in run.params.items():
            seen.setdefault(run.head.method, {}).setdefault(name, set()).add(repr(value))
    differ = {method: frozenset(k for k, some in each.items() if len(some) > 1) for method, each in seen.items()}
    return [replace(run, apart=differ.get(run.head.method, frozenset())) for run in runs]
