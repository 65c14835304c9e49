"""Speed, measured: `make bench` prints a table and writes results/bench.csv. Not a test: nothing asserts a time.

python tests/benchmarks [sampling] [scoring] [methods] [attacks] [scaling] [planning]
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import measure

CSV = Path("results/bench.csv")
PARTS = ("sampling", "scoring", "methods", "attacks", "scaling", "planning")


def main() -> int:
    chosen = sys.argv[1:] or PARTS
    if unknown := set(chosen) - set(PARTS):
        print(f"error: {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}", file=sys.stderr)
        return 2
    os.environ.pop("ERASEBENCH_STORE", None)  # homes of their own
    for name in chosen:
        importlib.import_module(name).main()
        measure.write(name, CSV)
    print(CSV)
    return 0


if __name__ == "__main__":
    sys.exit(main())
