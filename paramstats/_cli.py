"""The command line: `paramstats info`, and `paramstats show` for checkpoint files."""

from __future__ import annotations

import argparse
import warnings
from typing import Any, NoReturn

import torch

import paramstats
from paramstats._output import fail, run, write
from paramstats.checkpoints._show import show

_EPILOG = """\
FILE is a safetensors, torch.save (.pt, .pth, .ckpt, .bin), pickle, numpy (.npz, .npy), GGUF or HDF5
file, an .index.json, or a folder with a checkpoint. FILE#PART is a part of it, such as
last.ckpt#ema. No file is loaded whole, and nothing in it is executed.

examples:
  paramstats show model.safetensors
  paramstats show before.pt after.pt --sort largest_change --limit 20
  paramstats show last.ckpt#model last.ckpt#ema
  paramstats show model.safetensors --findings --fail-on warning    in CI

exit status:
  0    success
  1    --fail-on found something, or the two checkpoints have nothing to compare
  2    a file is missing, damaged or not a checkpoint, or an argument is wrong
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit."""
        raise SystemExit(fail(self.prog, f"{message}; for help, run: {self.prog} --help"))


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
    status = 0

    def make_text() -> str:
        nonlocal status
        if chosen.command != "show":
            return _describe_backend()
        text, status = show.make_output(chosen)
        return text

    return run(f"paramstats {chosen.command}", make_text) or status


def _describe_backend() -> str:
    if torch.cuda.is_available():
        torch.cuda.init()  # before this, it is unknown whether the kernels run there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the printed text has the same reason
        return f"{paramstats.backend()}\n"


def _add_show(commands: Any) -> None:
    command = commands.add_parser(
        "show",
        help="show the tensors of a checkpoint file, or what changed between two",
        description="Show statistics of the tensors of a checkpoint, or what changed between two.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("file", metavar="FILE", help="a checkpoint: a file or a folder")
    command.add_argument(
        "other", metavar="OTHER", nargs="?", help="a second checkpoint: show how it differs"
    )

    group = command.add_argument_group("which tensors")
    for word in ("include", "exclude"):
        what = f"{word} tensors whose name contains a match of the regular expression; repeatable"
        group.add_argument(f"--{word}", action="append", metavar="REGEX", help=what)
    group.add_argument(
        "--sort",
        metavar="STAT",
        help="sort by norm, std, zero_fraction or another statistic, the largest first "
        "(--sort=-STAT: the smallest first), or by name; with two checkpoints by relative_change, "
        "largest_change, unchanged or another column",
    )
    group.add_argument("--limit", type=int, metavar="N", help="show only the first N tensors")
    group.add_argument(
        "--depth", type=int, metavar="N", help="one line per module, named by its first N parts"
    )

    group = command.add_argument_group("output and exit status")
    form = group.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument("--csv", action="store_true", help="print a row per tensor as CSV")
    form.add_argument(
        "--html", metavar="PAGE", help="write the report to PAGE, an .html file to share"
    )
    group.add_argument(
        "--findings",
        action="store_true",
        help="print only the findings of the health check: a line per tensor, then advice",
    )
    group.add_argument(
        "--fail-on",
        choices=("error", "warning"),
        help="exit with status 1 if a finding is as severe or more, or a value is NaN or infinite; "
        "with two checkpoints only for NaN and infinite values",
    )

    group = command.add_argument_group("names that differ between two checkpoints")
    group.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="REGEX=REPLACEMENT",
        help="replace in the names of FILE before they are compared; repeatable",
    )
    for side, of in (("a", "FILE"), ("b", "OTHER")):
        what = f"remove this from the beginning of the names of {of}"
        group.add_argument(f"--strip-{side}", metavar="PREFIX", help=what)
