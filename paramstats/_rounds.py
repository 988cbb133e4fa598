"""Count the steps of one or several optimizers, and collect the summaries of one round."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

from paramstats._core.layout import Layout
from paramstats._core.record import Record, joined
from paramstats._summary import Summary, record_of


class Rounds:
    """Numbers the steps of several optimizers, and says which of them are due.

    A round contains at most one step of each optimizer. It ends when an optimizer makes its second
    step, so the optimizer with the most steps determines the number of rounds. Each optimizer is
    due at its first step in or after a round whose number is a multiple of `every`.

    Args:
        every: the distance of due rounds.
        optimizers: how many optimizers there are.
        give: called with the number and the summary of a due round, when all optimizers have made
            their step or the next round begins.
    """

    def __init__(self, every: int, optimizers: int, give: Callable[[int, Summary], None]) -> None:
        self.number = -1
        """The number of the current round."""
        self.every = every
        self.number_with: Callable[[], int] | None = None
        """Returns the number of a new round; None: rounds are numbered from 0."""
        self._give = give
        self._all = (1 << optimizers) - 1
        self._stepped = self._all
        self._next = [0] * optimizers
        self._parts: list[Summary] = []
        self._layout: Layout | None = None

    def begin(self, optimizer: int = 0, number: int | None = None) -> bool:
        """Count a step and return whether it is due.

        Args:
            optimizer: the index of the optimizer.
            number: the number of the round, if this is its first step; None: see `number_with`. A
                number below the last one, as after a restart, is due for all optimizers.
        """
        bit = 1 << optimizer
        if self._stepped & bit:
            if self._parts:
                self.finish()
            if number is None and self.number_with is not None:
                number = self.number_with()
            if number is None:
                self.number += 1
            else:
                last, self.number = self.number, operator.index(number)
                if self.number < last:
                    self._next = [0] * len(self._next)
            self._stepped = bit
        else:
            self._stepped |= bit
        if self.number < self._next[optimizer]:
            return False
        self._next[optimizer] = self.number - self.number % self.every + self.every
        return True

    def postpone(self, optimizer: int) -> None:
        """Make the next step of an optimizer due instead of this one."""
        self._next[optimizer] = self.number

    def add(self, summary: Summary, layout: Layout) -> None:
        """Add the summary of a due step, and finish the round if it is the last one.

        Args:
            summary: of the optimizer's parameters, if there are several optimizers.
            layout: of all parameters.
        """
        self._parts.append(summary)
        self._layout = layout
        if self._stepped == self._all:
            self.finish()

    def summary(self) -> Summary | None:
        """Return the summary of the due steps in the current round, if it is not finished."""
        if len(self._parts) < 2:
            return self._parts[0] if self._parts else None
        assert self._layout is not None
        record = JoinedRecord(self._parts, self._layout)
        return Summary(record.result()) if record.ready() else Summary(None, record)

    def finish(self) -> None:
        """Give away the summary of the current round, if there is one."""
        summary = self.summary()
        if summary is not None:
            self._parts.clear()
            self._give(self.number, summary)


class JoinedRecord:
    """The record of several summaries, no two of which have a tensor in common.

    Args:
        summaries: the summaries.
        layout: the layout of all tensors, which determines their order.
    """

    def __init__(self, summaries: Sequence[Summary], layout: Layout) -> None:
        self._summaries = tuple(summaries)
        self._layout = layout

    def record(self) -> Record | None:
        return None

    def ready(self) -> bool:
        return all(summary.ready() for summary in self._summaries)

    def result(self) -> Record:
        return joined([record_of(summary) for summary in self._summaries], self._layout)
