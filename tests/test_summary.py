"""What the caller holds: a read-only mapping with tables, scalars and copies."""

from __future__ import annotations

import copy
import json
import math
import pickle
import sys
from collections.abc import Mapping

import pytest
import torch

import paramstats

summarize = paramstats.summarize


def test_it_is_a_mapping(backend, model):
    summary = summarize(model)
    assert isinstance(summary, Mapping)
    assert list(summary) == list(summary.keys()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert len(summary) == 4 and "0.weight" in summary and "weight" not in summary
    assert [entry.name for entry in summary.values()] == list(summary)
    assert summary.get("nothing") is None
    with pytest.raises(TypeError):
        summary["0.weight"] = 1  # type: ignore[index]


def test_an_entry_says_what_it_is(backend, model):
    model[0].bias.requires_grad_(False)
    entry = summarize(model)["0.bias"]
    assert (entry.name, entry.shape, entry.dtype) == ("0.bias", (6,), torch.float32)
    assert (entry.device, entry.requires_grad) == (torch.device("cpu"), False)
    assert (entry.aliases, entry.kind) == ((), "param")


def test_the_closest_name_is_named(backend, model):
    with pytest.raises(KeyError, match=r"no parameter '0.weigth' among 4; did you mean '0.weight'"):
        summarize(model)["0.weigth"]


def test_it_is_a_snapshot(backend, model):
    summary = summarize(model)
    before = summary["0.weight"].mean
    with torch.no_grad():
        model[0].weight.add_(100)
    model.zero_grad()
    assert summary["0.weight"].mean == before and summary["0.weight"].grad is not None


def test_total_is_all_as_one(backend, model):
    total = summarize(model).total
    everything = torch.cat([p.flatten() for p in model.parameters()]).double()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    for stats, x in ((total, everything), (total.grad, gradients)):
        assert stats.count == x.numel()
        assert stats.mean == pytest.approx(x.mean().item(), abs=1e-7)
        assert stats.std == pytest.approx(x.std().item(), rel=1e-6)
        assert stats.norm == pytest.approx(x.norm().item(), rel=1e-6)
        assert (stats.min, stats.max) == (x.min().item(), x.max().item())


def test_scalars(backend, model):
    summary = summarize(model)
    scalars = summary.scalars()
    assert len(scalars) == 2 * 4 * (4 + 1)
    assert all(type(value) is float for value in scalars.values())
    assert scalars["grad_norm/0.weight"] == summary["0.weight"].grad.norm
    assert scalars["param_zero_fraction/total"] == summary.total.zero_fraction
    composer = summary.scalars(key="l2_norm/{kind}/{name}", stats=("norm",), totals=False)
    assert next(iter(composer)) == "l2_norm/param/0.weight" and len(composer) == 8
    assert composer["l2_norm/grad/2.bias"] == summary["2.bias"].grad.norm
    counts = summary.scalars(stats=("nan_count", "count"), totals=False)
    assert counts["param_nan_count/0.bias"] == 0.0 and counts["grad_count/0.bias"] == 6.0
    assert summary.scalars(stats="norm", totals=False).keys() == {
        f"{kind}_norm/{name}" for kind in ("param", "grad") for name in summary
    }


def test_scalars_without_gradients(backend):
    assert list(summarize(torch.nn.Linear(2, 2)).scalars(stats=("mean",))) == [
        "param_mean/weight",
        "param_mean/bias",
        "param_mean/total",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stats": ("median",)}, "expected stats out of count, mean.*got 'median'"),
        ({"key": "{name}/{layer}"}, "got 'layer' in"),
        ({"key": "{name}"}, "a key for each statistic"),
        ({"key": "{kind}/{stat}"}, "a key for each statistic"),
    ],
)
def test_bad_scalars(backend, model, arguments, message):
    with pytest.raises(ValueError, match=f"^paramstats.scalars: .*{message}"):
        summarize(model).scalars(**arguments)


def test_a_parameter_called_total(backend):
    summary = summarize({"total": torch.ones(2)})
    with pytest.raises(ValueError, match="totals=False where a parameter is called 'total'"):
        summary.scalars()
    assert summary.scalars(totals=False)["param_mean/total"] == 1.0


def test_to_dict_survives_json(backend):
    summary = summarize(
        {"bad": torch.tensor([math.nan, 1.0]), "inf": torch.tensor([math.inf, 1.0])}
    )
    back = json.loads(json.dumps(summary.to_dict()))
    assert math.isnan(back["params"]["bad"]["mean"]) and back["params"]["bad"]["nan_count"] == 1
    assert back["params"]["inf"]["max"] == math.inf and back["params"]["inf"]["shape"] == [2]
    assert back["params"]["inf"]["dtype"] == "float32" and back["params"]["inf"]["grad"] is None
    assert back["total"]["count"] == 4 and back["total"]["nan_count"] == 1


def test_a_block_is_no_parameter(backend, model):
    with pytest.raises(KeyError, match="'0' is a module, not a parameter"):
        summarize(model)["0"]


def test_to_pandas(backend, model):
    frame = summarize(model).to_pandas()
    assert list(frame.index) == list(summarize(model)) and frame.index.name == "name"
    assert frame.loc["0.weight", "shape"] == (6, 8)
    assert frame.loc["0.weight", "grad_norm"] == summarize(model)["0.weight"].grad.norm
    model.zero_grad()
    assert math.isnan(summarize(model).to_pandas().loc["0.weight", "grad_norm"])


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_copies(backend, model, duplicate):
    for p in model.parameters():
        p.grad *= 4
    summary = summarize(model, correction=0, grad_scale=4.0)
    other = duplicate(summary)
    assert other.to_dict() == summary.to_dict() and str(other) == str(summary)
    assert other == summary and other["2.bias"] == summary["2.bias"]


def test_equality(backend, model):
    summary = summarize(model)
    assert summary == summarize(model) != summarize(model, correction=0)
    assert summary["0.bias"] == summary["0.bias"] != summary["2.bias"]
    assert summary["0.bias"].grad == summary["0.bias"].grad != summary["0.bias"].finite
    assert summary.total == summarize(model).total


def test_entries_are_read_only(backend, model):
    with pytest.raises(AttributeError):
        summarize(model)["0.weight"].name = "mine"


def test_a_pickled_summary_needs_no_native_engine(native, model, monkeypatch):
    data = pickle.dumps(summarize(model))
    expected = summarize(model).scalars()
    monkeypatch.setattr(
        "paramstats._core.backend._active", paramstats._core.backend.choose("reference")
    )
    assert pickle.loads(data).scalars() == pytest.approx(expected, rel=1e-14)


def test_ready_and_wait(backend, model):
    summary = summarize(model)
    assert summary.ready() is True and summary.wait() is summary


def test_missing_pandas_is_an_error_that_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"needs pandas: pip install pandas$"):
        summarize(model).to_pandas()


def test_torch_collates_a_summary_as_a_dict(backend, model):
    """A DataLoader with `batch_size=None` calls `default_convert`."""
    assert type(torch.utils.data.default_convert(summarize(model))) is dict
