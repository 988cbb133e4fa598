"""The command line: `paramstats info`, and `paramstats show` for checkpoint files."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

import torch

import paramstats


def main(arguments: list[str] | None = None) -> int:
    """Run one command (default: from `sys.argv`) and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="paramstats", description="Statistics of PyTorch parameters and gradients."
    )
    parser.add_argument("--version", action="version", version=paramstats.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="show which backend is used, and why")
    _add_show(commands)
    chosen = parser.parse_args(arguments)
    if chosen.command == "show":
        from paramstats.checkpoints import _show as show

        return show.run(chosen)
    try:
        if torch.cuda.is_available():
            torch.cuda.init()  # before this, it is unknown whether the kernels run there
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the printed text has the same reason
            print(paramstats.backend())
        return 0
    except (RuntimeError, ValueError) as error:  # a forced backend that is not available
        print(error, file=sys.stderr)
        return 2


def _add_show(commands: Any) -> None:
    show = commands.add_parser("show", help="show the tensors of a checkpoint, or compare two")
    show.add_argument("file", help="a safetensors or torch.save file, an .index.json, or a folder")
    show.add_argument("other", nargs="?", help="another checkpoint: show what changed from FILE")
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print all statistics as JSON")
    form.add_argument("--csv", action="store_true", help="print one row per tensor as CSV")
    show.add_argument(
        "--sort",
        metavar="STAT",
        help="sort by a statistic, largest first (--sort=-STAT: smallest first), or by name",
    )
    show.add_argument("--limit", type=int, metavar="N", help="show only the first N tensors")
    for word in ("include", "exclude"):
        what = f"{word} tensors whose name contains a match of RE; may be repeated"
        show.add_argument(f"--{word}", action="append", metavar="RE", help=what)
