"""`Monitor`: the health check over time, entry by entry."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence

import torch

from paramstats._core.record import Record
from paramstats._core.torch_private import without_modes
from paramstats._findings.findings import Finding, Findings, Severity
from paramstats._findings.over_time import signals
from paramstats._findings.over_time.accumulation import add_to_line
from paramstats._findings.over_time.conditions import ACTIVE, RUN, advance, make_limits
from paramstats._findings.over_time.entry import Now
from paramstats._findings.over_time.model_wide import (
    WHOLE_RULES,
    Whole,
    make_whole_finding,
    needed_of_whole,
    whole_conditions,
)
from paramstats._findings.over_time.nonfinite import Nonfinite
from paramstats._findings.over_time.persistent import Persistent
from paramstats._findings.over_time.reports import Groups, Reports, each, order, together
from paramstats._findings.over_time.signals import RULES, Condition
from paramstats._findings.over_time.texts import TEXTS, make_finding
from paramstats._findings.over_time.tracks import WINDOW, Plan, State, full, statistics, updates_of
from paramstats._findings.thresholds import Thresholds


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
        self._reports = Reports()
        self._reset()

    def _reset(self) -> None:
        self._entries = 0
        self._first_step: int | None = None
        self._last_step: int | None = None
        self._plans: dict[int, tuple[Plan, int]] = {}
        with torch.inference_mode():
            self._state = State(len(Condition))
            self._is_quiet = True  # no condition of a parameter was true in the last entry
            self._whole_moves = False
            self._whole = full((1, len(Whole), 4), 0.0)
            self._limits = make_limits([RULES[condition] for condition in Condition])
            self._whole_limits = make_limits([WHOLE_RULES[condition] for condition in Whole])
        self._nonfinite = Nonfinite()
        self._persistent = Persistent(self._thresholds)

    def set_before(self, record: Record) -> None:
        """Tell which parameters had NaN or Inf before the first step; `add` follows."""
        self._nonfinite.set_before(record)

    @without_modes()
    def add(self, step: int, record: Record) -> list[Finding]:
        """Add an entry; return the findings that begin, and those that end, with `end` set.

        If `step` is not greater than the last one, the run went back: the state begins anew, and
        all findings end after the last one.
        """
        if self._last_step is not None and step <= self._last_step:
            self._reports.end_all(self._last_step + 1)
            self._reset()
        self._last_step = step
        if self._first_step is None:
            self._first_step = step
        with torch.inference_mode():
            self._add(step, record)
        return self._reports.news()

    def _add(self, step: int, record: Record) -> None:
        plan = self._state.plan(record.layout)
        rows = self._state.read(plan)
        optimizer = record.optimizer
        self._reads_gradients |= optimizer is not None and "no gradient" in optimizer.methods
        known = () if optimizer is None else optimizer.hyperparameters
        now = Now(
            step, plan, rows, *statistics(record), record.correction, updates_of(record), known
        )
        limits = self._thresholds
        seen = signals.screen(now, limits)
        happens = seen.happens > 0 or (seen.stays > 0 and bool(now.clamped.any()))
        happens = happens or not seen.grads
        if seen.away:
            signals.leave_past(now)
        moved = seen.zeros > 0
        checks_all = happens or seen.away > 0 or not self._is_quiet
        if checks_all:
            moved = self._tensors(now) or moved
        assert self._first_step is not None
        is_early = add_to_line(now, self._first_step)
        entry, self._entries = self._entries, self._entries + 1
        is_early = is_early and (entry <= WINDOW or entry % 8 == 0)
        if is_early or happens or self._whole_moves or 2 * seen.smaller > plan.n_weights:
            self._whole_model(now)
        if seen.nonfinite or self._nonfinite.is_active:
            after_step, is_scaled = optimizer is not None, record.grad_scale != 1
            found = self._nonfinite.add(now, after_step, is_scaled)
            self._reports.keep("nonfinite", found, step, each)
        if seen.away:
            moved = moved or bool((rows.numbers["onset"] == now.step).any())
        found = self._persistent.add(step, record, moved)
        self._reports.keep("summary", found, step, functools.partial(together, plan=plan))
        self._forget_removed(plan, entry)
        if seen.away:
            signals.come_back(now)
        signals.remember(now, limits)
        self._state.write(plan, rows)
        if checks_all:
            moving = self._state.conditions[:, :, [RUN, ACTIVE]] > 0
            self._is_quiet = not bool(moving.any())

    def _forget_removed(self, plan: Plan, entry: int) -> None:
        """End the findings of parameters that no entry has had for a while."""
        self._plans[id(plan)] = plan, entry
        if len(self._plans) == 1:
            return
        old = [key for key, (_, last) in self._plans.items() if entry - last >= WINDOW]
        gone = {name for key in old for name in self._plans.pop(key)[0].names}
        gone.difference_update(*(kept.names for kept, _ in self._plans.values()))
        if gone:
            self._persistent.forget(gone)
            self._reports.forget(gone, int(self._last_step or 0))

    @without_modes()
    def last(self) -> list[Finding]:
        """Return findings of the last entries that `add` has kept for the next one to confirm."""
        if self._last_step is not None:
            every = (*self._persistent.findings(), *self._nonfinite.findings())
            plan = next(plan for plan, entry in self._plans.values() if entry == self._entries - 1)
            group = functools.partial(together, plan=plan)
            self._reports.keep("last", every, self._last_step, group)
        return self._reports.news()

    def findings(self) -> Findings:
        """Return all findings: the most severe first, then those that began first."""
        after = copy.copy(self)
        after._reports = copy.deepcopy(self._reports)
        after.last()
        return Findings(sorted(after._reports.findings(), key=order))

    def _tensors(self, now: Now) -> bool:
        """Report the conditions of parameters that begin and end; return whether there are any."""
        yes, no = signals.conditions(now, self._thresholds)
        needed = signals.needed_entries(now)
        state, begun, ended = advance(now.rows.conditions, yes, no, now.step, self._limits, needed)
        now.rows.conditions = state
        for row, column in ended.nonzero().tolist():
            self._reports.end(Condition(column), now.plan.names[row], int(now.step))
        for column in begun.any(0).nonzero()[:, 0].tolist():
            rows = begun[:, column].nonzero()[:, 0].tolist()
            self._begin_in(Condition(column), now, rows)
        return bool((begun | ended).any())

    def _begin_in(self, condition: Condition, now: Now, rows: list[int]) -> None:
        """Report a condition that begins in some parameters."""
        found = [make_finding(condition, now, row, self._thresholds) for row in rows]
        is_active = now.rows.conditions[:, condition, ACTIVE] > 0
        is_most = 2 * is_active.sum() > (
            now.trained.sum() if condition is Condition.UNCHANGED else now.plan.n_weights
        )
        if bool(is_most) == (condition is Condition.UNCHANGED) and condition in (
            Condition.UNCHANGED,  # on purpose, as when only the last layers are trained
            Condition.SMALL,  # the weight has converged
        ):
            found = [dataclasses.replace(one, severity=Severity.INFO) for one in found]
        group = functools.partial(together, plan=now.plan, advice=TEXTS[condition].wide)
        if condition is Condition.SPIKE:
            group = functools.partial(_first, now=now)
        self._reports.begin(condition, found, int(now.step), group)

    def _whole_model(self, now: Now) -> None:
        yes, no = whole_conditions(now, self._first_step or 0, self._reads_gradients)
        if not any(yes) and not self._whole_moves:
            return
        yes_row, no_row = torch.tensor([[yes], [no]], dtype=torch.bool, device="cpu")
        limits, needed = self._whole_limits, needed_of_whole(now, self._whole)
        self._whole, begun, ended = advance(self._whole, yes_row, no_row, now.step, limits, needed)
        self._whole_moves = bool((self._whole[:, :, [RUN, ACTIVE]] > 0).any())
        if bool((begun | ended).any()):
            for condition in Whole:
                if begun[0, condition]:
                    state = self._whole[0, condition]
                    reads = self._reads_gradients or bool(
                        (self._state.numbers["with_grad"] > 0).any()
                    )
                    found = make_whole_finding(condition, now, state, reads)
                    self._reports.begin(("whole", condition), [found], int(now.step), _as_whole)
                if ended[0, condition]:
                    self._reports.end(("whole", condition), "", int(now.step))


def _as_whole(found: Sequence[Finding]) -> Groups:
    """Report a finding of the model, or of several tensors, which ends as a whole."""
    return [(finding, {"", finding.name}) for finding in found]


def _first(found: Sequence[Finding], now: Now) -> Groups:
    """Report what left its past first, with the number of others."""
    if not found:
        return []
    first = min(found, key=order)
    if len(found) > 1:
        others, of = len(found) - 1, int(now.has_grad.sum()) - 1
        message = f"{first.message}; so did {others} of the other {of}, by less or later"
        first = dataclasses.replace(first, message=message)
    return [(first, {"", *(finding.name for finding in found)})]
