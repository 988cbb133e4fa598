"""The state of one tensor, computed with torch operators.

`exact` is the definition of the statistics. On a CPU, `quick` is tried first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paramstats._core.moments import Moments, merge

CHUNK = 1 << 17
"""Elements that a checkpoint's reader passes on at a time: a chunk of the native backend."""

_PART = 4 * CHUNK
"""Elements of a large tensor read at a time on a CPU: temporaries stay in its caches, and each
operator has enough work for several threads."""

_MIN_SUM_OF_SQUARES = 2e-33
"""Below this, a sum of squares in float32 may have lost digits to underflow. Above it, a chunk's
rounding errors, of at most 2^-149 each, are less than 1e-7 of the sum."""

MIN_SPREAD = {torch.float32: 1e-4, torch.float64: 1e-12}
"""Ratio std / mean below which the rounding of the mean (6e-8, 1e-16) shows in the std."""

_FAR = 10
"""Ratio mean / std above which the rounding of the mean is corrected."""

IN_FLOAT32 = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""The dtypes that are read in float32."""


def exact(x: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return the state of a real tensor along its last dimension, as float64 rows of `Moments`.

    Nothing is read on the host, so that an accelerator need not be waited for.

    Args:
        x: shape (n,), or (k, n) for the states of k tensors.
        counts: shape (k,): how many elements each tensor has; those after them must be NaN.
            None: all of them.
    """
    x = x.to(torch.float64)
    finite = x.isfinite()
    n = finite.sum(-1)
    divisor = n.clamp(min=1)
    values = x.where(finite, 0.0)
    low = x.where(finite, math.inf).amin(-1)
    high = x.where(finite, -math.inf).amax(-1)
    mean = values.sum(-1) / divisor
    # If the sum overflows, sum the elements divided by n. The mean of a constant is exact.
    mean = mean.where(mean.isfinite(), (values / divisor.unsqueeze(-1)).sum(-1))
    mean = low.where(low == high, mean)
    deviations = (x - mean.unsqueeze(-1)).where(finite, 0.0)
    shift = deviations.sum(-1)
    m2 = deviations.square().sum(-1)
    # Corrected two-pass algorithm: remove the error from rounding the mean, unless that overflows.
    correction = shift * (shift / divisor)
    m2 = (m2 - correction.where(correction.isfinite(), 0.0)).clamp(min=0.0)
    zeros, infs = (x == 0).sum(-1), ((x == math.inf).sum(-1), (x == -math.inf).sum(-1))
    nans, count = x.isnan().sum(-1), x.new_full(x.shape[:-1], x.shape[-1])
    if counts is not None:
        nans, count = nans - (count - counts), counts
    columns = (count, zeros, nans, *infs, mean, m2, low, high)
    return torch.stack([c.to(torch.float64) for c in columns], -1)


def quick(x: Tensor) -> Moments | None:
    """Return the state of a flat real tensor on a CPU, with as few operators as possible.

    Returns None where the precision or range of these operators does not suffice, or an element is
    not finite.
    """
    in_float32 = x.dtype in IN_FLOAT32
    if x.dtype is not torch.float32:
        x = x.to(torch.float32 if in_float32 else torch.float64)
    n = x.numel()
    low, high = (bound.item() for bound in x.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    buffer = torch.empty_like(x)
    # A sum of ones in float32 is exact up to 2^24, and faster than `count_nonzero`.
    zeros = int(torch.eq(x, 0, out=buffer).sum().item())
    if low == high:
        return Moments(n, zeros, 0, 0, 0, low, 0.0, low, high)
    mean = x.sum().item() / n
    m2 = torch.sub(x, mean, out=buffer).square_().sum().item()
    if not math.isfinite(m2):
        return None
    if m2 < n * _square(MIN_SPREAD[x.dtype] * mean) or (in_float32 and m2 < _MIN_SUM_OF_SQUARES):
        return None
    if m2 < n * _square(mean / _FAR):  # matters when parts are merged
        mean += (x - mean).sum().item() / n
    return Moments(n, zeros, 0, 0, 0, mean, m2, low, high)


def _square(x: float) -> float:
    return x * x  # x ** 2 would raise OverflowError instead of returning infinity


def of_complex(x: Tensor) -> Moments:
    """Return the state of complex numbers, whose std, norm and zero_fraction are torch's.

    Here, mean is the modulus of the mean, m2 the sum of squared distances from the mean, and min
    and max are those of the moduli.
    """
    x = x.to(torch.complex128)
    finite = x.isfinite()
    modulus = x.abs()
    nans = int((x.real.isnan() | x.imag.isnan()).sum())
    pos_infs = x.numel() - int(finite.sum()) - nans
    zeros = x.numel() - int(x.count_nonzero())
    values = x[finite]
    out = Moments(x.numel(), zeros, nans, pos_infs, 0)
    if values.numel() == 0:
        return out
    mean = values.mean()
    m2 = (values - mean).abs().square().sum().item()
    low, high = (bound.item() for bound in modulus[finite].aminmax())
    return out._replace(mean=mean.abs().item(), m2=m2, min=low, max=high)


def _in_memory_order(x: Tensor) -> Tensor:
    """Return the elements as a flat tensor in memory order; copies only if the tensor has gaps."""
    order = sorted(range(x.dim()), key=lambda d: x.stride(d), reverse=True)
    return x.permute(order).reshape(-1)


def flat(x: Tensor) -> Tensor:
    """Return the elements of a strided tensor as a flat one; a view unless the tensor has gaps."""
    return x.view(-1) if x.is_contiguous() else _in_memory_order(x)


def on_cpu(x: Tensor) -> Moments:
    """Return the state of a flat real tensor on the CPU."""
    n = x.numel()
    if n <= _PART:
        return _chunk(x) if n else Moments()
    return merge(*map(_chunk, x.split(_PART)))


def _chunk(x: Tensor) -> Moments:
    return quick(x) or from_row(exact(x).tolist())


def from_row(row: Sequence[float]) -> Moments:
    """Return the state in a row that `exact` returned, as a list."""
    n, zeros, nans, pos_infs, neg_infs, *rest = row
    return Moments(int(n), int(zeros), int(nans), int(pos_infs), int(neg_infs), *rest)
