"""Findings of single summaries that last: some entries are checked, and most of them must agree."""

from __future__ import annotations

import dataclasses
from collections import deque

from paramstats._core.record import Record
from paramstats._findings.findings import Finding, FindingCode, Severity
from paramstats._findings.rules import find
from paramstats._findings.thresholds import Thresholds

Key = tuple[FindingCode, str, str]

_RUNS, _NEEDED = 5, 3
"""A finding lasts if it is in this many of the latest runs of the rules."""

_PAUSE = 64
"""The smallest number of entries between two series of additional runs."""


class Persistent:
    """Runs the rules of single summaries on some of the entries.

    A run takes milliseconds for a model of 500 tensors. They are made in every second entry at
    first, then in every fourth, and from the 32nd entry on in every 32nd. After a change that
    other rules have seen, every second entry is checked, for five runs.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._entries = 0
        self._additional = 0
        self._next_series = 0
        self._runs: deque[dict[Key, Finding]] = deque(maxlen=_RUNS)
        self._active: dict[Key, Finding] = {}

    def add(self, step: int, record: Record, changed: bool) -> list[Finding]:
        """Return the findings that exist at this entry.

        Args:
            step: the number of the step.
            record: the entry.
            changed: whether something has happened in it.
        """
        entry, self._entries = self._entries, self._entries + 1
        if changed and entry >= self._next_series:
            self._additional, self._next_series = 2 * _RUNS, entry + _PAUSE
        is_additional, self._additional = self._additional % 2 == 1, max(0, self._additional - 1)
        if is_additional or _is_due(entry) or record.diverged:
            self._run(step, record)
        return list(self._active.values())

    def _run(self, step: int, record: Record) -> None:
        every = [
            dataclasses.replace(finding, step=step)
            for finding in find(record, self._thresholds)
            if not _is_found_over_time(finding)
        ]
        self._runs.append({(f.code, f.name, f.source): f for f in every})
        self._active = self._lasting(_NEEDED)
        for finding in every:
            if finding.severity is Severity.ERROR:
                self._active.setdefault((finding.code, finding.name, finding.source), finding)

    def findings(self) -> list[Finding]:
        """Return the findings that exist; of fewer than three runs, those that all of them have."""
        return list(self._lasting(min(_NEEDED, len(self._runs))).values())

    def _lasting(self, needed: int) -> dict[Key, Finding]:
        """Return findings that `needed` of the latest runs have, and those that have not ended."""
        out: dict[Key, Finding] = {}
        for key in dict.fromkeys(key for run in self._runs for key in run):
            found = [run[key] for run in self._runs if key in run]
            active = self._active.get(key)
            if active is None and len(found) >= needed:
                severity = min(one.severity for one in found)
                out[key] = dataclasses.replace(found[-1], severity=severity, step=found[0].step)
            elif active is not None and any(key in run for run in list(self._runs)[-_NEEDED:]):
                out[key] = active
        return out


def _is_due(entry: int) -> bool:
    if entry < 10:
        return entry % 2 == 0
    return entry % (4 if entry < 32 else 32) == 0


def _is_found_over_time(finding: Finding) -> bool:
    """Return whether other rules find it, and say what it led to."""
    nonfinite = FindingCode.NONFINITE_GRADIENT, FindingCode.NONFINITE_PARAMETER
    return finding.code in nonfinite and finding.source != "buffer"
