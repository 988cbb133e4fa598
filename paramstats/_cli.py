"""`python -m paramstats`: `info` and `show` for checkpoint files."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

import paramstats


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m paramstats", description="Statistics of PyTorch parameters and gradients."
    )
    parser.add_argument("--version", action="version", version=paramstats.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="which backend runs, and why")
    _add_show(commands)
    chosen = parser.parse_args(arguments)
    if chosen.command == "show":
        from paramstats.checkpoints import _show as show

        return show.run(chosen)
    try:
        if torch.cuda.is_available():
            torch.cuda.init()  # only then it is known whether the kernels run there
        print(paramstats.backend())
        return 0
    except (RuntimeError, ValueError) as error:  # an backend that is forced and not there
        print(error, file=sys.stderr)
        return 2


def _add_show(commands: Any) -> None:
    show = commands.add_parser("show", help="the tensors of a checkpoint, or what changed in one")
    show.add_argument("file", help="a .safetensors or torch.save file, an .index.json, a folder")
    show.add_argument("other", nargs="?", help="another one: show what changed from FILE to it")
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all statistics, as JSON")
    form.add_argument("--csv", action="store_true", help="a row for each tensor, as CSV")
    show.add_argument(
        "--sort",
        metavar="STAT",
        help="order by a statistic, largest first (--sort=-STAT: smallest), or by name",
    )
    show.add_argument("--limit", type=int, metavar="N", help="only the first N tensors")
    for word in ("include", "exclude"):
        what = f"{word} tensors with a name in which RE is found; may be repeated"
        show.add_argument(f"--{word}", action="append", metavar="RE", help=what)
