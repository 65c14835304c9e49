"""The table of docs/scaling.md from results/reference/bench.csv.

python tests/benchmarks/page.py     # puts it between the marks `<!-- measured -->` and `<!-- end -->`
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

TOP = Path(__file__).parents[2]
PAGE = TOP / "docs/scaling.md"
MARKS = re.compile(r"(<!-- measured -->\n).*?(\n<!-- end -->)", re.DOTALL)

SAMPLING = "sampling, embedded, 64 images, 25 steps"
RUN = "uce on one object, 8 images a split"
CLOSED = "closed form, 1000 concepts, SD v1.4 shape"
PEOPLE = "MACE, adapters of 100 people, 10 steps"
ATTACK = "UDAtk, 20 prompts, 10 iterations and an image each"
IMAGES = "images into the store, 1 step"
SWEEP = "-m method=none,uce,esd task=object target=cat images=64"
# what is said -> (measured, of, unit) of a line
SHOWN = {
    "bare U-Net forwards, embedded, 64 images of 25 steps": (SAMPLING, "bare U-Net forwards (the limit)", "images/s"),
    "this loop": (SAMPLING, "this loop", "images/s"),
    "this loop, `speed=fast`": (SAMPLING, "this loop, speed=fast", "images/s"),
    "diffusers pipeline, the same batch": (SAMPLING, "diffusers pipeline, batch 64", "images/s"),
    "diffusers pipeline, one at a time": (SAMPLING, "diffusers pipeline, batch 1", "images/s"),
    "whole run of 512 images of 5 steps with its judges, share of bare forwards": (
        "whole run, 512 images, 5 steps, judges",
        "share of the limit",
        "",
    ),
    "the same command again, all of it in the store": (RUN, "repeated run, whole command", "s"),
    "two Ray workers of one thread each, parallel efficiency": ("Ray, 2 workers", "parallel efficiency", ""),
    "10,000 images into the store, memory beyond the model": (IMAGES, "10000", "MB more at most"),
    "the next image between 100 and 1,000, by that between 1,000 and 10,000": (
        IMAGES,
        "next one between 100 and 1000, by the last",
        "times",
    ),
    "closed form of 1,000 concepts, SD v1.4 shape": (CLOSED, "one matrix", "s"),
    "the same as in the textbook": (CLOSED, "textbook", "s"),
    "UCE of 1,000 concepts, embedded, text encoding": (
        "UCE, 1000 concepts and 1000 preserved, embedded",
        "text encoding",
        "s",
    ),
    "MACE's adapters of 100 people, trained together": (PEOPLE, "together", "s"),
    "the same one after the other": (PEOPLE, "in turn", "s"),
    "UnlearnDiffAtk on 20 prompts together, against one after the other": (ATTACK, "in turn / together", "times"),
    "NudeNet, 512 pixels": ("NudeNet, 1000 images of 512 pixels", "all of it", "images/s"),
    "a sweep of three methods as planned, by what it took": (SWEEP, "predicted / measured", ""),
}


def table(path: Path) -> str:
    """Raises KeyError where the file lacks a line that is shown."""
    with path.open(newline="") as file:
        lines = {(line["measured"], line["of"], line["unit"]): line for line in csv.DictReader(file)}
    shown = [f"| {said} | {lines[where]['value']} | {where[2]} |" for said, where in SHOWN.items()]
    return "\n".join(["| what | measured | |", "|---|---|---|", *shown])


def main() -> int:
    made = table(TOP / "results/reference/bench.csv")
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKS.sub(lambda match: match[1] + made + match[2], text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
