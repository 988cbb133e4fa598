"""Judge the findings of a recording: named or missed, quiet or alarm, and at which step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import paramstats
from paramstats import Finding, Severity, Thresholds
from paramstats._findings.over_time import Monitor
from paramstats._summary import record_of
from tests.clinic.runner import Recording
from tests.clinic.training import Case

WITHIN = 50
"""Steps after the onset within which a disease must be named."""


@dataclass
class Verdict:
    """What the health check said of a training."""

    case: Case
    first_loss: float
    last_loss: float
    seconds: float
    named: dict[str, tuple[int, Finding] | None]
    """By view: the first finding that names the disease, and its step."""
    alarms: dict[str, list[tuple[int, Finding]]]
    """By view: alarms of a healthy training, or of a sick one before its onset."""

    @property
    def right(self) -> bool:
        """Whether a disease was named in some view, or a healthy training was quiet in all."""
        return any(self.named.values()) if self.case.codes else not any(self.alarms.values())


def judge(recording: Recording) -> Verdict:
    """Return what each view of a training says.

    The views are `summary`, `watch` and `health`: the findings of each single summary; and
    `history` and `watch history`: the findings over time of those of `summary` and `watch`.
    """
    case, named, alarms = recording.case, {}, {}
    for view, found in _views(recording).items():
        named[view] = next(
            (
                (step, finding)
                for step, finding in found
                if case.codes
                and case.onset <= step <= case.onset + WITHIN
                and finding.severity >= Severity[case.level]
                and finding.code.name in case.codes
                and any(re.search(case.place, name) for name in _names(finding))
            ),
            None,
        )
        alarms[view] = [
            (step, finding)
            for step, finding in found
            if finding.severity >= Severity.WARNING and (not case.codes or step < case.onset)
        ]
    losses = recording.losses
    n = max(3, len(losses) // 10)
    first, last = (sum(part) / len(part) for part in (losses[:n], losses[-n:]))
    return Verdict(case, first, last, recording.seconds, named, alarms)


def _names(finding: Finding) -> list[str]:
    """Return the name of a finding, or those that the finding of many tensors lists."""
    listed = re.search(r"[\d,]+ of [\d,]+ (?:weights|parameters): ([^;]*)", finding.message)
    return [finding.name, *(listed[1].split(", ") if listed else ())]


def _views(recording: Recording) -> dict[str, list[tuple[int, Finding]]]:
    """Return the findings of each view with the steps at which they were known."""
    views = {}
    for kind, history in recording.histories.items():
        entries = list(history)
        views[kind] = [(step, f) for step, summary in entries for f in summary.findings()]
        if kind != "health":
            views["history" if kind == "summary" else "watch history"] = list(_told(entries))
    return views


def _told(entries: list[tuple[int, paramstats.Summary]]) -> Iterator[tuple[int, Finding]]:
    """Yield each finding over time, as `watch(on_finding=...)` reports it, with its step.

    `Finding.step` is the step at which the problem began, which may be known later only.
    """
    monitor = Monitor(Thresholds(), reads_gradients=True)
    for step, summary in entries:
        for finding in monitor.add(step, record_of(summary)):
            if finding.end is None:
                yield step, finding
