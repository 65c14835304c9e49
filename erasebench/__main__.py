"""python -m erasebench method=mace task=celebrity n=100"""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
