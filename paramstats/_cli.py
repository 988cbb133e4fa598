"""The command line: `paramstats info`, and `paramstats show` for checkpoint files."""

from __future__ import annotations

import argparse
import warnings
from typing import Any, NoReturn

import torch

import paramstats
from paramstats._output import fail, run, write
from paramstats.checkpoints import _show as show


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit."""
        raise SystemExit(fail(self.prog, message))


def main(arguments: list[str] | None = None) -> int:
    """Run one command (default: from `sys.argv`) and return its exit status."""
    parser = _Parser(
        prog="paramstats", description="Statistics of PyTorch parameters and gradients."
    )
    parser.add_argument("--version", action="version", version=paramstats.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="show which backend is used, and why")
    _add_show(commands)
    try:
        chosen = parser.parse_args(arguments)
    except SystemExit as done:  # help or the version, not yet flushed, or an error
        raise SystemExit(done.code or write("paramstats", "")) from None
    return run(f"paramstats {chosen.command}", lambda: _make_text(chosen))


def _make_text(arguments: argparse.Namespace) -> str:
    if arguments.command == "show":
        return show.make_text(arguments)
    if torch.cuda.is_available():
        torch.cuda.init()  # before this, it is unknown whether the kernels run there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the printed text has the same reason
        return f"{paramstats.backend()}\n"


def _add_show(commands: Any) -> None:
    command = commands.add_parser("show", help="show the tensors of a checkpoint, or compare two")
    command.add_argument(
        "file", help="a safetensors or torch.save file, an .index.json, or a folder"
    )
    command.add_argument("other", nargs="?", help="another checkpoint: show what changed from FILE")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print all statistics as JSON")
    form.add_argument("--csv", action="store_true", help="print one row per tensor as CSV")
    command.add_argument(
        "--sort",
        metavar="STAT",
        help="sort by a statistic, largest first (--sort=-STAT: smallest first), or by name",
    )
    command.add_argument("--limit", type=int, metavar="N", help="show only the first N tensors")
    for word in ("include", "exclude"):
        what = f"{word} tensors whose name contains a match of RE; may be repeated"
        command.add_argument(f"--{word}", action="append", metavar="RE", help=what)
