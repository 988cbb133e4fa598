"""Rows of the compatibility matrix and their results."""

from __future__ import annotations

import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from paramstats._core.backend import Implementation
from tools.matrix.checker import Checker, describe

Run = Callable[[Checker], str | None]
"""Builds, trains and checks; returns a remark. Raises `NotRunError` where it cannot run here."""


class NotRunError(Exception):
    """A row cannot run here; the message says why."""


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
        """The name for `--only`."""
        return f"{self.theme}.{self.run.__name__}"


@dataclass
class Outcome:
    """The result of a row."""

    row: Row
    not_run: str = ""
    remark: str = ""
    seconds: float = 0.0
    messages: list[str] = field(default_factory=list)
    compared: int = 0
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """For example "every statistic, skipped"."""
        if self.not_run:
            return f"not run: {self.not_run}"
        if self.failures:
            return "; ".join(f"{name} FAILED: {reason}" for name, reason in self.failures.items())
        parts = ["every statistic"] if self.compared else []
        return ", ".join(parts + list(dict.fromkeys(m.split(":")[0] for m in self.messages)))


ROWS: list[Row] = []


def row(title: str, *needs: str, quick: bool = False) -> Callable[[Run], Run]:
    """Adds a function to the matrix.

    Args:
        title: the first cell of the table.
        needs: modules that the row imports; without one of them it does not run.
        quick: whether the row is part of the tests, too.
    """

    def add(run: Run) -> Run:
        theme = run.__module__.rpartition(".")[2]
        ROWS.append(Row(title, theme, needs, quick, run))
        return run

    return add


def run_row(row: Row, backends: Sequence[Implementation]) -> Outcome:
    """Runs a row with the backends; an exception of its own is a failure of all of them."""
    outcome = Outcome(row)
    missing = [name for name in row.needs if importlib.util.find_spec(name) is None]
    if missing:
        outcome.not_run = f"{', '.join(missing)} is not installed; make matrix installs it"
        return outcome
    checker = Checker(backends)
    threads = torch.get_num_threads()
    if row.theme != "processes":
        torch.set_num_threads(1)  # the models are too small for several threads
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of libraries; a check records its own
            logging.disable(logging.WARNING)
            outcome.remark = row.run(checker) or ""
    except NotRunError as reason:
        outcome.not_run = str(reason)
    except Exception as error:
        outcome.failures = {backend.name: describe(error) for backend in backends}
    finally:
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)
    outcome.seconds = time.perf_counter() - start
    outcome.compared = max(checker.compared.values())
    outcome.messages = list(checker.messages)
    outcome.failures |= checker.failures
    if not (outcome.not_run or outcome.failures or outcome.messages or outcome.compared):
        outcome.failures = {backend.name: "the row compared nothing" for backend in backends}
    return outcome
