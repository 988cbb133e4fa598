"""Hypothesis strategies for tensors whose sums are numerically difficult."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from paramstats._core import states
from tests.dtypes import FLOATS, INTEGERS

_LEAST, _MOST = 1e-140, 1e140
"""The range of float64 elements in docs/accuracy.md: float64 holds their squares and their sums."""

_EDGES = [512, 2048, 4096, 8192, 16384, 4096 + 16384]
_CHUNKS = [states.CHUNK, 2 * states.CHUNK]


# ---- distributions ---------------------------------------------------------------------------
#
# Each function gives about n float64 numbers of size 1 or less, from a random generator `r` and a
# parameter `p` between 0 and 1.


def _normal(n, r, p):
    return r.standard_normal(n)


def _far_from_zero(n, r, p):
    """A mean of 1 and deviations from 1 down to 1e-16."""
    return 1 + 10.0 ** (-16 * p) * r.standard_normal(n)


def _one_magnitude(n, r, p):
    """Sums of a few elements always round in the same direction."""
    return (1 + p) * np.where(r.random(n) < r.random(), -1.0, 1.0)


def _periodic_signs(n, r, p):
    return (1 + p) * np.where(np.arange(n) % (2 + int(r.integers(0, 8))) == 0, -1.0, 1.0)


def _nearly_one_magnitude(n, r, p):
    return (1 + p) * (1 + 2.0**-23 * r.integers(-4, 5, n)) * r.choice([-1.0, 1.0], n)


def _mixed_magnitudes(n, r, p):
    return r.choice([-1.0, 1.0], n) * 10.0 ** r.uniform(-30 * p, 0, n)


def _cancelling(n, r, p):
    """Neighbours cancel except for a remainder."""
    half = r.standard_normal((n + 1) // 2)
    return np.stack([half, -half * (1 + 10.0 ** (-16 * p))], axis=1).ravel()[:n]


def _cancelling_far_apart(n, r, p):
    half = r.standard_normal((n + 1) // 2)
    return np.concatenate([half, -half[::-1] * (1 + 10.0 ** (-16 * p))])[:n]


def _outlier_first(n, r, p):
    x = 10.0 ** (-30 * p) * r.standard_normal(n)
    x[:1] = 1
    return x


def _outlier_last(n, r, p):
    return _outlier_first(n, r, p)[::-1]


def _outlier_in_every_block(n, r, p):
    x = 10.0 ** (-30 * p) * (1 + 0.1 * r.standard_normal(n))
    x[int(r.integers(0, max(n, 1))) % 4096 :: int(r.choice([4096, 16384, 131072]))] = 1
    return x


def _just_acceptable_pivots(n, r, p):
    """The means of neighbouring blocks differ by about a quarter of a standard deviation."""
    x = r.standard_normal(n)
    return x + 0.25 * (0.8 + 0.4 * p) * (np.arange(n) // 4096)


def _steps(n, r, p):
    return np.where(np.arange(n) // max(int(n * p), 1) % 2 == 0, 1.0, 10.0 ** (-12 * r.random()))


def _ramp(n, r, p):
    return (np.arange(n) + 1) / max(n, 1) - p


def _growing(n, r, p):
    return 10.0 ** (-30 * p * np.arange(n)[::-1] / max(n, 1)) * r.standard_normal(n)


def _mostly_zeros(n, r, p):
    return r.standard_normal(n) * (r.random(n) < p**4)


def _few_values(n, r, p):
    return r.choice(r.standard_normal(1 + int(3 * p)), n)


def _constant_but_one(n, r, p):
    x = np.full(n, 1 + p)
    x[int(r.integers(0, max(n, 1))) :][:1] *= 1 + 2.0 ** -int(r.integers(1, 53))
    return x


def rounds_one_way(n, step, period, signs, random) -> np.ndarray:
    """Elements near 1 whose float32 sum of squares is rounded in one direction at every addition.

    Args:
        n: number of elements.
        step: number of lanes; a lane adds up every `step`-th element.
        period: additions after which the pattern begins again.
        signs: every `signs`-th element is positive, the others are negative.
    """
    total, chosen = np.float32(0), []
    for _ in range(period):
        candidates = (1 + random.uniform(-0.2, 0.2, 400)).astype(np.float32)
        exact = total.astype(np.float64) + candidates.astype(np.float64) ** 2
        rounded = exact.astype(np.float32)
        best = np.argmax(rounded - exact)
        total = rounded[best]
        chosen.append(candidates[best])
    pattern = np.repeat(np.array(chosen, dtype=np.float64), step)
    return np.resize(pattern, n) * np.where(np.arange(n) % signs == 0, -1, 1)


def _rounding_one_way(n, r, p):
    step, period = int(r.choice([4, 8, 16, 32, 64])), int(r.choice([4, 8, 16]))
    return rounds_one_way(n, step, period, int(r.integers(2, 4)), r)


DISTRIBUTIONS = [
    _rounding_one_way,
    _normal,
    _far_from_zero,
    _one_magnitude,
    _periodic_signs,
    _nearly_one_magnitude,
    _mixed_magnitudes,
    _cancelling,
    _cancelling_far_apart,
    _outlier_first,
    _outlier_last,
    _outlier_in_every_block,
    _just_acceptable_pivots,
    _steps,
    _ramp,
    _growing,
    _mostly_zeros,
    _few_values,
    _constant_but_one,
]


# ---- tensors ------------------------------------------------------------------------------


def as_type(x: np.ndarray, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Numbers of size 1 as elements of a dtype; `scale` from 0 to 1 covers its range."""
    if dtype is torch.bool:
        return torch.from_numpy(x > 0)
    if dtype in INTEGERS:
        info = torch.iinfo(dtype)
        most = np.nextafter(float(info.max), 0) if info.bits == 64 else info.max
        x = np.clip(x * float(info.max) ** scale, info.min, most)
        return torch.from_numpy(x.astype(str(dtype).removeprefix("torch.")))
    info = torch.finfo(dtype)
    least, most = info.smallest_normal * info.eps, info.max
    if dtype is torch.float64:
        least, most = _LEAST, _MOST
    size = 10 ** (np.log10(least) + scale * (np.log10(most) - np.log10(least)))
    with np.errstate(over="ignore"):
        x = np.clip(x * size, -most, most)
    if dtype is torch.float64:
        x[np.abs(x) < _LEAST] = 0
    return torch.from_numpy(np.ascontiguousarray(x)).to(dtype)


