"""Findings of single summaries that last: some entries are checked, and most of them must agree."""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Collection
from typing import NamedTuple

from paramstats._core.details import NOT_KNOWN, zero_rows_of
from paramstats._core.format import one_line_name
from paramstats._core.record import Record
from paramstats._findings.connections import UNUSED
from paramstats._findings.findings import Finding, FindingCode, Severity
from paramstats._findings.rows import in_words
from paramstats._findings.rules import find
from paramstats._findings.structure import module_of
from paramstats._findings.thresholds import Thresholds

Key = tuple[FindingCode, str, str]

_RUNS, _NEEDED = 5, 3
"""A finding lasts if it is in this many of the latest runs of the rules."""

_DEAD_RUNS, _DEAD_STEPS = 4, 10
_DEAD = 0.6
"""Units are dead if this share of a layer has no gradient in so many runs, over so many steps.

In healthy trainings, up to 0.57 of a layer of ReLUs had none. Of experts, one is enough.
"""

_DEAD_UNITS = 0.5
"""The threshold of units; that of experts is lower."""

_BRANCH = (
    "A whole branch of the model is not trained. Look for torch.no_grad() or detach() around it. "
    "If it is unused on purpose, freeze it with requires_grad_(False)."
)

_MIN_PAUSE, _MAX_PAUSE = 16, 128
"""Entries between two series of frequent runs: at first and, after several series, later."""


class Persistent:
    """Runs the rules of single summaries on some of the entries.

    A run takes milliseconds for a model of 500 tensors. There are nine runs in the first 17
    entries, then in every fourth entry, and from the 32nd entry on in every 32nd. A change that
    other rules have seen starts that again.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._entries = 0
        self._first = 0  # the entry from which on runs are frequent
        self._pause = _MIN_PAUSE
        self._runs: deque[dict[Key, Finding]] = deque(maxlen=_RUNS)
        self._active: dict[Key, Finding] = {}
        self._dead: dict[str, _Dead] = {}
        self._unused: _Unused | None = None

    def add(self, step: int, record: Record, changed: bool) -> list[Finding]:
        """Return the findings that exist at this entry.

        Args:
            step: the number of the step.
            record: the entry.
            changed: whether something has happened in it.
        """
        entry, self._entries = self._entries, self._entries + 1
        if changed and entry - self._first >= self._pause:
            self._first, self._pause = entry, min(2 * self._pause, _MAX_PAUSE)
        if _is_due(entry, entry - self._first) or record.diverged:
            self._run(step, record)
        return list(self._active.values())

    def _run(self, step: int, record: Record) -> None:
        every = [
            dataclasses.replace(finding, step=step)
            for finding in find(record, self._thresholds)
            if not _is_found_over_time(finding)
        ]
        self._runs.append({_key(finding): finding for finding in every})
        self._active = self._lasting(_NEEDED)
        for finding in every:
            is_first = finding.code is FindingCode.CONSTANT_WEIGHT and len(self._runs) == 1
            if finding.severity >= (Severity.WARNING if is_first else Severity.ERROR):
                self._active.setdefault(_key(finding), finding)
        self._active.update((_key(one), one) for one in self._never_alive(step, record, every))
        self._active.update((_key(one), one) for one in self._never_used(step, record, every))

    def _never_alive(self, step: int, record: Record, every: list[Finding]) -> list[Finding]:
        """Return findings of units without a gradient in several runs, as warnings."""
        dead, out = {}, []
        for finding in every:
            key = _key(finding)
            active = self._active.get(key, finding)
            if finding.code is not FindingCode.DEAD_UNITS or active.severity > Severity.INFO:
                continue
            row = record.layout.index[finding.name]
            packed = record.details[len(record.layout) + row].zero_rows or NOT_KNOWN
            rows = set(zero_rows_of(packed) or ())
            n = len(rows) / finding.value
            before = self._dead.get(finding.name, _Dead(step, 0, rows))
            first, runs, rows = before.step, before.runs + 1, before.rows & rows
            if len(rows) <= n * max(_DEAD, finding.threshold) * (finding.threshold >= _DEAD_UNITS):
                continue
            dead[finding.name] = _Dead(first, runs, rows)
            if runs >= _DEAD_RUNS and step - first >= _DEAD_STEPS:
                what = f"of the gradient zero in all batches since step {first}"
                message = in_words(sorted(rows), round(n), what)
                value, severity = len(rows) / n, Severity.WARNING
                out.append(
                    dataclasses.replace(
                        finding, severity=severity, value=value, message=message, step=first
                    )
                )
        self._dead = dead
        return out

    def _never_used(self, step: int, record: Record, every: list[Finding]) -> list[Finding]:
        """Return findings of branches that an optimizer has and that never had a gradient."""
        unused = {
            one.name: one
            for one in every
            if one.code is FindingCode.MISSING_GRADIENT and one.advice == UNUSED
        }
        first, runs, names = self._unused or _Unused(step, 0, frozenset(unused))
        self._unused = now = _Unused(first, runs + 1, names & unused.keys())
        if record.optimizer is None or now.runs < _DEAD_RUNS or step - first < _DEAD_STEPS:
            return []
        return [
            dataclasses.replace(
                unused[name],
                severity=Severity.WARNING,
                step=first,
                message=f"none since step {first}, as all {n} parameters of "
                f"'{one_line_name(branch)}', which an optimizer has",
                advice=_BRANCH,
            )
            for branch, n in _branches(record, now.names)
            for name in sorted(now.names, key=record.layout.index.__getitem__)
            if name.startswith(f"{branch}.")
        ]

    def forget(self, names: Collection[str]) -> None:
        """Forget tensors that exist no more."""
        for found in (self._active, *self._runs):
            for key in [key for key in found if key[1] in names]:
                del found[key]

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


def _branches(record: Record, names: Collection[str]) -> list[tuple[str, int]]:
    """Return the modules all of whose parameters are among `names`, and their number.

    They have three parameters or more, a quarter of the model's. Numbered modules are layers.
    """
    layout = record.layout
    trainable = [
        name for name, needed in zip(layout.names, layout.requires_grad, strict=False) if needed
    ]
    counts: Counter[str] = Counter()
    kept: set[str] = set()
    for name in trainable:
        path = module_of(name)
        while path:
            counts[path] += 1
            if name not in names:
                kept.add(path)
            path = module_of(path)
    return [
        (path, n)
        for path, n in counts.items()
        if path not in kept and n >= max(3, len(trainable) / 4)
        if not path.rpartition(".")[2].isdigit()
        if module_of(path) in kept or not module_of(path)
    ]


class _Unused(NamedTuple):
    """Parameters without a gradient in all runs since a step."""

    step: int
    runs: int
    names: frozenset[str]


class _Dead(NamedTuple):
    """The rows of a gradient that were zero in all runs since a step."""

    step: int
    runs: int
    rows: set[int]


def _key(finding: Finding) -> Key:
    return finding.code, finding.name, finding.source


def _is_due(entry: int, since: int) -> bool:
    """Return whether the rules are run, `since` entries after a change."""
    if since <= 16:
        return since in (0, 1, 2, 3, 4, 6, 8, 12, 16)
    return entry % (4 if entry < 32 else 32) == 0


def _is_found_over_time(finding: Finding) -> bool:
    """Return whether other rules find it, and say what it led to."""
    if not finding.name:  # no gradient at all, or gradients of zeros only
        return True
    nonfinite = FindingCode.NONFINITE_GRADIENT, FindingCode.NONFINITE_PARAMETER
    return finding.code in nonfinite and finding.source != "buffer"
