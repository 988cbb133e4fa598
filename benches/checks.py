"""Checks that a contestant computed the right statistics, before it is timed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import paramstats
from benches.contestants import Statistics
from tests import oracle

_ORACLE_ELEMENTS = 1 << 20
"""Elements up to which paramstats is checked against the oracle: it needs 0.2 s for so many."""


def expected(tensors: Mapping[str, torch.Tensor]) -> dict[str, paramstats.TensorStats]:
    """Return what every contestant must compute: paramstats' results on the CPU.

    They are checked against the tests' oracle for tensors of up to a million elements. Larger ones
    are checked by comparing paramstats with torch, whose implementation is independent.
    """
    on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    summary = paramstats.summarize(on_cpu)
    for name, tensor in on_cpu.items():
        if tensor.numel() <= _ORACLE_ELEMENTS:
            oracle.check(summary[name], tensor)
    return dict(summary)


def check(
    statistics: Mapping[str, Statistics],
    expected: Mapping[str, paramstats.TensorStats],
    tolerance: float,
) -> None:
    """Raise AssertionError if a tensor is missing or a relative error exceeds `tolerance`.

    The error of the mean is relative to the root mean square.
    """
    assert statistics.keys() == expected.keys(), statistics.keys() ^ expected.keys()
    for name, (mean, std, norm, zero_fraction) in statistics.items():
        right = expected[name]
        for statistic, got, want, scale in (
            ("mean", mean, right.mean, right.rms),
            ("std", std, right.std, right.std),
            ("norm", norm, right.norm, right.norm),
            ("zero_fraction", zero_fraction, right.zero_fraction, right.zero_fraction),
        ):
            assert got is None or abs(got - want) <= tolerance * scale, (
                f"{statistic} of '{name}': expected {want!r}, got {got!r}; the largest accepted "
                f"error is {tolerance * scale:.1e}"
            )
