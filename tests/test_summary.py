"""`Summary`: a read-only mapping with totals, selections, scalars and conversions."""

from __future__ import annotations

import copy
import difflib
import json
import math
import pickle
import sys
import threading
from collections.abc import Mapping

import pytest
import torch
from torch import nn

import paramstats
from paramstats._core import moments
from paramstats._summary import Summary, record_of
from tests import oracle
from tests.integrations.deferred import deferred
from tests.test_inputs import Opaque

summarize = paramstats.summarize


# ---- the mapping ---------------------------------------------------------------------------------


def test_a_summary_is_a_read_only_mapping(backend, model):
    summary = summarize(model)
    assert isinstance(summary, Mapping)
    assert list(summary) == list(summary.keys()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert len(summary) == 4 and "0.weight" in summary and "weight" not in summary
    assert [entry.name for entry in summary.values()] == list(summary)
    assert summary.get("nothing") is None
    assert summary.ready() is True and summary.wait() is summary
    with pytest.raises(TypeError):
        summary["0.weight"] = 1  # type: ignore[index]
    with pytest.raises(AttributeError):
        summary["0.weight"].name = "mine"


def test_an_entry_does_not_hold_the_states_of_other_tensors(backend):
    tensors = {str(i): torch.ones(1, requires_grad=True) for i in range(1000)}
    sum(tensors.values()).backward()
    entry = summarize(tensors)["3"]
    assert len(pickle.dumps(entry.grad)) < 1000
    assert pickle.loads(pickle.dumps(entry.grad)) == entry.grad
    assert len(entry._table) == 2 * moments.ROW.size


def test_counts_are_exact(backend):
    entry = summarize({"m": torch.empty(2**53 + 1, device="meta")})["m"]
    assert entry.count == entry.to_dict()["count"] == 2**53 + 1


def test_an_entry_has_the_properties_of_its_tensor(backend, model):
    model[0].bias.requires_grad_(False)
    entry = summarize(model)["0.bias"]
    assert (entry.name, entry.shape, entry.dtype) == ("0.bias", (6,), torch.float32)
    assert (entry.device, entry.requires_grad) == (torch.device("cpu"), False)
    assert (entry.aliases, entry.kind) == ((), "param")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0.weigth", r"no parameter '0.weigth' among 4; did you mean '0.weight'"),
        ("0", r"'0' is a module, not a parameter"),
    ],
)
def test_an_unknown_name_is_a_key_error_with_a_hint(backend, model, name, message):
    with pytest.raises(KeyError, match=message):
        summarize(model)[name]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("zeros", "'zero_count' or 'zero_fraction'"),
        ("stddev", "'std'"),
        ("sparsity", "'zero_fraction'"),
        ("gradient", "'grad'"),
    ],
)
def test_an_unknown_statistic_is_an_attribute_error_with_a_hint(model, name, meant):
    entry = summarize(model)["0.weight"]
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'; did you mean {meant}\?"):
        getattr(entry, name)
    with pytest.raises(AttributeError, match=r"no attribute 'median'$"):
        _ = entry.median


def test_a_summary_is_a_snapshot(backend, model):
    summary = summarize(model)
    before = summary["0.weight"].mean
    with torch.no_grad():
        model[0].weight.add_(100)
    model.zero_grad()
    assert summary["0.weight"].mean == before and summary["0.weight"].grad is not None


def test_total_covers_all_parameters(backend, model):
    total = summarize(model).total
    everything = torch.cat([p.flatten() for p in model.parameters()])
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    oracle.check(total, everything)
    oracle.check(total.grad, gradients)


# ---- filter --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patterns",
    [
        {"include": "weight"},
        {"include": ["^0", r"^2\.b"]},
        {"exclude": "bias", "include": "^2"},
    ],
)
def test_filter_selects_as_summarize_does(backend, model, patterns):
    filtered = summarize(model).filter(**patterns)
    assert filtered == summarize(model, **patterns)
    assert filtered.total == summarize(model, **patterns).total
    assert filtered.scalars() == summarize(model, **patterns).scalars()
    with pytest.raises(TypeError, match="for include, got int"):
        filtered.filter(include=3)
    with pytest.warns(RuntimeWarning, match=r"Summary\.filter: no name matches .* exclude='\.'"):
        empty = filtered.filter(exclude=".")
    assert list(empty) == [] and empty.total.count == 0


def test_filter_keeps_buffers_out_of_the_total(backend):
    summary = summarize(nn.BatchNorm1d(4), buffers=True).filter("weight|mean")
    assert list(summary) == ["weight", "running_mean"] and summary.total.count == 4


