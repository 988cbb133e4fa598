"""The health check while a model trains: calls `on_finding`, and warns if no gradient is seen."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

from paramstats._findings import Finding, Thresholds
from paramstats._findings.over_time import Monitor
from paramstats._summary import Summary, lacks_gradients, record_of

OnFinding = Callable[[Finding], object]


class HealthChecks:
    """Checks the summaries of due steps, in their order.

    Args:
        on_finding: see `paramstats.watch`; None: only the warning.
        reads_gradients: whether the summaries have the gradients, if there are any.
    """

    def __init__(self, on_finding: OnFinding | None, reads_gradients: bool) -> None:
        self._on_finding = on_finding
        self._monitor = None if on_finding is None else Monitor(Thresholds(), reads_gradients)
        self._may_warn = reads_gradients
        self._unreported: list[Finding] = []
        self._before: Summary | None = None

    @property
    def need_statistics(self) -> bool:
        """Whether `add` must be called when the statistics of a summary are available."""
        return self._monitor is not None

    def warn_without_gradients(self, step: int, summary: Summary) -> None:
        """Warn if parameters require a gradient and none has one; once, and without waiting."""
        if self._may_warn and lacks_gradients(summary):
            self._may_warn = False
            warnings.warn(
                f"paramstats.watch: no parameter has a gradient at step {step}; call "
                f"watcher.step() after backward and before zero_grad()",
                RuntimeWarning,
                stacklevel=_frames_in_package(),
            )

    def add_before(self, summary: Summary) -> None:
        """Pass the parameters as they were before the first step."""
        self._before = summary

    def finish(self) -> None:
        """Add what the last entries say; `report` calls `on_finding`."""
        if self._monitor is not None:
            self._unreported += self._monitor.last()

    def add(self, step: int, summary: Summary) -> None:
        """Check a summary; `report` calls `on_finding`."""
        if self._monitor is None:
            return
        if self._before is not None:
            self._monitor.set_before(record_of(self._before))
            self._before = None
        self._unreported += self._monitor.add(step, record_of(summary))

    def report(self) -> None:
        """Call `on_finding` for what `add` has found. If it raises, the next call continues."""
        while self._unreported and self._on_finding is not None:
            self._on_finding(self._unreported.pop(0))


def _frames_in_package() -> int:
    """Return the `stacklevel` at which the caller's warning shows the user's line."""
    frame, level = sys._getframe(1), 1
    package = __name__.partition(".")[0]
    while frame.f_globals.get("__name__", "").partition(".")[0] == package and frame.f_back:
        frame, level = frame.f_back, level + 1
    return level