@st.composite
def sizes(draw, chunks: bool = True) -> int:
    kind = draw(st.integers(0, 199))
    if kind == 0 and chunks:
        return draw(st.sampled_from(_CHUNKS)) + draw(st.integers(-3, 5000))
    if kind < 20:
        return draw(st.sampled_from(_EDGES)) + draw(st.integers(-70, 70))
    if kind < 80:
        return draw(st.integers(300, 3000))
    return draw(st.integers(1, 300))


@st.composite
def any_elements(draw) -> torch.Tensor:
    """Up to 40 numbers that hypothesis chooses one by one, perhaps repeated."""
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    width = 64 if dtype is torch.float64 else 32
    numbers = st.floats(width=width, allow_nan=False, allow_infinity=False)
    if width == 64:
        numbers = numbers.filter(lambda v: v == 0 or _LEAST < abs(v) < _MOST)
    elements = draw(st.lists(numbers, min_size=1, max_size=40))
    return torch.tensor(elements * draw(st.sampled_from([1, 1, 1, 7, 110])), dtype=dtype)


@st.composite
def shaped(draw, chunks: bool = True) -> torch.Tensor:
    # Half of the cases are float32, which uses the largest share of its bound.
    dtype = draw(st.sampled_from([torch.float32] * len(FLOATS + INTEGERS) + FLOATS + INTEGERS))
    shape = draw(st.sampled_from(DISTRIBUTIONS))
    n = draw(sizes(chunks))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Mostly the middle of the range of the dtype, where squares neither overflow nor underflow.
    scale = draw(st.one_of(st.just(0.55), st.floats(0, 1)))
    x = shape(n, random, draw(st.floats(0, 1)))
    return as_type(np.asarray(x, dtype=np.float64), dtype, scale)


@st.composite
def laid_out(draw, elements: st.SearchStrategy[torch.Tensor]) -> torch.Tensor:
    """Some of the tensors get gaps in memory or non-finite elements."""
    x = draw(elements)
    odd = draw(st.integers(0, 15))
    if odd == 0:
        wide = torch.ones(2 * len(x), dtype=x.dtype)
        wide[::2] = x
        return wide[::2]
    if odd == 1 and x.dtype.is_floating_point and len(x) > 1:
        every = draw(st.sampled_from([2, 3, 100, 4096]))
        bad = torch.tensor([torch.nan, torch.inf, -torch.inf]).to(x.dtype)
        bad = bad if x.dtype is not torch.float8_e4m3fn else bad[:1]  # it has no infinity
        x = x.clone()
        x[1::every] = bad.repeat(len(x))[: len(x[1::every])]
    elif odd == 2 and x.dtype.is_floating_point and len(x) > 1:
        x = x.clone()
        x[1 : draw(st.integers(1, len(x)))] = torch.nan
    return x


def tensors(chunks: bool = True) -> st.SearchStrategy[torch.Tensor]:
    """Adversarial tensors of every dtype, each with at least one finite element."""
    return laid_out(st.one_of(shaped(chunks), shaped(chunks), shaped(chunks), any_elements()))
