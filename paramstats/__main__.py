"""Run the command line with `python -m paramstats`."""

import sys

from paramstats._cli import main

if __name__ == "__main__":
    sys.exit(main())
