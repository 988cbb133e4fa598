"""Distributions against integer arithmetic, numpy and conversions by torch."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

import paramstats
from paramstats._core.details import Distribution, merge_distributions
from paramstats._summary import record_of
from tests import oracle
from tests.dtypes import DTYPES, FLOATS

CASTS = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]

ERROR = 8.2e-6
"""The documented bound for kurtosis, as a share of it, and for skewness, of its square root."""


def read(x: torch.Tensor) -> paramstats.TensorStats:
    return paramstats.summarize({"x": x}, distribution=True)["x"]


def any_bits(dtype: torch.dtype, n: int) -> torch.Tensor:
    """Elements of all exponents, subnormal and non-finite ones included."""
    generator = torch.Generator().manual_seed(n)
    if dtype is torch.bool:
        return torch.rand(n, generator=generator) < 0.7
    size = torch.empty(0, dtype=dtype).element_size()
    x = torch.randint(0, 256, (n * size,), generator=generator).to(torch.uint8).view(dtype)
    x[: n // 5] = 0
    return x


def exponents(x: torch.Tensor) -> dict[tuple[bool, int], int]:
    """Count nonzero finite elements by sign and exponent, with exact fractions."""
    counts: dict[tuple[bool, int], int] = {}
    is_integer = not x.dtype.is_floating_point
    for value in (x if is_integer else x.to(torch.float64)).tolist():
        if value and math.isfinite(value):
            size = abs(Fraction(int(value) if is_integer else value))
            e = size.numerator.bit_length() - size.denominator.bit_length()
            e -= size < Fraction(2) ** e
            counts[value > 0, e] = counts.get((value > 0, e), 0) + 1
    return counts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 31, 3001])
def test_counts_are_integer_truth(backend, dtype, n):
    x = any_bits(dtype, n)
    histogram = read(x).histogram
    found = {}
    for sign, counts in ((False, histogram.negative), (True, histogram.positive)):
        pairs = zip(histogram.exponents, counts, strict=True)
        found |= {(sign, e): count for e, count in pairs if count}
    assert found == exponents(x)
    exact = oracle.exact(x)
    for name in ("count", "zero_count", "nan_count", "pos_inf_count", "neg_inf_count"):
        assert getattr(histogram, name) == getattr(exact, name)
    edges, counts = histogram.to_numpy()
    assert counts.sum() == exact.n and len(edges) == len(counts) + 1
    assert (np.diff(edges) > 0).all() and counts.dtype == np.int64


@pytest.mark.parametrize("e", [24, 53, 54, 62])
def test_integers_next_to_a_power_of_two(backend, e):
    x = torch.tensor([2**e - 1, 2**e, 2**e + 1, -(2**e) + 1, -(2**e)])
    histogram = read(x).histogram
    assert list(histogram.exponents) == [e - 1, e]
    assert (histogram.negative, histogram.positive) == ((1, 1), (1, 2))
    least = read(torch.tensor([-(2**63)])).histogram
    assert list(least.exponents) == [63] and least.negative == (1,)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_exported_bins_are_those_of_numpy(backend, dtype):
    x = any_bits(dtype, 4000)
    edges, counts = read(x).histogram.to_numpy()
    values = x.to(torch.float64).numpy()
    values = values[np.isfinite(values)]
    # numpy's bins have their lower edge; those of negative numbers here have the other one.
    expected = [np.histogram(np.abs(values[values < 0]), -edges[edges < 0][::-1])[0].sum()]
    expected += [np.histogram(values[values > 0], edges[edges > 0])[0].sum()]
    middle = len(counts) // 2
    assert [counts[:middle].sum(), counts[middle + 1 :].sum()] == expected
    assert counts[middle] == (values == 0).sum()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("max_bins", [3, 4, 64, 512, 10_000])
def test_neighboring_exponents_share_bins(dtype, max_bins):
    histogram = read(any_bits(dtype, 4000)).histogram
    edges, counts = histogram.to_numpy()
    merged_edges, merged = histogram.to_numpy(max_bins)
    assert len(merged) <= max_bins and len(merged_edges) == len(merged) + 1
    assert (np.diff(merged_edges) > 0).all() and set(merged_edges) <= set(edges)
    # The counts up to an edge do not change.
    positions = np.searchsorted(edges, merged_edges)
    assert np.diff(np.r_[0, counts.cumsum()][positions]).tolist() == merged.tolist()
    if len(counts) <= max_bins:
        assert len(merged) == len(counts)
    with pytest.raises(ValueError, match="max_bins to be 3 or more, got 2"):
        histogram.to_numpy(2)


@pytest.mark.parametrize("to", CASTS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0, 2.0**-20, 1e4])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_shares_are_those_of_a_conversion_within_the_bounds(backend, to, scale, spread):
    torch.manual_seed(0)
    x = torch.randn(20_000) * torch.exp(spread * torch.randn(20_000))
    x[:3] = torch.tensor([math.nan, math.inf, 0.0])
    histogram = read(x).histogram
    scaled = x.to(torch.float64) * scale
    cast = scaled.to(torch.float32).to(to).to(torch.float64)
    underflow = ((cast == 0) & (x != 0)).double().mean().item()
    over = x.isfinite() & ~(cast.abs() <= torch.finfo(to).max)
    if to is torch.float8_e4m3fn:  # versions of torch differ: larger numbers saturate or become NaN
        over = x.isfinite() & (scaled.abs() > 464)  # a tie, which is rounded to 448
    for kind, truth in (("underflow", underflow), ("overflow", over.double().mean().item())):
        least, most = getattr(histogram, f"{kind}_bounds")(to, scale)
        assert least <= truth <= most
        value = getattr(histogram, kind)(to, scale)
        assert least <= value <= most and abs(value - truth) <= most - least


@pytest.mark.parametrize("to", CASTS, ids=str)
def test_exact_limits(backend, to):
    info = torch.finfo(to)
    tiny = info.smallest_normal * info.eps  # the smallest subnormal
    x = torch.tensor([0.4 * tiny, tiny, tiny / 4, 1.0], dtype=torch.float64)
    histogram = read(x).histogram
    assert histogram.underflow_bounds(to) == (0.5, 0.5)
    assert histogram.underflow(to) == 0.5 and histogram.underflow(to, scale=4.0) == 0
    assert read(torch.tensor([1.0, info.max / 4])).histogram.overflow(to) == 0
    large = torch.tensor([1.0, -3.9 * info.max], dtype=torch.float64)
    assert read(large).histogram.overflow(to) == 0.5


def mx_truth(x: torch.Tensor) -> tuple[int, ...]:
    """The counts of `Distribution.mx`, element by element in exact arithmetic."""
    formats = [
        (2, Fraction(1, 4), Fraction(7), True),
        (8, Fraction(1, 2**10), Fraction(464), False),
        (15, Fraction(1, 2**17), Fraction(61440), True),
    ]
    values, out = x.to(torch.float64).tolist(), [0] * 6
    for begin in range(0, len(values), 32):
        block = [abs(Fraction(v)) for v in values[begin : begin + 32] if math.isfinite(v)]
        if not any(block):
            continue
        e = math.frexp(float(max(block)))[1] - 1
        for i, (most, flushed, saturated, has_tie) in enumerate(formats):
            unit = Fraction(2) ** (e - most)
            for size in block:
                y = size / unit
                out[2 * i] += 0 < y <= flushed
                out[2 * i + 1] += y >= saturated if has_tie else y > saturated
    return tuple(out)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shares_with_scales_per_block_are_exact(backend, dtype):
    torch.manual_seed(0)
    for x in (any_bits(dtype, 2001), (torch.randn(999) ** 5).to(dtype), torch.ones(40).to(dtype)):
        histogram = read(x).histogram
        names = ("float4_e2m1", "float8_e4m3fn", "float8_e5m2")
        shares = [getattr(histogram, k)(n, "mx") for n in names for k in ("underflow", "overflow")]
        assert shares == [count / x.numel() for count in mx_truth(x)]


HARD = {
    "normal": lambda: torch.randn(50_000),
    "large mean": lambda: 1e4 + torch.randn(300_000),
    "one outlier": lambda: torch.cat([torch.randn(70_000) * 1e-3, torch.tensor([1e3])]),
    "chunks with different means": lambda: (
        torch.randn(4, 140_000) + torch.tensor([[1e3], [-1e3], [0], [5]])
    ).flatten(),
    "exponential": lambda: torch.rand(50_000).log().double(),
    "large": lambda: 1e60 * torch.randn(1000).double(),
    "small": lambda: 1e-60 * torch.randn(1000).double(),
    "integers": lambda: torch.randint(-5, 100, (5000,)),
    "large integers": lambda: (1 << 60) + torch.randint(-(1 << 40), 1 << 40, (5000,)),
}


@pytest.mark.parametrize("name", HARD)
def test_skewness_and_kurtosis_are_within_their_bounds(backend, name):
    torch.manual_seed(0)
    x = HARD[name]()
    values = x.to(torch.float64).numpy().astype(np.longdouble)
    d = values - values.mean()
    m2, m3, m4 = ((d**k).mean() for k in (2, 3, 4))
    skewness, kurtosis = float(m3 / m2 ** np.longdouble(1.5)), float(m4 / m2**2)
    stats = read(x)
    assert abs(stats.kurtosis - kurtosis) <= ERROR * kurtosis
    assert abs(stats.skewness - skewness) <= ERROR * max(1, math.sqrt(kurtosis))
    assert stats.abs_mean == pytest.approx(float(np.abs(values).mean()), rel=1e-6)


def test_statistics_without_a_value_are_nan(backend):
    constant, tiny = torch.full((300_001,), 0.1), 1e-100 * torch.randn(100).double()
    for x in (constant, tiny, 1e100 * torch.randn(100).double(), torch.tensor([1.0, math.nan])):
        assert math.isnan(read(x).skewness) and math.isnan(read(x).kurtosis)
    # Rounded to 53 bits, they would have another spread.
    close = (1 << 60) + torch.randint(-300, 300, (5000,))
    assert math.isnan(read(close).kurtosis) and math.isnan(read(close).skewness)
    infinite = read(torch.tensor([1.0, 2.0, 4.0, math.inf]))
    assert infinite.abs_mean == math.inf and math.isnan(infinite.kurtosis)
    assert infinite.finite.abs_mean == pytest.approx(7 / 3) and infinite.finite.kurtosis > 1
    empty = read(torch.zeros(0))
    assert math.isnan(empty.abs_mean) and math.isnan(empty.histogram.quantile(0.5))
    not_asked = paramstats.summarize({"x": torch.ones(2)})["x"]
    assert not_asked.histogram is None and math.isnan(not_asked.abs_mean + not_asked.quantile(0.5))


QUANTILES = {
    "normal": lambda: torch.randn(3000),
    "uniform": lambda: torch.rand(999),
    "negative": lambda: -torch.rand(777) - 3,
    "half zeros": lambda: torch.randn(400).relu(),
    "zeros": lambda: torch.zeros(5),
    "one element": lambda: torch.tensor([-3.0]),
    "a gap": lambda: torch.tensor([1.0, 1024.0]),
    "two bins": lambda: torch.cat([torch.tensor([1.0]), torch.linspace(2, 3.9, 100)]),
    "both ends of float64": lambda: torch.tensor([-1.7e308, 5e-324, 1.7e308], dtype=torch.float64),
}


@pytest.mark.parametrize("name", QUANTILES)
def test_quantiles_are_within_a_factor_of_two(backend, name):
    torch.manual_seed(0)
    x = QUANTILES[name]()
    ordered, stats = x.double().sort().values.tolist(), read(x)
    qs = sorted([0, 1, 0.00999, *torch.rand(50).tolist(), *(k / 20 for k in range(20))])
    found = [stats.quantile(q) for q in qs]
    assert found == sorted(found) and found[0] == ordered[0] and found[-1] == ordered[-1]
    for q, value in zip(qs, found, strict=True):
        position = q * (len(ordered) - 1)
        low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
        part = position - math.floor(position)
        ends = [[x / 2 if (x > 0) == (k == 0) else 2 * x for x in (low, high)] for k in range(2)]
        least, most = (a * (1 - part) + b * part for a, b in ends)
        assert least <= value <= most or value == pytest.approx(low + (high - low) * part)
    if x.min() >= 1:
        exact = [torch.quantile(x.double(), q).item() for q in qs]
        assert all(0.5 < value / truth < 2 for value, truth in zip(found, exact, strict=True))


def test_quantiles_between_two_bins_are_interpolated(backend):
    assert read(torch.tensor([1.0, 1024.0])).quantile(0.5) == 512.5
    x = torch.cat([torch.tensor([1.0]), torch.linspace(2, 3.9, 100)])
    assert read(x).quantile(0.00999) == pytest.approx(1.999, rel=0.01)
    assert read(x).quantile(0.01) == pytest.approx(2, rel=0.01)


def test_wrong_arguments_have_clear_errors():
    stats = read(torch.randn(9))
    histogram, not_asked = stats.histogram, paramstats.summarize({"x": torch.ones(2)})["x"]
    for bad in (5, -0.1, math.nan):
        for quantile in (stats.quantile, histogram.quantile, not_asked.quantile):
            with pytest.raises(ValueError, match=r"Histogram: expected 0 <= q <= 1, got"):
                quantile(bad)
    for bad in (0, -1.0, math.inf, math.nan, "mxfp4"):
        with pytest.raises(ValueError, match='expected a finite number > 0 or "mx" for scale, got'):
            histogram.underflow("float16", bad)
    for call, expected in {
        lambda: histogram.underflow("float16", None): '0 or "mx" for scale, got None',
        lambda: histogram.below("a"): "expected a number for magnitude, got 'a'",
        lambda: histogram.quantile("a"): "expected 0 <= q <= 1, got 'a'",
        lambda: not_asked.quantile(None): "expected 0 <= q <= 1, got None",
        lambda: histogram.to_numpy("a"): "expected max_bins to be 3 or more, got 'a'",
        lambda: histogram.to_numpy(3.5): "expected max_bins to be 3 or more, got 3.5",
    }.items():
        with pytest.raises(TypeError, match=f"^paramstats.Histogram: .*{expected}"):
            call()


def test_share_below_a_magnitude(backend):
    histogram = read(torch.tensor([0.0, -1e-9, 0.5, -2.0, math.nan])).histogram
    assert [histogram.below(x) for x in (0.5, 2**-29, math.inf)] == [0.4, 0.4, 0.8]
    assert [histogram.below(x) for x in (0, -0.0, -1, -math.inf)] == [0.0] * 4
    assert math.isnan(histogram.below(math.nan))


def test_merged_parts_are_the_whole(backend):
    torch.manual_seed(0)
    parts = [torch.randn(3200) * 10.0**k + k for k in range(-3, 3)] + [torch.zeros(32)]
    summary = paramstats.summarize(
        {f"m{i % 2}.{i}": x for i, x in enumerate(parts)}, distribution=True
    )
    whole, total = read(torch.cat(parts)), summary.total
    assert total.histogram.positive == whole.histogram.positive
    assert total.histogram.negative == whole.histogram.negative
    assert total.histogram.underflow("float4_e2m1", "mx") == whole.histogram.underflow(
        "float4_e2m1", "mx"
    )
    assert total.kurtosis == pytest.approx(whole.kurtosis, rel=2 * ERROR)
    assert total.skewness == pytest.approx(whole.skewness, abs=2 * ERROR * whole.kurtosis**0.5)
    by_module = record_of(summary).by_module(1)
    packed = [by_module.details[row].distribution for row in range(2)]
    merged = merge_distributions(map(Distribution.unpack, packed))
    assert merged.n == whole.count
    scalars = summary.scalars(stats=("norm", "abs_mean", "kurtosis"))
    assert scalars["param_kurtosis/total"] == total.kurtosis
    assert scalars["param_abs_mean/m0.0"] == summary["m0.0"].abs_mean
    assert summary.to_dict()["total"]["skewness"] == total.skewness


def test_gradients_and_their_scale(backend):
    torch.manual_seed(0)
    w = torch.randn(64, 8, requires_grad=True)
    w.grad = torch.randn(64, 8)
    plain = paramstats.summarize({"w": w}, distribution=True, rows=True)["w"].grad
    with torch.no_grad():
        w.grad *= 1024
    scaled = paramstats.summarize({"w": w}, distribution=True, rows=True, grad_scale=1024.0)
    grad = scaled["w"].grad
    assert (grad.histogram.to_numpy()[0] == plain.histogram.to_numpy()[0]).all()
    assert grad.histogram.underflow("float8_e4m3fn") == plain.histogram.underflow("float8_e4m3fn")
    assert grad.quantile(0.3) == plain.quantile(0.3) and grad.abs_mean == plain.abs_mean
    assert grad.rows.norm.tolist() == plain.rows.norm.tolist()
    assert scaled.total.grad.histogram == grad.histogram


@pytest.mark.parametrize("grad_scale", [1024.0, 2.0**-70, 3.0, 1000.0])
def test_shares_with_scales_per_block_need_a_power_of_two_as_grad_scale(grad_scale):
    w = torch.ones(64, requires_grad=True)
    w.grad = torch.randn(64) * grad_scale
    histogram = paramstats.summarize({"w": w}, distribution=True, grad_scale=grad_scale)[
        "w"
    ].grad.histogram
    mx = [getattr(histogram, kind)("float4_e2m1", "mx") for kind in ("underflow", "overflow")]
    bounds = histogram.underflow_bounds("float4_e2m1", "mx")
    bounds += histogram.overflow_bounds("float4_e2m1", "mx")
    if math.frexp(grad_scale)[0] == 0.5:
        exact = [count / 64 for count in mx_truth(w.grad / grad_scale)[:2]]
        assert mx == exact and bounds == (exact[0], exact[0], exact[1], exact[1])
    else:
        assert all(map(math.isnan, (*mx, *bounds)))


def test_patterns_and_what_was_not_asked_for(backend, model):
    summary = paramstats.summarize(model, distribution="weight", rows=["^0"])
    assert summary["0.weight"].histogram and summary["0.weight"].grad.histogram
    assert summary["0.bias"].histogram is None and summary["0.bias"].rows is not None
    assert summary["2.weight"].rows is None and summary.total.histogram is None
    assert "param_skewness/0.bias" not in summary.scalars(stats="skewness")
    only = summary.filter("weight")
    assert only.total.histogram.count == only.total.count
    assert only["0.weight"] == summary["0.weight"]
    assert pickle.loads(pickle.dumps(summary)) == summary
    assert paramstats.summarize(model) != summary
    with pytest.warns(RuntimeWarning, match="no name matches rows="):
        paramstats.summarize(model, rows="nothing")
    for bad in (3, ["("]):
        with pytest.raises(Exception, match="distribution"):
            paramstats.summarize(model, distribution=bad)


def test_tensors_of_other_kinds(backend, new_warnings):
    sparse = torch.eye(6)[:, :4].to_sparse()
    tensors = {
        "coo": sparse,
        "csr": torch.eye(6)[:, :4].to_sparse_csr(),
        "scalar": torch.tensor(3.0),
        "transposed": torch.randn(7, 5).t(),
        "meta": torch.ones(3, device="meta"),
        "quantized": torch.quantize_per_tensor(torch.ones(3, 2), 0.5, 0, torch.qint8),
        "lazy": torch.nn.LazyLinear(3).weight,
        "complex": torch.ones(2, 2, dtype=torch.complex64),
    }
    with (
        pytest.warns(RuntimeWarning, match="complex numbers have no distribution"),
        pytest.warns(RuntimeWarning, match="complex numbers have no rows"),
    ):
        summary = paramstats.summarize(tensors, distribution=True, rows=True)
    for name in ("coo", "csr"):
        assert summary[name].histogram.positive == (4,) and summary[name].histogram.count == 24
        assert summary[name].rows.norm.tolist() == [1, 1, 1, 1, 0, 0]
        assert summary[name].zero_rows == summary[name].rows.dead == (4, 5)
    assert summary["scalar"].rows is None and summary["scalar"].histogram.count == 1
    assert summary["transposed"].rows.mean == pytest.approx(tensors["transposed"].mean(1).numpy())
    assert summary["meta"].histogram is None and summary["lazy"].histogram is None
    assert summary["quantized"].rows.mean.tolist() == [1, 1, 1]
    assert summary["complex"].histogram is None and summary["complex"].rows is None
    assert {"complex (distribution)", "complex (rows)"} <= summary.skipped.keys()
    assert summary.filter("complex").skipped == {
        name: why for name, why in summary.skipped.items() if name.startswith("complex")
    }
