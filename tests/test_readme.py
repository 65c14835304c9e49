"""Numbers in the README are those of the files that it names."""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_costs_of_a_fit_are_those_of_the_reference():
    with (ROOT / "results/reference/forget_and_keep.csv").open(encoding="utf-8") as file:
        cells = {(c["method"], c["metric"]): c["value"] for c in csv.DictReader(file) if c["block"] == "object"}
    said = re.findall(r"^\| `(\w+)` .* \| ([\d.,]+) s, ([\d,]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {name for name, *_ in said} >= {"ap", "age", "dark_miner", "gie", "kpop", "uce", "esd"}
    for name, seconds, calls in said:
        assert f"{float(cells[name, 'fit_seconds']):.{seconds.partition('.')[2] and 1 or 0}f}" == seconds
        assert f"{float(cells[name, 'fit_unet_calls']):,.0f}" == calls
