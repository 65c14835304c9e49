"""Formats of the leaderboard: CSV, Parquet, text, Markdown, LaTeX and HTML."""

from __future__ import annotations

import hashlib
import html
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from ..rows import write_table
from .claims import Finding, findings
from .leaderboard import KINDS, Column, Comparison, Group, paper_value
from .row_table import arrow_fields
from .runs import GROUP, Run, plain, short
from .tables import PAPER

ABOUT = (*GROUP, "method", "method_version", "params", "seed", "run_id", "commit", "dirty", "device")
NUMBER = ("group", "metric", "split", "attack", "judge", "judge_version", "threshold", "value", "low", "high", "n_valid")
NUMBER += ("published", "published_source")
FEW = ("task", "target", "n_concepts", "world", "base", "method", "seed", "run_id", "status", "reason", "verified")
FEW += ("metric", "split", "attack", "judge", "threshold", "value", "low", "high", "n_valid", "published", PAPER)  # of a CSV
ABREAST = 5  # metrics side by side in a LaTeX table
TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    **{c: rf"\{c}" for c in "{}$&#_%"},
}


def view(groups: Sequence[Group]) -> list[dict[str, object]]:
    """Return one line for each run and metric: the run and the number.

    A run without measurements has one line without a metric.
    """
    lines = []
    for run in (run for group in groups for run in group.runs):
        about = {name: getattr(run.head, name) for name in ABOUT}
        about |= {"status": run.status, "reason": "; ".join(run.flaws), "verified": run.verified is not None}
        for row in run.cells.values():
            lines.append(about | {name: getattr(row, name) for name in NUMBER} | {PAPER: paper_value(row)})
        if not run.cells:
            lines.append(about)
    return lines


def as_csv(groups: Sequence[Group], compared: Sequence[Comparison]) -> bytes:
    """Return a few columns of the lines as CSV.

    Values have full precision: floats are written by repr.
    """
    stream = io.StringIO()
    write_table([FEW, *([line.get(name) for name in FEW] for line in view(groups))], stream)
    return stream.getvalue().encode(errors="backslashreplace")


def as_parquet(groups: Sequence[Group], compared: Sequence[Comparison]) -> bytes:
    """Return every column of the lines, with its type, as Parquet."""
    import pyarrow
    from pyarrow import parquet

    more = [("status", pyarrow.string()), ("reason", pyarrow.string()), ("verified", pyarrow.bool_())]
    schema = pyarrow.schema([*arrow_fields(ABOUT), *more, *arrow_fields(NUMBER, nullable=True), (PAPER, pyarrow.float64())])
    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(view(groups), schema), stream)
    return stream.getvalue()


def as_text(groups: Sequence[Group], width: int = 100) -> str:
    """Return the ranked tables as plain text.

    The metric that orders them comes first, then forgetting and keeping, then as many others as the width holds.
    """
    out = []
    for group in groups:
        out += textwrap.wrap(", ".join([group.title, *group.facts]), width)
        shown = group.reference + group.ranked
        table = [
            [
                "#",
                *("" if run in group.reference else str(group.order.rank.get(run.head.run_id) or "-") for run in shown),
            ],
            ["method", *(short(run.label, 36) for run in shown)],
        ]
        columns = [group.order, *group.axes, *group.columns]
        for column in {id(column): column for column in columns if column}.values():
            cells = (column.cells.get(run.head.run_id) for run in shown)
            said = [f"{column.text(row.value)} {column.interval(row)}".rstrip() if row else "-" for row in cells]
            lines = [short(column.label, 24), *said]
            if sum(max(map(len, cells)) + 2 for cells in [*table, lines]) - 2 > width:
                break
            table.append(lines)
        sizes = [max(map(len, cells)) for cells in table]
        out += ["  ".join(map(str.ljust, line, sizes)).rstrip() for line in zip(*table, strict=True) if shown]
        for said in (*paper_lines(group), *listed(group)):
            out += textwrap.wrap(said, width, subsequent_indent="    ")
        for said in group.repeats:
            out += textwrap.wrap(said, width, subsequent_indent="    ")
        out.append("")
    return "\n".join(out)


def paper_lines(group: Group) -> Iterator[str]:
    """Yield a line for each metric with incomparable published values.

    The line has the values of each run.
    """
    for column in group.columns:
        if (paper := column.paper) is None:
            continue
        runs = [run for run in group.reference + group.ranked if run.head.run_id in paper.cells]
        values = (f"{run.label} {column.text(paper.cells[run.head.run_id].value)}" for run in runs)
        yield f"{paper.label}: {'; '.join(values)}"


def listed(group: Group) -> Iterator[str]:
    """Yield a line for each unranked run, with the reason."""
    for why, some in group.apart:
        for run in some:
            yield f"{why}, not ranked: {run.label}: {'; '.join(run.flaws)}"


def tables(group: Group) -> Iterator[tuple[str, list[Column]]]:
    """Yield each kind of metric with its columns visible at once."""
    for kind, columns in group.kinds if group.reference + group.ranked else ():
        if shown := [column for column in columns if column.glance]:
            yield kind, shown


def markdown(text: str) -> str:
    """Escape text so that it is no markup anywhere in a table."""
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", html.escape(text, quote=False))


