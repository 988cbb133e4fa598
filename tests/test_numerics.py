"""Statistics against the oracle: hard data, every dtype, every size where the code changes path."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import paramstats
from paramstats._core import backend as backends
from paramstats._core import states
from paramstats._core.entries import entries
from paramstats._summary import record_of
from tests import oracle
from tests.dtypes import FLOATS, INTEGERS
from tools.accuracy.bound import state_of

BLOCK, PART, CHUNK = 16384, 4096, states.CHUNK
SIZES = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129]
SIZES += [PART - 1, PART, PART + 1, BLOCK, PART + BLOCK - 1, PART + BLOCK, PART + BLOCK + 1]
CHUNK_SIZES = [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77]


def stats_of(tensor: torch.Tensor, **kwargs) -> paramstats.TensorStats:
    return paramstats.summarize({"x": tensor}, **kwargs)["x"]


def outlier(n: int, position: int) -> torch.Tensor:
    x = torch.full((n,), 1e-6) * (1 + 0.1 * torch.randn(n))
    x[position] = 1e6
    return x


HARD = {
    "layer norm weight": lambda: 1 + 1e-4 * torch.randn(768),
    "long layer norm weight": lambda: 1 + 1e-4 * torch.randn(300_000),
    "N(1000, 0.02)": lambda: 1000 + 0.02 * torch.randn(400_000),
    "N(-1e6, 1)": lambda: -1e6 + torch.randn(300_000),
    "a constant": lambda: torch.full((200_001,), 0.1),
    "1e30": lambda: 1e30 * torch.randn(200_000),
    "1e-30": lambda: 1e-30 * torch.randn(200_000),
    "3e38": lambda: torch.tensor([3e38, -3e38, 3.4e38] * 1000),
    "outlier first": lambda: outlier(200_000, 0),
    "outlier last": lambda: outlier(200_000, -1),
    "outlier in the middle": lambda: outlier(200_000, 77_777),
    "subnormals": lambda: torch.randint(-5, 6, (5000,)) * 2.0**-149,
    "subnormals among ones": lambda: torch.where(torch.rand(5000) < 0.5, 2.0**-149, 1.0),
    "alternating blocks": lambda: (
        torch.randn(100, 1024) + 1e3 * (torch.arange(100) % 2)[:, None]
    ).flatten(),
    "a ramp": lambda: torch.arange(500_000, dtype=torch.float32),
    "mostly zeros": lambda: torch.randn(300_000) * (torch.rand(300_000) < 0.01),
    "all zeros": lambda: torch.zeros(5000),
    "negative zeros": lambda: torch.zeros(5000).neg(),
    "one 1e-20 among 1e18": lambda: torch.cat([torch.full((2000,), 1e18), torch.tensor([1e-20])]),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_data(backend, name):
    torch.manual_seed(0)
    x = HARD[name]()
    oracle.check(stats_of(x), x)


@pytest.mark.parametrize("n", SIZES + CHUNK_SIZES)
def test_every_size(backend, n):
    torch.manual_seed(n)
    x = 0.02 * torch.randn(n) + 0.01
    oracle.check(stats_of(x), x)


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
@pytest.mark.parametrize("n", [0, 1, 5, 63, 1025, CHUNK + 3])
def test_every_dtype(backend, dtype, n):
    torch.manual_seed(n)
    if dtype in FLOATS:
        x = (3 * torch.randn(n)).to(dtype)
    else:
        low = 0 if dtype in (torch.bool, torch.uint8) or "uint" in str(dtype) else -100
        x = torch.randint(low, 2 if dtype is torch.bool else 101, (n,)).to(dtype)
    oracle.check(stats_of(x), x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_non_finite_values(backend, dtype):
    torch.manual_seed(0)
    for position in (0, 1, 1500, 4999):
        for values in ([math.nan], [math.inf], [-math.inf], [math.nan, math.inf, -math.inf]):
            x = torch.randn(5000).to(dtype).to(torch.float64)
            x[position : position + len(values)] = torch.tensor(values[: 5000 - position]).double()
            oracle.check(stats_of(x.to(dtype)), x.to(dtype))  # e4m3fn has no infinity: NaN


def test_non_finite_values_propagate_as_in_torch(backend):
    x = torch.tensor([1.0, -2.0, math.inf])
    stats = stats_of(x)
    assert stats.mean == x.mean().item() == math.inf
    assert stats.norm == x.norm().item() == math.inf
    assert math.isnan(stats.std) and math.isnan(x.std().item())
    assert (stats.min, stats.max, stats.abs_max) == (-2.0, math.inf, math.inf)
    both = stats_of(torch.tensor([math.inf, -math.inf]))
    assert math.isnan(both.mean) and (both.min, both.max) == (-math.inf, math.inf)
    assert (stats_of(torch.tensor([math.inf] * 3)).min) == math.inf
    bad = stats_of(torch.tensor([1.0, math.nan, math.inf, 0.0]))
    assert all(math.isnan(getattr(bad, s)) for s in ("mean", "std", "norm", "min", "max", "rms"))
    assert (bad.zero_fraction, bad.zero_count, bad.nonfinite_count) == (0.25, 1, 2)
    assert (bad.finite.mean, bad.finite.norm, bad.finite.max) == (0.5, 1.0, 1.0)


def test_statistics_of_four_elements_computed_by_hand(backend):
    stats = stats_of(torch.tensor([3.0, -4.0, 0.0, 1.0]))
    assert (stats.count, stats.zero_count, stats.zero_fraction) == (4, 1, 0.25)
    assert (stats.mean, stats.min, stats.max, stats.abs_max) == (0.0, -4.0, 3.0, 4.0)
    assert stats.norm == pytest.approx(math.sqrt(26), rel=1e-15)
    assert stats.var == pytest.approx(26 / 3, rel=1e-15)
    assert stats.rms == pytest.approx(math.sqrt(6.5), rel=1e-15)


@pytest.mark.filterwarnings("ignore:std")  # torch warns if correction >= elements
@pytest.mark.parametrize("correction", [0, 1, 2, 0.5, 5, 7])
def test_correction_means_the_same_as_in_torch(backend, correction):
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    expected = x.std(correction=correction).item()
    assert stats_of(x, correction=correction).std == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("correction", [-1e300, -1e9, 1e-300, 999.9999999999, 2**52 + 1, 1e300])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_extreme_corrections(backend, correction, scale):
    x = scale * torch.randn(1000)
    oracle.check(stats_of(x, correction=correction), x, correction)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-154, 3.0, 1e150, 1e155, 1e162, 1e300])
def test_extreme_grad_scales(backend, scale):
    """The square of the scale leaves the range of float64, the statistics do not."""
    torch.manual_seed(0)
    w = torch.zeros(1000, requires_grad=True)
    w.grad = 1 + torch.randn(1000)
    exact = oracle.exact(w.grad)
    std, norm = oracle.root(exact.m2 / (exact.n - 1)), oracle.root(exact.sum_sq)
    expected = {"mean": exact.mean, "std": std, "norm": norm, "max": Fraction(exact.max)}
    expected = {stat: float(value / Fraction(scale)) for stat, value in expected.items()}
    summary = paramstats.summarize({"a.w": w}, grad_scale=scale)
    history = paramstats.History()
    history.append(0, summary)
    for stat, value in expected.items():
        shown = {
            "entry": getattr(summary["a.w"].grad, stat),
            "finite": getattr(summary["a.w"].grad.finite, stat),
            "total": getattr(summary.total.grad, stat),
            "scalars": summary.scalars(stats=stat)[f"grad_{stat}/a.w"],
            "scalars of modules": summary.scalars(stats=stat, depth=1)[f"grad_{stat}/a"],
            "dict": summary.to_dict()["params"]["a.w"]["grad"][stat],
            "table of statistics": getattr(entries(record_of(summary))[0].grad, stat),
            "history": getattr(history["a.w"].grad, stat)[0],
        }
        assert shown == pytest.approx(dict.fromkeys(shown, value), rel=1e-6)
    row = summary.table(kind="grad").splitlines()[-1].split()
    assert float(row[4]) == pytest.approx(expected["norm"], rel=1e-3)


@pytest.mark.parametrize("value", [0.1, 1e-40, 3e38, -7.0, 1e-300])
def test_std_of_a_constant_is_exactly_zero(backend, value):
    x = torch.full((300_000,), value, dtype=torch.float64 if value == 1e-300 else torch.float32)
    stats = stats_of(x)
    assert stats.std == 0 and stats.mean == x[0].item()


@pytest.mark.parametrize("e", [30, 40, 44])
def test_integers_far_from_zero(backend, e):
    torch.manual_seed(0)
    x = torch.randint(0, 3, (1000,)) + 2**e  # one block: merging blocks rounds their means
    oracle.check(stats_of(x), x)


def test_equal_magnitudes_of_both_signs(backend):
    x = torch.ones(4095) * 1.8237813583927718
    x[:2047] *= -1
    oracle.check(stats_of(x), x)


def test_float64_near_its_limits(backend):
    x = torch.tensor([1.7e308, -1.7e308, 1.7e308], dtype=torch.float64)
    stats = stats_of(x)
    assert stats.mean == pytest.approx(1.7e308 / 3) and stats.norm == math.inf  # as in torch
    assert (stats.nonfinite_count, stats.max) == (0, 1.7e308)


def test_every_simd_level(simd_level):
    torch.manual_seed(0)
    for make in HARD.values():
        x = make()
        oracle.check(stats_of(x), x)
    for dtype in FLOATS + INTEGERS[:-1]:
        x = torch.randint(0, 100, (3000,)).to(dtype)
        oracle.check(stats_of(x), x)


@given(
    st.lists(st.floats(width=32), min_size=0, max_size=200),
    st.integers(0, 3),
)
def test_any_floats(data, offset):
    x = torch.tensor(data, dtype=torch.float32)[offset:]
    for name in ("native", "reference"):
        try:
            chosen = backends.choose(name)
        except RuntimeError:
            continue  # the native backend is not installed
        oracle.check(oracle.stats_of(state_of(chosen, x)), x)
        assert chosen.name == name


@pytest.mark.huge
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_more_than_two_to_the_31_elements(native, dtype):
    n = 2**31 + 5
    x = torch.zeros(n, dtype=dtype)
    x[-5:] = 2
    stats = stats_of(x)
    assert (stats.count, stats.zero_count, stats.max, stats.min) == (n, 2**31, 2.0, 0.0)
    assert stats.norm == pytest.approx(math.sqrt(20), rel=1e-12)
    assert stats.mean == pytest.approx(10 / n, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_with_different_means_far_from_zero(backend, dtype):
    """Rounding of a chunk's mean is visible in the std if chunks differ mostly in their means."""
    torch.manual_seed(0)
    for _ in range(2):
        level = (1e3 + torch.rand(4)).repeat_interleave(CHUNK)
        x = (level + 0.12 * torch.randn(4 * CHUNK)).to(dtype)
        oracle.check(stats_of(x), x)
