"""Which findings exist: each is reported once, and one finding is enough for many tensors."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

from paramstats._core.format import one_line_name
from paramstats._findings.findings import Finding, FindingCode
from paramstats._findings.over_time.tracks import Plan

_MAX_ENDED = 1000
"""How many findings that have ended are kept."""

_MANY = 5
"""If a problem begins in more tensors than this at once, one finding reports all of them."""

_MAX_NAMES = 8
"""Names that such a finding lists."""

_EXPLAINED_BY = {
    FindingCode.UNCHANGED_PARAMETER: (FindingCode.FORGOTTEN_PARAMETER, FindingCode.LOST_UPDATE),
    FindingCode.SMALL_UPDATE: (FindingCode.LOST_UPDATE, FindingCode.BELOW_EPS),
    FindingCode.CHANGED_OUTSIDE: (FindingCode.LARGE_UPDATE,),
}
"""Codes of which the others, of the same tensor or of the model, are the reason."""

Groups = list[tuple[Finding, Collection[str]]]
"""Findings, and the names of the tensors that each is about.

If "" is among them, the finding includes tensors that follow later.
"""


@dataclass(eq=False)
class _Report:
    finding: Finding
    rule: Hashable
    names: set[str]
    """The tensors that still have the problem; "" for the model."""


class Reports:
    """The findings of all rules that are reported and have not ended."""

    def __init__(self) -> None:
        # By the rule and the tensor, and by what is said and the tensor. Reports that include
        # tensors that follow later are also under the name "".
        self._of: dict[tuple[Hashable, str], _Report] = {}
        self._said: dict[tuple[FindingCode, str, str], _Report] = {}
        self._ended: deque[Finding] = deque(maxlen=_MAX_ENDED)
        self._news: list[Finding] = []

    def news(self) -> list[Finding]:
        """Return the findings that have begun, and those that have ended, since the last call."""
        news, self._news = self._news, []
        return news

    def findings(self) -> list[Finding]:
        """Return all findings, those that have ended first."""
        return [*self._ended, *(report.finding for report in dict.fromkeys(self._of.values()))]

    def begin(
        self,
        rule: Hashable,
        found: Iterable[Finding],
        step: int,
        group: Callable[[Sequence[Finding]], Groups],
    ) -> None:
        """Report what a rule has found, unless it is known.

        Args:
            rule: the rule.
            found: one finding for each tensor, or one of the model.
            step: of the entry.
            group: returns what to report of several findings.
        """
        new = [finding for finding in found if (rule, finding.name) not in self._of]
        wide = self._of.get((rule, ""))
        if wide is not None:
            for finding in new:
                wide.names.add(finding.name)
                self._add(wide, finding.name)
            return
        for finding, names in group([one for one in new if not self.knows(one)]):
            report = _Report(finding, rule, {*names} - {""} or {""})
            for name in {*names, finding.name}:
                less_severe = self._said.get((*_said(finding), name))
                if less_severe is not None:
                    self._remove(less_severe, name, step)
                self._add(report, name)
            self._news.append(finding)

    def knows(self, finding: Finding) -> bool:
        """Return whether one of the tensor or the model says the same, or the reason for it."""
        return any(
            (report := self._said.get((code, source, name))) is not None
            and report.finding.severity >= finding.severity
            for code in (finding.code, *_EXPLAINED_BY.get(finding.code, ()))
            for source in ({_said(finding)[1]} if code is finding.code else ("param", "grad"))
            for name in (finding.name, "")
        )

    def end(self, rule: Hashable, name: str, step: int) -> None:
        """End what a rule has found in a tensor; the finding ends with its last tensor."""
        report = self._of.get((rule, name))
        if report is not None:
            self._remove(report, name, step)

    def keep(
        self,
        of: str,
        found: Iterable[Finding],
        step: int,
        group: Callable[[Sequence[Finding]], Groups],
    ) -> None:
        """Begin and end findings so that `found` are those of the rules called `of`."""
        wanted: dict[Hashable, dict[str, Finding]] = {}
        for finding in found:
            rule = (of, *_said(finding), finding.severity)
            wanted.setdefault(rule, {})[finding.name] = finding
        for (known, name), report in list(self._of.items()):
            is_of = isinstance(known, tuple) and known[0] == of and name in report.names
            if is_of and name not in wanted.get(known, ()):
                self._remove(report, name, step)
        for wanted_rule, findings in wanted.items():
            self.begin(wanted_rule, findings.values(), step, group)

    def forget(self, names: Collection[str], step: int) -> None:
        """End what has been found in tensors that exist no more."""
        for (_, name), report in list(self._of.items()):
            if name in names:
                self._remove(report, name, step)

    def end_all(self, step: int) -> None:
        for report in dict.fromkeys(self._of.values()):
            self._end(report, step)

    def _add(self, report: _Report, name: str) -> None:
        self._of[report.rule, name] = report
        self._said[(*_said(report.finding), name)] = report

    def _remove(self, report: _Report, name: str, step: int) -> None:
        report.names.discard(name)
        if not report.names or not name:
            self._end(report, step)
        else:
            self._drop(report, name)

    def _end(self, report: _Report, step: int) -> None:
        for name in [name for _, name in self._of]:
            self._drop(report, name)
        self._ended.append(dataclasses.replace(report.finding, end=step))
        self._news.append(self._ended[-1])

    def _drop(self, report: _Report, name: str) -> None:
        rule, said = (report.rule, name), (*_said(report.finding), name)
        if self._of.get(rule) is report:
            del self._of[rule]
        if self._said.get(said) is report:
            del self._said[said]


def each(found: Sequence[Finding]) -> Groups:
    """Report every finding."""
    return [(finding, {finding.name}) for finding in found]


def together(found: Sequence[Finding], plan: Plan, advice: str = "") -> Groups:
    """Report one finding instead of many.

    It is about the model if it is true of more than half of its weights, or of its parameters.
    Otherwise, it has the name of the first tensor.

    Args:
        found: the findings, in the order of the model.
        plan: of the entry.
        advice: what it means if it is true of the model; "" if that is the same.
    """
    if len(found) <= _MANY:
        return each(found)
    names = {finding.name for finding in found}
    weights = {name for name, w in zip(plan.names, plan.weights.tolist(), strict=True) if w}
    what, of = "parameters", int(plan.trainable.sum())
    if names <= weights:
        what, of = "weights", len(weights)
    is_wide = 2 * len(found) > of
    listed = ", ".join(one_line_name(finding.name) for finding in found[:_MAX_NAMES])
    if len(found) > _MAX_NAMES:
        listed += f" and {len(found) - _MAX_NAMES:,} more"
    first = min(found, key=order)
    if len({finding.message for finding in found}) == 1:
        message = f"{first.message}: {len(found):,} of {of:,} {what}: {listed}"
    else:
        label = one_line_name(first.name)
        message = (
            f"{len(found):,} of {of:,} {what}: {listed}; most affected: {label}: {first.message}"
        )
    whole = dataclasses.replace(
        first,
        name="" if is_wide else found[0].name,
        message=message,
        advice=advice if advice and is_wide else first.advice,
    )
    return [(whole, names)]


def order(finding: Finding) -> tuple[float, ...]:
    """Sort by severity, then by onset, parameters before gradients, then by how much."""
    step = finding.step or 0
    ratio = max(finding.value, 1 / finding.value) if finding.value > 0 else 0.0
    is_consequence = finding.code is not FindingCode.NONFINITE_GRADIENT
    return -finding.severity, step, is_consequence, finding.source != "param", -ratio


def _said(finding: Finding) -> tuple[FindingCode, str]:
    """Return what a finding says. An update is that of a parameter."""
    return finding.code, "param" if finding.source == "update" else finding.source
