"""Six inputs that ordinary formulae get wrong, and how wrong: the README's table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import paramstats
from docs import blocks
from tests.accuracy.rational import exact, root

Statistics = tuple[float, float, float]
"""Mean, std at correction 0, norm."""


NASTY: dict[str, Callable[[], Tensor]] = {
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


def _by_sums(total: float, squares: float, n: int) -> Statistics:
    mean = total / n
    var = squares / n - mean * mean
    return mean, math.sqrt(var) if var >= 0 else math.nan, math.sqrt(squares)


def by_sums_of_squares(x: Tensor) -> Statistics:
    """In one read, in the precision that torch adds the type up in."""
    return _by_sums(x.sum().item(), (x * x).sum().item(), x.numel())


def by_wide_sums_of_squares(x: Tensor) -> Statistics:
    """The same on a float64 copy."""
    return by_sums_of_squares(x.double())


CONTESTANTS = {
    "paramstats": by_paramstats,
    "torch, in the tensor's type": by_torch,
    "sums of squares": by_sums_of_squares,
    "sums of squares, float64": by_wide_sums_of_squares,
}


def rows() -> Iterator[tuple[str, dict[str, Statistics]]]:
    """For each input the errors of each contestant: of the mean in parts of the root mean square,
    of std and norm in parts of themselves."""
    for name, make in NASTY.items():
        torch.manual_seed(0)
        x = make()
        truth = exact(x)
        std, rms = float(root(truth.m2 / truth.n)), float(root(truth.sum_sq / truth.n))
        norm = float(root(truth.sum_sq))
        errors = {}
        for contestant, figures_of in CONTESTANTS.items():
            got = figures_of(x)
            off = (abs(g - t) for g, t in zip(got, (float(truth.mean), std, norm), strict=True))
            errors[contestant] = tuple(o / of for o, of in zip(off, (rms, std, norm), strict=True))
        yield name, errors


def table() -> str:
    cells = (
        (name, *(", ".join(map(_shown, errors[contestant])) for contestant in CONTESTANTS))
        for name, errors in rows()
    )
    return blocks.table(("relative error of mean, std, norm", *CONTESTANTS), cells)


def _shown(error: float) -> str:
    if not math.isfinite(error):
        return "**lost**"
    text = f"{error:.0e}".replace("e-0", "e-").replace("e+00", "")
    return f"**{text}**" if error > 1e-2 else text
