"""Published tables as printed, with the commands to measure them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence

from ..contracts import ErasebenchError
from .tables import Protocol, printed_lines, published_tables


def find_table(name: str) -> Protocol:
    """Return the experiment of a published table. Raises ErasebenchError for an unknown name."""
    known = {protocol.name: protocol for protocol in published_tables()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ErasebenchError(f"no published table {name!r}{f': did you mean {near[0]!r}?' if near else ''}")
    return known[name]


def list_tables() -> list[str]:
    """Return a line for each published table: name of its experiment and title."""
    return [f"{protocol.name:20} {protocol.spec['title']}" for protocol in published_tables()]


def block_of(setting: str) -> str:
    """Return the setting of a value as text."""
    given = json.loads(setting or "{}")
    return ", ".join(f"{key} {value}" for key, value in given.items())


def describe(name: str) -> list[str]:
    """Return the lines of a published table, with commands to measure it."""
    protocol = find_table(name)
    lines = printed_lines(protocol.spec)
    first = lines[0]
    out = [f"{first['paper']}, {first['table']}; base {first['base'] or 'not stated'}"]
    for block in dict.fromkeys(block_of(line["setting"]) for line in lines):
        here = [line for line in lines if block_of(line["setting"]) == block]
        out += ["", block or "all settings", *format_block(protocol, here)]
    return [*out, "", *describe_measurable(protocol, lines)]


def format_block(protocol: Protocol, lines: Sequence[dict[str, str]]) -> list[str]:
    """Return a table of methods by metrics, with our names."""
    metrics = list(dict.fromkeys(line["metric"] for line in lines))
    units = {line["metric"]: line["unit"] for line in lines}
    heads = ["method", *(f"{m} ({units[m]})" if units[m] else m for m in metrics), "here"]
    ours = {label: method for method, label in protocol.spec.get("labels", {}).items()}
    table = [heads]
    for method in dict.fromkeys(line["method"] for line in lines):
        values = {line["metric"]: line["value"] for line in lines if line["method"] == method}
        table.append([method, *(values.get(m) or "–" for m in metrics), command_of(ours[method]) if method in ours else "–"])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


def command_of(method: str) -> str:
    """Return the options that select a method of a table's labels."""
    return "method=" + method.replace(" variant=", " method.variant=")


def describe_measurable(protocol: Protocol, lines: Sequence[dict[str, str]]) -> list[str]:
    """Return the number of measurable cells, and the commands for them."""
    labels, metrics = set(protocol.spec.get("labels", {}).values()), set(filter(None, protocol.spec["metrics"].values()))
    measurable = [line for line in lines if line["method"] in labels and line["metric"] in metrics]
    missing = list(dict.fromkeys(line["method"] for line in lines if line["method"] not in labels))
    unmeasured = list(dict.fromkeys(line["metric"] for line in lines if line["metric"] not in metrics))
    out = [f"{len(measurable)} of {len(lines)} values can be measured here"]
    out += [f"methods that are not here: {', '.join(missing)}"] if missing else []
    out += [f"metrics that are not measured: {', '.join(unmeasured)}"] if unmeasured else []
    run = f"erasebench experiment={protocol.name}"
    return [
        *out,
        f"on the embedded world, beside these values but not comparable:  {run}",
        f"on Stable Diffusion, missing files and cost first:              {run} model=sd14 dry_run=true",
        f"time on GPUs:  erasebench schedule experiment={protocol.name} model=sd14 gpus=1 rate=RATE",
    ]
