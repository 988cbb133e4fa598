"""Statistics of rows against float64 arithmetic, and rows that are dead or equal."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import paramstats
from tests.dtypes import DTYPES

summarize = paramstats.summarize


def read(x: torch.Tensor, **kwargs) -> paramstats.TensorStats:
    return summarize({"x": x}, rows=True, **kwargs)["x"]


def check(x: torch.Tensor, correction: float = 1.0) -> None:
    rows = read(x, correction=correction).rows
    values = x.to(torch.float64).reshape(x.shape[0], -1).numpy()
    n = values.shape[1]
    assert len(rows) == x.shape[0] and rows.row_numel == n
    finite = np.isfinite(values)
    arrays = {stat: getattr(rows, stat) for stat in ("mean", "std", "norm", "abs_max")}
    assert all(len(array) == len(rows) for array in arrays.values())
    assert rows.nonfinite_count.tolist() == (~finite).sum(1).tolist()
    assert rows.zero_count.tolist() == (values == 0).sum(1).tolist()
    for row, ok in enumerate(finite.all(1)):
        if not ok:
            assert all(math.isnan(array[row]) for array in arrays.values())
            continue
        own = values[row]
        rms = math.sqrt((own * own).mean())
        assert abs(arrays["mean"][row] - own.mean()) <= 1e-6 * rms
        assert abs(arrays["norm"][row] - np.linalg.norm(own)) <= 1e-6 * rms * math.sqrt(n)
        assert arrays["abs_max"][row] == np.abs(own).max()
        if n > correction:
            std = math.sqrt(((own - own.mean()) ** 2).sum() / (n - correction))
            assert abs(arrays["std"][row] - std) <= 1e-6 * rms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(backend, dtype):
    torch.manual_seed(0)
    x = torch.randn(17, 33) * 3 if dtype.is_floating_point else torch.randint(0, 100, (17, 33))
    check(x.to(dtype))


@pytest.mark.parametrize(
    "shape", [(1,), (5,), (3, 1), (1, 9), (4, 3, 2, 5), (3, 300_001), (70_000, 5), (600, 1000)]
)
def test_every_shape(backend, shape):
    torch.manual_seed(0)
    check(torch.randn(shape) + 10, correction=0)


def test_hard_rows(backend):
    torch.manual_seed(0)
    x = torch.randn(6, 1000)
    x[1] += 1e4
    x[2] = 0.1
    x[3, 5] = math.nan
    x[4, 7:9] = torch.tensor([math.inf, -math.inf])
    x[5] = 0
    check(x)
    check(x.t())
    check(x.double() * 1e120)
    assert read(x).rows.std[2] == 0


def test_rows_of_the_finite_elements(backend):
    torch.manual_seed(0)
    x = torch.randn(6, 50) + 3
    x[1, 4], x[2, 7:9] = math.nan, torch.tensor([math.inf, -math.inf])
    x[3], x[4] = math.nan, 0
    x[5, 1:] = math.inf
    stats = read(x, correction=1)
    rows = stats.finite.rows
    assert rows.nonfinite_count.tolist() == [0] * 6 and stats.rows.nonfinite_count[3] == 50
    for row in (0, 1, 2, 4):
        own = summarize({"x": x[row]})["x"].finite
        for stat in ("mean", "std", "norm", "abs_max", "zero_count"):
            assert getattr(rows, stat)[row] == pytest.approx(getattr(own, stat), abs=1e-6)
    assert math.isnan(rows.mean[3] + rows.std[3] + rows.abs_max[3]) and rows.norm[3] == 0
    assert math.isnan(rows.std[5]) and rows.mean[5] == x[5, 0] == rows.abs_max[5]
    assert rows.dead == stats.rows.dead == (4,) and rows.equal == stats.rows.equal
    assert rows != stats.rows and "NaN" in str(stats.rows) and "NaN" not in str(rows)
    clean = read(x[4:5] + 1)
    assert clean.finite.rows == clean.rows


def test_text(backend):
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, math.nan]])
    text = "5 rows of 2 elements, norm 0 to 5, 1 dead, 2 equal to another one, 1 with NaN or Inf"
    assert str(read(x).rows) == text and repr(read(x).rows) == f"<Rows: {text}>"
    assert str(read(x[4:]).rows) == "1 rows of 2 elements, 1 with NaN or Inf"


def test_dead_equal_and_text_need_no_numpy(monkeypatch):
    rows = read(torch.tensor([[0.0], [1.0], [1.0]])).rows
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert rows.dead == (0,) and rows.equal == ((1, 2),) and "1 dead" in str(rows)
    with pytest.raises(ImportError, match=r"paramstats: Rows.norm needs numpy: pip install numpy"):
        rows.norm  # noqa: B018


def test_tensors_without_elements(backend):
    for shape in ((0,), (0, 3), (4, 0)):
        assert read(torch.zeros(shape)).rows is None
    assert read(torch.tensor(1.0)).rows is None
    assert summarize({"x": torch.ones(2)})["x"].rows is None


def test_dead_and_equal_rows(backend):
    torch.manual_seed(0)
    for n in (3, 64, 1000, 300_000):
        x = torch.randn(12, n)
        x[[2, 5]] = 0
        x[5] = -0.0
        x[7] = x[11] = x[0]
        x[8] = x[1].flip(0)
        x[4, -1], x[9] = math.nan, x[4]
        x[9, -1] = math.nan
        rows = read(x).rows
        assert rows.dead == (2, 5) and rows.equal == ((0, 7, 11), (4, 9))
        assert read(x.t().contiguous().t()).rows.equal == rows.equal


def test_dead_units_are_found_by_index(backend):
    """A large negative bias keeps ReLU at zero, so that its units get no gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    dead, pruned = torch.randperm(64).split(40)
    dead, pruned = sorted(dead.tolist()), sorted(pruned[:5].tolist())
    with torch.no_grad():
        model[0].bias[dead] = -1e3
        model[0].weight[pruned], model[0].bias[pruned] = 0, 1
    model(torch.randn(256, 16)).square().mean().backward()
    summary = summarize(model, rows=True)
    weight, bias = summary["0.weight"], summary["0.bias"]
    assert list(weight.zero_rows) == list(weight.rows.dead) == pruned
    for grad in (weight.grad, bias.grad):
        assert list(grad.zero_rows) == list(grad.rows.dead) == dead
        assert np.flatnonzero(grad.rows.norm == 0).tolist() == dead
    assert summary["2.weight"].grad.zero_rows == ()
    transposed = summarize({"w": model[2].weight.grad.t()}, rows=True)["w"]
    assert list(transposed.rows.dead) == list(transposed.zero_rows) == dead  # their outputs
    assert summary.total.rows is None and summary.total.zero_rows is None


