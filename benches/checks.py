"""Checks that a contestant computed the right statistics, before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import paramstats
from benches.contestants import TOTALS, Contestant, Found, Statistics, each_tensor, is_gradient
from tests import oracle

Expected = dict[str, paramstats.TensorStats]

_ORACLE_ELEMENTS = 1 << 20
"""Elements up to which paramstats is checked against the oracle: it needs 0.2 s for so many."""

_ORACLE_TENSORS = 2000
"""Number of tensors that are checked against the oracle: it needs 0.4 ms for a small one."""

_MERGED = 1e-5
"""Largest relative error of a total."""


def expected(tensors: Mapping[str, torch.Tensor]) -> Expected:
    """Return what every contestant must compute: paramstats' results on the CPU.

    They are checked against the tests' oracle for tensors of up to a million elements, and at most
    2,000 of them. The others are checked by comparing paramstats with torch, whose implementation
    is independent. Totals of more than a million elements are checked against the statistics of
    the tensors.
    """
    on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    found = dict(paramstats.summarize(on_cpu))
    for name in list(on_cpu)[:: 1 + len(on_cpu) // _ORACLE_TENSORS]:
        if on_cpu[name].numel() <= _ORACLE_ELEMENTS:
            oracle.check(found[name], on_cpu[name])
    totals: Expected = {}
    for total in TOTALS:
        group = {n: t for n, t in on_cpu.items() if is_gradient(n) == is_gradient(total)}
        if group:
            totals[total] = paramstats.summarize(group).total
            _check_total(totals[total], list(group.values()), [found[name] for name in group])
    return {**found, **totals}


def _check_total(
    total: paramstats.TensorStats,
    tensors: Sequence[torch.Tensor],
    parts: Sequence[paramstats.TensorStats],
) -> None:
    """Check the statistics of all tensors together."""
    if total.count <= _ORACLE_ELEMENTS:
        oracle.check(total, torch.cat([tensor.flatten() for tensor in tensors]))
        return
    n = sum(tensor.numel() for tensor in tensors)
    assert total.count == n
    assert total.zero_count == sum(part.zero_count for part in parts)
    norm = math.hypot(*(part.norm for part in parts))
    assert abs(total.norm - norm) <= _MERGED * norm
    mean = math.fsum(part.count * part.mean for part in parts) / n
    assert abs(total.mean - mean) <= _MERGED * total.rms
    std = math.sqrt((norm**2 - n * mean**2) / (n - 1))
    assert abs(total.std - std) <= _MERGED * total.rms


def check(
    found: Found,
    expected: Expected,
    tolerance: float,
    required: Callable[[str], bool] = each_tensor,
    repeats: int = 1,
) -> None:
    """Raise AssertionError if a statistic is missing or a relative error exceeds `tolerance`.

    The error of the mean is relative to the root mean square. If tensors repeat those of
    `expected`, `repeats` is how often.
    """
    missing = set(filter(required, expected)) - found.keys()
    unknown = found.keys() - expected.keys()
    assert not missing and not unknown, f"missing: {missing}, unknown: {unknown}"
    for name, values in found.items():
        right = expected[name]
        for statistic, got in Statistics(*values)._asdict().items():
            want = getattr(right, statistic)
            if statistic == "norm":
                want *= math.sqrt(repeats)
            largest = tolerance * (right.rms if statistic == "mean" else abs(want))
            assert got is None or abs(got - want) <= largest, (
                f"{statistic} of '{name}': expected {want!r}, got {got!r}; the largest accepted "
                f"error is {largest:.1e}"
            )


def checked_call(
    contestant: Contestant, model: nn.Module, expected: Expected, repeats: int = 1
) -> Callable[[], Any]:
    """Return a contestant's call to be timed, after a check of its result."""
    arguments = contestant.arguments(model)
    found = contestant.statistics(contestant.run(*arguments), *arguments[1:])
    check(found, expected, contestant.tolerance, contestant.required, repeats)
    return contestant.call(model)