def as_md(groups: Sequence[Group], compared: Sequence[Comparison]) -> bytes:
    """Return Markdown tables for each group and kind of metric.

    The best values are bold. Claims and comparisons follow.
    """
    out = ["# Leaderboard", "", "95 % intervals; bold: no method's interval lies wholly on the better side.", ""]

    def cell(column: Column, run: Run) -> str:
        if (row := column.cells.get(run.head.run_id)) is None:
            return "–"
        mark = "**" if column.rank.get(run.head.run_id) == 1 else ""
        paper = f"(paper {column.text(row.published)})" if row.published is not None else ""
        return " ".join(filter(None, [f"{mark}{column.text(row.value)}{mark}", column.interval(row), paper]))

    def lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
        said = [[*map(markdown, head)], ["---"] * len(head), *body]
        return [f"| {' | '.join(line)} |" for line in said] + [""]

    for group in groups:
        out += [f"## {markdown(group.title)}", "", markdown(", ".join(group.facts)), ""]
        for kind, columns in tables(group):
            head = [kind, *(f"{column.label} {column.arrow}".rstrip() for column in columns)]
            shown = group.reference + group.ranked
            out += lines(head, [[markdown(run.label), *(cell(column, run) for column in columns)] for run in shown])
        out += [f"- {markdown(said)}" for said in (*listed(group), *group.repeats)]
        out += [""] * bool(group.apart or group.repeats)
    if found := findings(groups, compared):
        out += ["## Claims of papers", ""]
        names = [f.name for f in fields(Finding) if f.name != "anchor"]
        out += lines(["claim", *names[1:]], [[markdown(getattr(one, name)) for name in names] for one in found])
    for comparison in compared:
        out += [f"## {markdown(comparison.title)}", "", markdown(", ".join(comparison.facts)), ""]
        head = ["metric", *comparison.sides, "difference", "the second is", "p", "n"]
        body = [
            [
                markdown(f"{line.metric} {line.arrow}"),
                line.first,
                line.second,
                f"{line.difference} {line.interval}",
                line.verdict,
                line.p or "–",
                line.n or "–",
            ]
            for line in comparison.lines
        ]
        out += lines(head, body)
    return "\n".join(out).encode()


def latex(text: str) -> str:
    """Escape text so that it is no command anywhere in a table."""
    return re.sub("-(?=-)", "-{}", "".join(TEX.get(c, c) for c in text))


def as_tex(groups: Sequence[Group], compared: Sequence[Comparison]) -> bytes:
    """Return LaTeX tables for each group and kind of metric.

    A table has at most ABREAST metrics: booktabs, best in bold, intervals small.
    """
    out = [r"% \usepackage{booktabs}; names beyond Latin letters need XeLaTeX or LuaLaTeX", ""]
    number = lambda text: text.replace("-", "$-$")

    def cell(column: Column, run: Run) -> str:
        if (row := column.cells.get(run.head.run_id)) is None:
            return "--"
        value, interval = number(column.text(row.value)), column.interval(row)
        said = [rf"\textbf{{{value}}}" if column.rank.get(run.head.run_id) == 1 else value]
        said += [rf"{{\scriptsize {number(interval)}}}"] if interval else []
        said += [rf"{{\scriptsize (paper {number(column.text(row.published))})}}"] if row.published is not None else []
        return " ".join(said)

    # LaTeX would read a bracket at the start of a line as an argument of \\ before it: names stand in braces
    line = lambda cells: " & ".join([f"{{{cells[0]}}}", *cells[1:]]) + r" \\"
    for group in groups:
        for kind, columns in tables(group):
            caption = latex(f"{', '.join([group.title, *group.facts])}: {kind}")
            for start in range(0, len(columns), ABREAST):
                some = columns[start : start + ABREAST]
                body = lambda runs, some=some: [
                    line([latex(run.label), *(cell(column, run) for column in some)]) for run in runs
                ]
                out += [
                    r"\begin{table}",
                    r"\centering",
                    rf"\caption{{{caption}}}",
                    rf"\begin{{tabular}}{{l{'r' * len(some)}}}",
                    r"\toprule",
                    line(["method", *(latex(f"{column.label} {column.arrow}".rstrip()) for column in some)]),
                    r"\midrule",
                    *body(group.reference),
                    *[r"\midrule"] * bool(group.reference and group.ranked),
                    *body(group.ranked),
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                    "",
                ]
        for said in (*listed(group), *group.repeats):
            out += [rf"{{\footnotesize {latex(f'{group.title}, {said}')}}}", ""]
    return "\n".join(out).encode()


def as_html(groups: Sequence[Group], compared: Sequence[Comparison]) -> bytes:
    """Return the whole page.

    Styles, script, plotting library and images are inside.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    runs = [run for group in groups for run in group.runs]
    drawn = {f"{group.anchor} {kind}": getattr(group, kind) for group in groups for kind in ("pareto", "ripple")}
    drawn |= {f"{run.anchor} curve {i}": curve for run in runs for i, curve in enumerate(run.curves)}
    drawn |= {f"{c.anchor} forest {i}": part for c in compared for i, part in enumerate(c.forest)}
    every = [*runs, *compared]
    named = lambda part: [(name, name) for name in sorted({plain(getattr(one.head, part)) for one in every})]
    filters = {
        "base": ("every base", named("base")),
        "world": ("every world", named("world")),
        "images": ("any n", [(n, f"n ≥ {n}") for n in sorted({one.images for one in every})]),
    }
    # Only scripts with this nonce run. It depends on every row, so no row can contain it.
    nonce = hashlib.sha256(repr([[run.rows for run in runs], compared]).encode()).hexdigest()
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    page = pages.get_template("page.html.jinja")
    return page.render(
        groups=groups,
        compared=compared,
        findings=findings(groups, compared),
        filters=filters,
        drawn={name: spec for name, spec in drawn.items() if spec},
        concepts={run.anchor: run.by_concept for run in runs if run.by_concept},
        kinds=KINDS,
        plotly=Path(__file__).with_name("plotly-basic.min.js").read_text(encoding="utf-8"),
        nonce=nonce,
        plain=plain,
    ).encode()


FILES = {"csv": as_csv, "parquet": as_parquet, "md": as_md, "tex": as_tex, "html": as_html}
