"""python -m erasebench method=mace task=celebrity n=100"""

from __future__ import annotations

import sys

from . import config


def job(run) -> bool:
    from .run import execute

    return all(row.status != "failed" for row in execute(run))


def main() -> int:
    return config.main(job, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
