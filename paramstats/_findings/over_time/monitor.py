"""`Monitor`: the health check over time, entry by entry."""

from __future__ import annotations

import dataclasses
from collections import deque

import torch

from paramstats._core.format import one_line_name
from paramstats._core.record import Record
from paramstats._core.torch_private import without_modes
from paramstats._findings.findings import Finding, FindingCode, Findings, Severity
from paramstats._findings.over_time import signals
from paramstats._findings.over_time.conditions import ACTIVE, RUN, advance, make_limits
from paramstats._findings.over_time.entry import Now
from paramstats._findings.over_time.model_wide import (
    WHOLE_RULES,
    Whole,
    add_to_line,
    make_whole_finding,
    whole_conditions,
)
from paramstats._findings.over_time.nonfinite import Nonfinite
from paramstats._findings.over_time.persistent import Persistent
from paramstats._findings.over_time.signals import RULES, Condition
from paramstats._findings.over_time.texts import TEXTS, make_finding
from paramstats._findings.over_time.tracks import WINDOW, State, full, statistics, update_norms
from paramstats._findings.thresholds import Thresholds

_MAX_ENDED = 1000
"""How many findings that have ended are kept."""

_MANY = 3
"""If more parameters than this, and more than half of all, have a finding, it is the model's."""

Key = tuple[object, ...]


