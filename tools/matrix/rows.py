"""A row of the matrix, and what came of it."""

from __future__ import annotations

import importlib.util
import logging
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from paramstats._core.backend import Implementation
from tools.matrix.looking import Look

Run = Callable[[Look], str | None]
"""Builds, trains and looks; returns a remark. Raises `NotRunError` where it cannot be run here."""


class NotRunError(Exception):
    """Says why."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    title: str
    theme: str
    needs: tuple[str, ...]
    quick: bool
    run: Run

    @property
    def name(self) -> str:
        """As `--only` takes it."""
        return f"{self.theme}.{self.run.__name__}"


@dataclass
class Outcome:
    """What came of a row."""

    row: Row
    not_run: str = ""
    remark: str = ""
    seconds: float = 0.0
    messages: list[str] = field(default_factory=list)
    compared: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def of(self, backend: str) -> str:
        """What the table says of an backend."""
        if self.not_run:
            return f"not run: {self.not_run}"
        if backend in self.failures:
            return f"FAILED: {self.failures[backend]}"
        if backend not in self.compared:
            return "not run: the backend is not installed"
        said = ["every statistic"] if self.compared[backend] else []
        kinds = (message.partition(": ")[0] for message in self.messages)
        said += dict.fromkeys(kind.partition(" ")[0] for kind in kinds)
        return ", ".join(said)


ROWS: list[Row] = []


def row(title: str, *needs: str, quick: bool = False) -> Callable[[Run], Run]:
    """Enters a function into the matrix.

    Args:
        title: what it is, as the table says it.
        needs: modules that it imports; where one lacks, the row is not run and says so.
        quick: whether it belongs to the ordinary tests, too.
    """

    def enter(run: Run) -> Run:
        theme = run.__module__.rpartition(".")[2]
        ROWS.append(Row(title, theme, needs, quick, run))
        return run

    return enter


def run_row(row: Row, backends: Sequence[Implementation]) -> Outcome:
    """Runs a row with the backends; what it raises is a failure of all of them."""
    outcome = Outcome(row)
    missing = [name for name in row.needs if importlib.util.find_spec(name) is None]
    if missing:
        outcome.not_run = f"{', '.join(missing)} is not installed; make matrix installs it"
        return outcome
    look = Look(backends)
    threads = torch.get_num_threads()
    if row.theme != "processes":
        torch.set_num_threads(1)  # small models: threads would only wait for each other
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of those who build and train; a look has its own
            logging.disable(logging.WARNING)
            outcome.remark = row.run(look) or ""
    except NotRunError as reason:
        outcome.not_run = str(reason)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{place.filename.rpartition('/')[2]}:{place.lineno}"
        reason = f"{type(error).__name__}: {error} ({where})"
        outcome.failures = {backend.name: reason for backend in backends}
    finally:
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)
    outcome.seconds = time.perf_counter() - start
    outcome.compared = look.compared
    outcome.messages = list(look.messages)
    outcome.failures |= look.failures
    if not (outcome.not_run or outcome.failures or outcome.messages or any(look.compared.values())):
        outcome.failures = {backend.name: "the row compared nothing" for backend in backends}
    return outcome