@pytest.mark.filterwarnings("ignore:.*could not be read")
def test_filter_selects_among_skipped_and_diverged_tensors(backend):
    record = record_of(summarize({"a": Opaque(torch.ones(2)), "b": torch.ones(3)}))
    diverged = {"a": "rank 1", "b": "rank 2", "b (gradient)": "rank 3"}
    summary = Summary(record._replace(diverged=diverged))
    assert list(summary.skipped) == ["a"]
    assert dict(summary.filter("b").skipped) == {}
    assert summary.filter("a").skipped == summary.skipped
    assert summary.filter("b").diverged == {"b": "rank 2", "b (gradient)": "rank 3"}
    assert summary.filter("a").diverged == {"a": "rank 1"}


# ---- scalars -------------------------------------------------------------------------------------


def test_scalars_have_every_statistic_under_its_key(backend, model):
    summary = summarize(model)
    scalars = summary.scalars()
    assert len(scalars) == 2 * 4 * (4 + 1)
    assert all(type(value) is float for value in scalars.values())
    assert scalars["grad_norm/0.weight"] == summary["0.weight"].grad.norm
    for stat in ("mean", "std", "norm", "zero_fraction"):
        assert scalars[f"param_{stat}/total"] == getattr(summary.total, stat)
        assert scalars[f"grad_{stat}/total"] == getattr(summary.total.grad, stat)
    composer = summary.scalars(key="l2_norm/{kind}/{name}", stats=("norm",), totals=False)
    assert next(iter(composer)) == "l2_norm/param/0.weight" and len(composer) == 8
    assert composer["l2_norm/grad/2.bias"] == summary["2.bias"].grad.norm
    counts = summary.scalars(stats=("nan_count", "count"), totals=False)
    assert counts["param_nan_count/0.bias"] == 0.0 and counts["grad_count/0.bias"] == 6.0
    assert summary.scalars(stats="norm", totals=False).keys() == {
        f"{kind}_norm/{name}" for kind in ("param", "grad") for name in summary
    }
    assert list(summarize(nn.Linear(2, 2)).scalars(stats=("mean",))) == [
        "param_mean/weight",
        "param_mean/bias",
        "param_mean/total",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stats": ("median",)}, "expected each of stats to be one of count, mean.*got 'median'"),
        ({"stats": "stddev"}, "got 'stddev'; did you mean 'std'"),
        ({"stats": "grad.norm"}, "got 'grad.norm'; did you mean 'norm'"),
        ({"stats": "grad_std"}, "got 'grad_std'; did you mean 'std'"),
        ({"key": "{name}/{layer}"}, "got 'layer' in"),
        ({"key": "{kind:{foo}}"}, "got 'foo' in"),
        ({"key": "{kind.x}"}, "in '{kind.x}'"),
        ({"key": "{0}"}, "in '{0}'"),
        ({"key": "{name"}, "a format string for key"),
        ({"key": "{kind}{stat}{name[3]}"}, "got 'name.3.' in"),  # "weight" has four characters
        ({"key": "{kind}{stat}{name.upper}"}, "got 'name.upper' in"),
        ({"key": "{name}"}, "a key for each statistic"),
        ({"key": "{kind}/{stat}"}, "a key for each statistic"),
        ({"depth": 0}, "a whole number of 1 or more, got 0"),
        ({"depth": 1.0}, "a whole number of 1 or more, got 1.0"),
    ],
)
def test_bad_arguments_of_scalars_are_refused(backend, model, arguments, message):
    with pytest.raises(ValueError, match=f"^paramstats.scalars: .*{message}"):
        summarize(model).scalars(**arguments)


def test_equal_keys_are_allowed_where_only_one_of_their_values_was_read(backend, model):
    key = "{stat}/{name}"
    expected = summarize(model).scalars(totals=False, stats="mean").values()
    plain = summarize(model, grads=False).scalars(key=key, stats=["mean"])
    assert list(plain) == [
        "mean/0.weight",
        "mean/0.bias",
        "mean/2.weight",
        "mean/2.bias",
        "mean/total",
    ]
    assert list(plain.values())[:4] == list(expected)[:4]
    with pytest.raises(ValueError, match="got 5 keys for 10 statistics"):
        summarize(model).scalars(key=key, stats=["mean"])


def test_a_parameter_called_total_needs_totals_false(backend):
    summary = summarize({"total": torch.ones(2)})
    with pytest.raises(ValueError, match="totals=False where a parameter is called 'total'"):
        summary.scalars()
    assert summary.scalars(totals=False)["param_mean/total"] == 1.0


