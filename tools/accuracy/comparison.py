"""Errors of paramstats and of common formulae on six difficult inputs, for docs/semantics.md."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import paramstats
from docs import blocks
from tests.oracle import exact, root

Statistics = tuple[float, float, float]
"""Mean, std with correction 0, norm."""

INPUTS: dict[str, Callable[[], Tensor]] = {
    "a LayerNorm weight: 1 + 1e-4 N(0, 1), 768": lambda: 1 + 1e-4 * torch.randn(768),
    "N(1000, 0.02), 16.8 M": lambda: 1000 + 0.02 * torch.randn(1 << 24),
    "an embedding: N(0, 0.02), 38.6 M": lambda: 0.02 * torch.randn(768 * 50257),
    "small gradients: 1e-24 N(0, 1), 1 M": lambda: 1e-24 * torch.randn(1 << 20),
    "exploded gradients: 1e20 N(0, 1), 1 M": lambda: 1e20 * torch.randn(1 << 20),
    "bfloat16, N(1, 0.01), 1 M": lambda: (1 + 0.01 * torch.randn(1 << 20)).to(torch.bfloat16),
}


def by_paramstats(x: Tensor) -> Statistics:
    stats = paramstats.summarize({"x": x}, correction=0)["x"]
    return stats.mean, stats.std, stats.norm


def by_torch(x: Tensor) -> Statistics:
    return x.mean().item(), x.std(correction=0).item(), x.norm().item()


def by_sums_of_squares(x: Tensor) -> Statistics:
    """One read, in the precision in which torch adds up the dtype."""
    total, squares, n = x.sum().item(), (x * x).sum().item(), x.numel()
    mean = total / n
    var = squares / n - mean * mean
    return mean, math.sqrt(var) if var >= 0 else math.nan, math.sqrt(squares)


METHODS = {
    "paramstats": by_paramstats,
    "torch, in the tensor's dtype": by_torch,
    "sums of squares": by_sums_of_squares,
    "sums of squares, float64": lambda x: by_sums_of_squares(x.double()),
}


def errors(x: Tensor) -> dict[str, Statistics]:
    """By method: the error of the mean relative to rms, those of std and norm to themselves."""
    truth = exact(x)
    expected = tuple(map(float, (truth.mean, root(truth.m2 / truth.n), root(truth.sum_sq))))
    scales = (float(root(truth.sum_sq / truth.n)), *expected[1:])
    out = {}
    for method, compute in METHODS.items():
        parts = zip(compute(x), expected, scales, strict=True)
        mean, std, norm = (abs(got - right) / scale for got, right, scale in parts)
        out[method] = mean, std, norm
    return out


def table() -> str:
    """Errors above 1 % are bold."""
    rows = []
    for name, make in INPUTS.items():
        torch.manual_seed(0)
        cells = [", ".join(map(_format, found)) for found in errors(make()).values()]
        rows.append((name, *cells))
    return blocks.table(("relative error of mean, std, norm", *METHODS), rows)


def _format(error: float) -> str:
    if not math.isfinite(error):
        return "**lost**"
    text = f"{error:.0e}".replace("e-0", "e-").replace("e+00", "")
    return f"**{text}**" if error > 1e-2 else text
