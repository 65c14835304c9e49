"""python -m erasebench method=mace task=celebrity n=100"""

from __future__ import annotations

import sys

from . import config


def job(run):
    from .run import execute

    return execute(run)


def main() -> int:
    return config.main(job, sys.argv[1:], launch=True)


if __name__ == "__main__":
    sys.exit(main())