class Monitor:
    """Finds what changes from entry to entry of a training.

    The state has a constant size per parameter, and an entry costs a constant number of torch
    operators. Entries may have different parameters.

    Args:
        thresholds: the limits.
        reads_gradients: whether gradients were read where there were any; False if that is not
            known.
    """

    @without_modes()
    def __init__(self, thresholds: Thresholds, reads_gradients: bool = False) -> None:
        self._thresholds = thresholds
        self._reads_gradients = reads_gradients
        self._ended: deque[Finding] = deque(maxlen=_MAX_ENDED)
        self._reset()

    def _reset(self) -> None:
        self._entries = 0
        self._first_step: int | None = None
        self._last_step: int | None = None
        self._active: dict[Key, Finding] = {}
        self._keys: dict[tuple[FindingCode, str, str], Key] = {}
        self._members: dict[Condition, set[str]] = {}
        with torch.inference_mode():
            self._state = State(len(Condition))
            self._is_quiet = True  # no condition of a parameter was true in the last entry
            self._whole_moves = False
            self._whole = full((1, len(Whole), 4), 0.0)
            self._limits = make_limits([RULES[condition] for condition in Condition])
            self._whole_limits = make_limits([WHOLE_RULES[condition] for condition in Whole])
        self._nonfinite = Nonfinite()
        self._persistent = Persistent(self._thresholds)

    @without_modes()
    def add(self, step: int, record: Record) -> list[Finding]:
        """Add an entry; return the findings that begin, and those that end, with `end` set.

        If `step` is not greater than the last one, the run went back: the state begins anew, and
        all findings end.
        """
        out: list[Finding] = []
        if self._last_step is not None and step <= self._last_step:
            for key in list(self._active):
                self._end(key, step, out)
            self._reset()
        self._last_step = step
        if self._first_step is None:
            self._first_step = step
        with torch.inference_mode():
            self._add(step, record, out)
        return out

    def _add(self, step: int, record: Record, out: list[Finding]) -> None:
        plan = self._state.plan(record.layout)
        rows = self._state.read(plan)
        optimizer = record.optimizer
        self._reads_gradients |= optimizer is not None and "no gradient" in optimizer.methods
        now = Now(step, plan, rows, *statistics(record), record.correction, update_norms(record))
        limits = self._thresholds
        seen = signals.screen(now, limits)
        happens = seen.happens > 0 or (seen.stays > 0 and bool(now.clamped.any()))
        happens = happens or not seen.grads
        if seen.away:
            signals.leave_past(now)
        moved = seen.zeros > 0
        checks_all = happens or seen.away > 0 or not self._is_quiet
        if checks_all:
            moved = self._tensors(now, out) or moved
        assert self._first_step is not None
        is_early = add_to_line(now, self._first_step)
        entry, self._entries = self._entries, self._entries + 1
        is_early = is_early and (entry <= WINDOW or entry % 8 == 0)
        if is_early or happens or self._whole_moves or 2 * seen.smaller > plan.n_weights:
            self._whole_model(now, out)
        if seen.nonfinite or self._nonfinite.is_active:
            after_step, is_scaled = optimizer is not None, record.grad_scale != 1
            self._set_active(
                "nonfinite", self._nonfinite.add(now, after_step, is_scaled), step, out
            )
        if seen.away:
            moved = moved or bool((rows.numbers["onset"] == now.step).any())
        self._set_active("summary", self._persistent.add(step, record, moved), step, out)
        if seen.away:
            signals.come_back(now)
        signals.remember(now, limits)
        self._state.write(plan, rows)
        if checks_all:
            moving = self._state.conditions[:, :, [RUN, ACTIVE]] > 0
            self._is_quiet = not bool(moving.any())

    @without_modes()
    def findings(self) -> Findings:
        """Return all findings: the most severe first, then those that began first."""
        found = {**self._active}
        for finding in (*self._persistent.findings(), *self._nonfinite.findings()):
            if _what(finding) not in self._keys:
                found[_key("last", finding)] = finding
        every = [*self._ended, *found.values()]
        return Findings(sorted(every, key=_order))

    def _tensors(self, now: Now, out: list[Finding]) -> bool:
        """Report the conditions of parameters that begin and end; return whether there are any."""
        yes, no = signals.conditions(now, self._thresholds)
        needed = signals.needed_entries(now)
        state, begun, ended = advance(now.rows.conditions, yes, no, now.step, self._limits, needed)
        now.rows.conditions = state
        for row, column in ended.nonzero().tolist():
            condition, name = Condition(column), now.plan.names[row]
            members = self._members.get(condition, set())
            members.discard(name)
            self._end((condition, name), int(now.step), out)
            if not members:
                self._end((condition, ""), int(now.step), out)
        for column in begun.any(0).nonzero()[:, 0].tolist():
            rows = begun[:, column].nonzero()[:, 0].tolist()
            self._begin_in(Condition(column), now, rows, out)
        return bool((begun | ended).any())

    def _begin_in(
        self, condition: Condition, now: Now, rows: list[int], out: list[Finding]
    ) -> None:
        """Report a condition that begins in some parameters, as one finding if these are many."""
        members = self._members.setdefault(condition, set())
        members.update(now.plan.names[row] for row in rows)
        if (condition, "") in self._active:
            return
        found = [make_finding(condition, now, row, self._thresholds) for row in rows]
        first = min(found, key=_order)
        if condition is Condition.SPIKE:
            if len(rows) > 1:
                first = dataclasses.replace(first, message=f"{first.message}; {_count(found, now)}")
            self._begin((condition, ""), first, out)
            return
        n_weights, n_trained = int(now.plan.weights.sum()), int(now.trained.sum())
        advice = TEXTS[condition].wide
        if advice and len(members) > _MANY and 2 * len(members) > n_weights:
            label = one_line_name(first.name)
            message = f"{len(members)} parameters, {label} first: {first.message}"
            wide = dataclasses.replace(first, name="", message=message, advice=advice)
            self._begin((condition, ""), wide, out)
            return
        is_on_purpose = condition is Condition.UNCHANGED and 2 * len(members) > n_trained
        has_converged = condition is Condition.SMALL and 2 * len(members) <= n_weights
        for finding in found:
            if is_on_purpose or has_converged:
                finding = dataclasses.replace(finding, severity=Severity.INFO)
            self._begin((condition, finding.name), finding, out)

    def _whole_model(self, now: Now, out: list[Finding]) -> None:
        yes, no = whole_conditions(now, self._first_step or 0, self._reads_gradients)
        if not any(yes) and not self._whole_moves:
            return
        yes_row, no_row = torch.tensor([[yes], [no]], dtype=torch.bool, device="cpu")
        limits = self._whole_limits
        self._whole, begun, ended = advance(self._whole, yes_row, no_row, now.step, limits, None)
        self._whole_moves = bool((self._whole[:, :, [RUN, ACTIVE]] > 0).any())
        if bool((begun | ended).any()):
            for condition in Whole:
                if begun[0, condition]:
                    state = self._whole[0, condition]
                    reads = self._reads_gradients or bool(
                        (self._state.numbers["with_grad"] > 0).any()
                    )
                    self._begin((condition,), make_whole_finding(condition, now, state, reads), out)
                if ended[0, condition]:
                    self._end((condition,), int(now.step), out)

    def _begin(self, key: Key, finding: Finding, out: list[Finding]) -> None:
        """Begin a finding, unless one of the parameter or the model says the same as severely."""
        if key in self._active:
            return
        what = _what(finding)
        for known in (what, (*what[:2], "")):
            other = self._keys.get(known)
            if other is not None and self._active[other].severity >= finding.severity:
                return
        if what in self._keys:
            assert self._last_step is not None
            self._end(self._keys[what], self._last_step, out)
        self._active[key], self._keys[what] = finding, key
        out.append(finding)

    def _end(self, key: Key, step: int, out: list[Finding]) -> None:
        finding = self._active.pop(key, None)
        if finding is not None:
            del self._keys[_what(finding)]
            self._ended.append(dataclasses.replace(finding, end=step))
            out.append(self._ended[-1])

    def _set_active(self, of: str, found: list[Finding], step: int, out: list[Finding]) -> None:
        """Begin and end findings so that `found` are the active ones."""
        if not found and not any(key[0] == of for key in self._active):
            return
        wanted = {_key(of, finding): finding for finding in found}
        for key in [key for key in self._active if key[0] == of and key not in wanted]:
            self._end(key, step, out)
        for key, finding in wanted.items():
            self._begin(key, finding, out)


def _key(of: str, finding: Finding) -> Key:
    return of, finding.code, finding.name, finding.source, finding.severity


def _what(finding: Finding) -> tuple[FindingCode, str, str]:
    """Return what a finding says, and of which parameter."""
    return finding.code, finding.source, finding.name


def _order(finding: Finding) -> tuple[float, ...]:
    """Sort by severity, then by onset, parameters before gradients, then by how much."""
    step = finding.step or 0
    value = finding.value if finding.value == finding.value else 0.0
    ratio = max(value, 1 / value) if value > 0 else 0.0
    is_consequence = finding.code is not FindingCode.NONFINITE_GRADIENT
    return -finding.severity, step, is_consequence, finding.source != "param", -ratio


def _count(found: list[Finding], now: Now) -> str:
    others = len(found) - 1
    return f"so did {others} of the other {int(now.has_grad.sum()) - 1}, by less or later"
