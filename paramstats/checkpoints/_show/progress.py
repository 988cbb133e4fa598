"""Show the progress of `paramstats show`, and print what it has to say besides its output."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from paramstats._output import print_error
from paramstats.checkpoints._reading import Progress

COMMAND = "paramstats show"


def print_lines(lines: Iterable[str]) -> None:
    """Print lines on stderr."""
    for line in lines:
        print_error(COMMAND, line)


@contextmanager
def reporting() -> Iterator[Progress | None]:
    """Yield a function that shows progress, or None; print warnings as single lines at the end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # The output names these tensors.
        warnings.filterwarnings("ignore", message=".* could not be read, statistics are NaN")
        with _progress_bar() as progress:
            yield progress
    print_lines(str(warning.message) for warning in caught)


@contextmanager
def _progress_bar() -> Iterator[Progress | None]:
    """Yield a function that updates a tqdm bar if stderr is a terminal; None without tqdm."""
    try:
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        tqdm = importlib.import_module("tqdm") if is_terminal else None
    except ImportError:
        tqdm = None
    if tqdm is None:
        yield None
        return
    with tqdm.tqdm(unit="B", unit_scale=True, leave=False, file=sys.stderr) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
