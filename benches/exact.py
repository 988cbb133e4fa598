"""The statistics in float64 torch by their definition, and how far a contestant may be off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

Statistics = tuple[float | None, float | None, float | None, float | None]
"""mean, std, norm and zero fraction; None where a contestant does not give one."""

_CHUNK = 1 << 20
"""Elements that are widened to float64 at a time."""


@dataclass(frozen=True)
class Exact:
    """The statistics of one tensor."""

    mean: float
    std: float
    norm: float
    zero_fraction: float
    rms: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Tolerances:
    """Of the mean in parts of the root mean square, of std and norm in parts of themselves.

    Where a type rounds its own results it is off by `roundings` halves of its last place more.
    """

    mean: float
    std: float
    norm: float
    zero_fraction: float
    roundings: int


PARAMSTATS = Tolerances(mean=1e-6, std=1e-5, norm=1e-6, zero_fraction=0.0, roundings=0)
"""What it promises, for every type of element."""

TORCH = Tolerances(mean=1e-5, std=1e-4, norm=1e-2, zero_fraction=1e-6, roundings=2)
"""What torch's own operators keep to here: their results are rounded to the tensor's type, and on a
CPU `norm` adds the squares of 39 M elements (GPT-2's embedding) in float32: 0.2 % are missing."""


def exact(tensor: torch.Tensor) -> Exact:
    """Two passes; std with one degree of freedom less, as torch's."""
    n = tensor.numel()
    chunks = torch.split(tensor.detach().flatten(), _CHUNK)
    total = squares = zeros = 0.0
    for chunk in chunks:
        wide = chunk.double()
        total += wide.sum().item()
        squares += wide.square().sum().item()
        zeros += (wide == 0).sum().item()
    mean = total / n
    m2 = sum((chunk.double() - mean).square().sum().item() for chunk in chunks)
    return Exact(
        mean, math.sqrt(m2 / (n - 1)), math.sqrt(squares), zeros / n, math.sqrt(squares / n),
        tensor.dtype,
    )  # fmt: skip


def worst_errors(
    statistics: Mapping[str, Statistics], expected: Mapping[str, Exact], tolerances: Tolerances
) -> dict[str, float]:
    """The largest error of each statistic, in the units of `Tolerances`, over all tensors.

    Raises AssertionError with tensor and statistic where one is too large or a tensor is missing.
    """
    assert statistics.keys() == expected.keys(), statistics.keys() ^ expected.keys()
    worst: dict[str, float] = {}
    for name, (mean, std, norm, zero_fraction) in statistics.items():
        want = expected[name]
        rounding = tolerances.roundings * _last_place(want.dtype) / 2
        for statistic, got, right, unit, allowed in (
            ("mean", mean, want.mean, want.rms, tolerances.mean + rounding),
            ("std", std, want.std, want.std, tolerances.std + rounding),
            ("norm", norm, want.norm, want.norm, tolerances.norm + rounding),
            ("zero_fraction", zero_fraction, want.zero_fraction, 1.0, tolerances.zero_fraction),
        ):
            if got is None:
                continue
            off = abs(got - right)
            assert off <= allowed * unit, (
                f"{statistic} of '{name}': expected {right!r} +- {allowed * unit:.1e}, got {got!r}"
            )
            worst[statistic] = max(worst.get(statistic, 0.0), off / unit if off else 0.0)
    return worst


def _last_place(dtype: torch.dtype) -> float:
    """Of a type's own results. Those of a type of one byte are made in float32: torch has no mean
    of it."""
    return torch.finfo(
        dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32
    ).eps
