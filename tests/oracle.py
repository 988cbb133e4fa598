"""What the statistics must be: numpy's extended precision over the elements, by the textbook."""

from __future__ import annotations

import math

import numpy as np
import torch

from paramstats import TensorStats

NORM_TOLERANCE = 1e-6  # of the norm; the mean's is the same share of the root mean square
STD_TOLERANCE = 1e-5  # of the std; docs/accuracy.md derives less


def elements(tensor: torch.Tensor) -> np.ndarray:
    """All logical elements, exactly, in extended precision."""
    dense = tensor.detach()
    if dense.is_quantized:
        dense = dense.dequantize()
    if dense.layout is not torch.strided:
        dense = dense.to_dense()
    if dense.dtype in (torch.int64, torch.uint64):
        return dense.numpy().astype(np.longdouble).ravel()
    return dense.to(torch.float64).numpy().astype(np.longdouble).ravel()


def check(stats: TensorStats, tensor: torch.Tensor, correction: float = 1) -> None:
    """Asserts every statistic of `stats` against the elements of a real tensor."""
    x = elements(tensor)
    counts = {
        "count": x.size,
        "zero_count": int((x == 0).sum()),
        "nan_count": int(np.isnan(x).sum()),
        "pos_inf_count": int(np.isposinf(x).sum()),
        "neg_inf_count": int(np.isneginf(x).sum()),
    }
    assert {name: getattr(stats, name) for name in counts} == counts
    assert stats.nonfinite_count == sum(counts[n] for n in list(counts)[2:])
    if x.size:
        assert stats.zero_fraction == counts["zero_count"] / x.size
    _check_values(stats.finite, x[np.isfinite(x)], correction)
    if np.isfinite(x).all():
        _check_values(stats, x, correction)


def _check_values(stats: TensorStats, x: np.ndarray, correction: float) -> None:
    assert stats.count == x.size
    if x.size == 0:
        assert stats.norm == 0
        for name in ("mean", "std", "var", "rms", "min", "max", "abs_max", "zero_fraction"):
            assert math.isnan(getattr(stats, name)), name
        return
    mean = x.mean()
    m2 = np.square(x - mean).sum()
    rms = float(np.sqrt(np.square(x).mean()))
    assert (stats.min, stats.max) == (float(x.min()), float(x.max()))
    assert stats.abs_max == float(np.abs(x).max())
    assert abs(stats.mean - float(mean)) <= NORM_TOLERANCE * rms
    assert abs(stats.rms - rms) <= NORM_TOLERANCE * rms
    norm = float(np.sqrt(np.square(x).sum()))
    assert abs(stats.norm - norm) <= NORM_TOLERANCE * norm
    if x.size <= correction:
        assert math.isnan(stats.std) or math.isinf(stats.std)
        return
    var = float(m2 / (np.longdouble(x.size) - correction))
    if x.min() == x.max():
        assert stats.std == 0
    else:
        assert abs(stats.std - math.sqrt(var)) <= STD_TOLERANCE * math.sqrt(var)
        assert abs(stats.var - var) <= 2 * STD_TOLERANCE * var
