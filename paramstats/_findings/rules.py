"""Run all rules of the health check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from paramstats._core.entries import Entry, entries
from paramstats._core.record import Record
from paramstats._findings.connections import lost_gradients
from paramstats._findings.context import Context, make_context
from paramstats._findings.files import advise_on_file
from paramstats._findings.findings import Finding, Findings
from paramstats._findings.gradients import gradient_sizes, nonfinite_gradients
from paramstats._findings.half_precision import half_precision_ranges
from paramstats._findings.parameters import (
    diverged_replicas,
    nonfinite_parameters,
    weight_values,
)
from paramstats._findings.rows import rows_and_distributions
from paramstats._findings.thresholds import Thresholds
from paramstats._findings.updates import (
    adam_state,
    forgotten_parameters,
    large_updates,
    lost_updates,
)

_RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (
    nonfinite_parameters,
    nonfinite_gradients,
    diverged_replicas,
    weight_values,  # a zero weight is the reason for a zero gradient
    lost_gradients,
    gradient_sizes,
    half_precision_ranges,
    rows_and_distributions,
    forgotten_parameters,
    large_updates,
    lost_updates,
    adam_state,
)


def find(record: Record, thresholds: Thresholds, every: Sequence[Entry] | None = None) -> Findings:
    """Return the findings of all rules, the most severe first, otherwise in the order of rules.

    `every` holds the entries of the record, if the caller has decoded them already.
    """
    if every is None:
        every = entries(record, with_state=False)
    context = make_context(record, thresholds, every)
    found = [finding for rule in _RULES for finding in rule(context)]
    if record.file is not None:
        found = [advise_on_file(finding, record.file) for finding in found]
    return Findings(sorted(found, key=lambda finding: -finding.severity))
