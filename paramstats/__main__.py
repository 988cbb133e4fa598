"""`python -m paramstats demo` and `python -m paramstats info`."""

from __future__ import annotations

import argparse
import sys

import torch

import paramstats


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m paramstats", description="Statistics of PyTorch parameters and gradients."
    )
    parser.add_argument("--version", action="version", version=paramstats.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="which engine runs, and why")
    demo = commands.add_parser("demo", help="train a small network and look at its parameters")
    demo.add_argument("--epochs", type=int, default=10, help="passes over the digits (default 10)")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "info":
            if torch.cuda.is_available():
                torch.cuda.init()  # only then it is known whether the kernels run there
            print(paramstats.backend())
            return 0
        from paramstats import demo as module

        return module.run(chosen.epochs)
    except (RuntimeError, ValueError) as error:  # an engine that is forced and not there
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