def test_tokens_with_equal_gradients_and_without_are_found_by_index(backend):
    model = nn.Embedding(12, 8)
    model(torch.tensor([3, 5, 5, 9])).sum().backward()  # 3 and 9 occur once, 5 twice
    with torch.no_grad():
        model.weight[[2, 7]] = model.weight[4].clone()
    entry = summarize(model, rows=True)["weight"]
    assert entry.rows.equal == ((2, 4, 7),) and entry.rows.dead == entry.zero_rows == ()
    assert entry.grad.rows.equal == ((3, 9),)
    unused = (0, 1, 2, 4, 6, 7, 8, 10, 11)
    assert entry.grad.rows.dead == entry.grad.zero_rows == unused
    assert entry.grad.rows.abs_max.tolist() == [0, 0, 0, 1, 0, 2, 0, 0, 0, 1, 0, 0]


def test_dead_experts_of_a_real_model_are_found_by_index(backend):
    """Mixtral stacks its experts in one parameter; two of eight get no token."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    layers = model.model.layers
    with torch.no_grad():
        # Of each pair of opposite rows one is positive, so that 1 and 6 are never among the top 2.
        router = layers[0].mlp.gate.weight
        router[[1, 6]] = 0
        router[[2, 4, 7]] = -router[[0, 3, 5]]
        for weight in layers[1].mlp.experts.parameters():
            weight[[2, 5]] = 0
    tokens = torch.randint(64, (4, 32))
    model(tokens, labels=tokens).loss.backward()
    summary = summarize(model, rows="experts")
    for layer, dead in ((0, (1, 6)), (1, (2, 5))):
        for name in ("gate_up_proj", "down_proj"):
            entry = summary[f"model.layers.{layer}.mlp.experts.{name}"]
            assert entry.shape[0] == len(entry.rows) == len(entry.grad.rows) == 8
            assert entry.grad.zero_rows == entry.grad.rows.dead == dead
            assert (entry.grad.rows.norm > 0).sum() == 6
            assert entry.zero_rows == entry.rows.dead == (dead if layer == 1 else ())


def test_squares_that_overflow(backend):
    x = torch.tensor([[1e200, -1e200, 3e180], [1e200, 1e200, 1e200]], dtype=torch.float64)
    rows = summarize({"x": x}, rows=True)["x"].rows
    assert rows.norm.tolist() == [math.inf, pytest.approx(3**0.5 * 1e200)]
    assert rows.std.tolist() == [math.inf, 0]


def test_rows_that_differ_in_signs_only_are_not_equal(backend):
    """With a hash of 33 bits, 4 pairs of 2^18 rows would be expected to be found equal."""
    torch.manual_seed(0)
    x = torch.randint(0, 2, (1 << 18, 64), dtype=torch.int8).mul_(2).sub_(1).to(torch.float32)
    assert read(x).rows.equal == ()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str
)
def test_the_largest_magnitude_of_zeros_has_no_sign(backend, dtype):
    for shape in ((3, 4), (20, 64), (2, 5000)):
        assert not np.signbit(read(torch.zeros(shape, dtype=dtype)).rows.abs_max).any()