class Deep(nn.Module):
    """Parameters in the root and in modules of several depths, a buffer, a frozen one, a NaN."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.tensor([2.0, -1.0]))
        self.encoder = nn.Sequential(
            nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), nn.Linear(4, 3)
        )
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.broken = nn.Linear(2, 2)
        for p in self.parameters():
            if p.requires_grad:
                p.grad = torch.randn_like(p)
        with torch.no_grad():
            self.broken.bias[0] = math.nan
        self.broken.bias.grad = None


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_scalars_with_depth_are_those_of_concatenated_tensors(backend, depth):
    model = Deep()
    groups: dict[str, list[torch.Tensor]] = {}
    for kind, named in (("param", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            path = name.split(".")[:-1]
            module = ".".join(path[:depth]) or name
            groups.setdefault(f"{kind}_{{stat}}/{module}", []).append(tensor.detach())
            if tensor.grad is not None:
                groups.setdefault(f"grad_{{stat}}/{module}", []).append(tensor.grad)
    expected = {}
    for key, tensors in groups.items():
        x = torch.cat([tensor.double().flatten() for tensor in tensors])
        values = {"mean": x.mean(), "std": x.std(), "norm": x.norm(), "max": x.max()}
        values |= {"zero_fraction": (x == 0).double().mean(), "nan_count": x.isnan().sum()}
        expected |= {key.format(stat=stat): value.item() for stat, value in values.items()}
    stats = ("mean", "std", "norm", "max", "zero_fraction", "nan_count")
    summary = summarize(model, buffers=True)
    scalars = summary.scalars(stats=stats, totals=False, depth=depth)
    assert scalars == pytest.approx(expected, rel=1e-6, abs=1e-7, nan_ok=True)
    assert ("grad_norm/frozen" in scalars, "grad_norm/scale" in scalars) == (False, True)
    assert math.isnan(scalars["param_norm/broken"]) and scalars["grad_nan_count/broken"] == 0
    with_totals = summary.scalars(stats=stats, depth=depth)
    plain = summary.scalars(stats=stats)
    for key in with_totals.keys() - scalars.keys():  # totals do not depend on the depth
        assert key.endswith("/total")
        assert repr(with_totals[key]) == repr(plain[key])
    assert len(with_totals) == len(scalars) + 2 * len(stats)


def test_scalars_with_depth_divide_gradients_by_grad_scale(backend, model):
    plain = summarize(model).scalars(depth=1)
    for p in model.parameters():
        p.grad *= 1024
    scaled = summarize(model, grad_scale=1024.0).scalars(depth=1)
    assert scaled == pytest.approx(plain, rel=1e-12)


# ---- conversions and copies ----------------------------------------------------------------------


def test_to_dict_can_be_written_as_json(backend):
    summary = summarize(
        {"bad": torch.tensor([math.nan, 1.0]), "inf": torch.tensor([math.inf, 1.0])}
    )
    back = json.loads(json.dumps(summary.to_dict()))
    assert math.isnan(back["params"]["bad"]["mean"]) and back["params"]["bad"]["nan_count"] == 1
    assert back["params"]["inf"]["max"] == math.inf and back["params"]["inf"]["shape"] == [2]
    assert back["params"]["inf"]["dtype"] == "float32" and back["params"]["inf"]["grad"] is None
    assert back["total"]["count"] == 4 and back["total"]["nan_count"] == 1


def test_to_pandas_has_a_row_per_tensor(backend, model, monkeypatch):
    frame = summarize(model).to_pandas()
    assert list(frame.index) == list(summarize(model)) and frame.index.name == "name"
    assert frame.loc["0.weight", "shape"] == (6, 8)
    assert frame.loc["0.weight", "grad_norm"] == summarize(model)["0.weight"].grad.norm
    model.zero_grad()
    assert math.isnan(summarize(model).to_pandas().loc["0.weight", "grad_norm"])
    monkeypatch.setitem(sys.modules, "pandas", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"needs pandas: pip install pandas$"):
        summarize(model).to_pandas()


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
@pytest.mark.parametrize("is_deferred", [False, True])
def test_copies_and_pickles_are_equal(backend, model, duplicate, is_deferred):
    for p in model.parameters():
        p.grad *= 4
    summary = summarize(model, correction=0, grad_scale=4.0)
    other = duplicate(deferred(summary)[0] if is_deferred else summary)
    assert other.to_dict() == summary.to_dict() and str(other) == str(summary)
    assert other == summary and other["2.bias"] == summary["2.bias"]


def test_a_pickle_of_the_native_backend_is_read_without_it(native, model, monkeypatch):
    data = pickle.dumps(summarize(model))
    expected = summarize(model).scalars()
    reference = paramstats._core.backend.choose("reference")
    monkeypatch.setattr("paramstats._core.backend._active", reference)
    assert pickle.loads(data).scalars() == pytest.approx(expected, rel=1e-14)


def test_summaries_are_equal_if_their_statistics_are(backend, model):
    summary = summarize(model)
    assert summary == summarize(model) != summarize(model, correction=0)
    assert summary != dict(summary)
    assert summary["0.bias"] == summary["0.bias"] != summary["2.bias"]
    assert summary["0.bias"].grad == summary["0.bias"].grad != summary["0.bias"].finite
    assert summary.total == summarize(model).total
    assert hash(summary["0.bias"]) == hash(summarize(model)["0.bias"])


# ---- deferred statistics -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda s: s["0.weight"].grad.norm,
        lambda s: s.total.grad.norm,
        lambda s: s.scalars()["grad_norm/0.weight"],
        lambda s: s.to_dict()["params"]["0.weight"]["grad"]["norm"],
        lambda s: s.wait()["0.weight"].grad.norm,
        lambda s: s.filter("0").total.norm,
        str,
        repr,
        lambda s: s == summarize({}),
    ],
)
def test_only_reading_a_statistic_waits_and_only_once(model, read):
    expected = read(summarize(model))
    summary, transfer = deferred(summarize(model))
    assert not summary.ready()
    assert len(summary) == len(list(summary)) == 4
    assert "0.weight" in summary and "weight" not in summary
    assert transfer.waits == 0
    for _ in range(2):
        assert read(summary) == expected
    assert summary.ready() and transfer.waits == 1


def test_threads_may_wait_for_one_summary_together(model):
    expected = summarize(model).total.norm
    for _ in range(20):
        summary, _transfer = deferred(summarize(model))
        found: list[float] = []
        threads = [
            threading.Thread(target=lambda s=summary, f=found: f.append(s.total.norm))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [expected] * 4


def test_torch_collates_a_summary_as_a_dict(backend, model):
    """A DataLoader with `batch_size=None` calls `default_convert`."""
    assert type(torch.utils.data.default_convert(summarize(model))) is dict


def test_properties_of_a_pending_summary_do_not_wait(model):
    summary, transfer = deferred(summarize(model))
    assert not summary.skipped and not summary.diverged and not summary.is_local
    assert len(summary) and "0.weight" in summary and transfer.waits == 0


def test_depth_does_not_merge_a_tensor_with_a_module_of_its_name():
    summary = summarize({"a": torch.ones(4), "a.w": torch.zeros(2)})
    with pytest.raises(ValueError, match="expected a key for each statistic"):
        summary.scalars(depth=1, totals=False)


def test_warnings_name_the_line_of_the_caller(monkeypatch):
    monkeypatch.setattr("paramstats._core.reading._warned", set())
    hidden = torch.nested.nested_tensor([torch.ones(2)])
    for call in (lambda: summarize({"w": hidden}), lambda: summarize({"w": hidden}, include="x")):
        with pytest.warns(RuntimeWarning) as caught:
            call()
        assert caught[0].filename == __file__
    with pytest.warns(RuntimeWarning) as caught:
        summarize({"w": torch.ones(1)}).filter("x")
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["norm", "mean", "grad"])
def test_statistics_of_the_summary_itself_are_suggested(name):
    with pytest.raises(AttributeError, match=rf"did you mean summary\.total\.{name}\?"):
        getattr(summarize({"w": torch.ones(1)}), name)


def test_many_names_are_looked_up_without_comparing_them(backend, monkeypatch):
    """A suggestion compares few names; `get` and `in` compare none."""
    names = [f"model.layers.{i}.block.{part}.weight" for i in range(300) for part in "abc"]
    summary = summarize({name: torch.ones(1) for name in [*names, "model.head"]})
    compared = []
    close_matches = difflib.get_close_matches

    def spy(name, known, **options):
        compared.append(len(known))
        return close_matches(name, known, **options)

    monkeypatch.setattr(difflib, "get_close_matches", spy)
    assert summary.get("model.layers.7.block.a.wieght") is None and "nothing" not in summary
    assert not compared
    for name, meant in {
        "model.layers.299.block.a.wieght": "model.layers.299.block.a.weight",
        "model.layer.299.block.a.weight": "model.layers.299.block.a.weight",
        "model.layers.299.blok.c.weight": "model.layers.299.block.c.weight",
        "layers.299.block.b.weight": "model.layers.299.block.b.weight",
        "model.haed": "model.head",
        "nothing like it": None,
    }.items():
        with pytest.raises(KeyError) as error:
            summary[name]
        hint = f"; did you mean {meant!r}?" if meant else ""
        assert error.value.args[0] == f"no parameter {name!r} among 901{hint}"
    assert max(compared) <= 500
