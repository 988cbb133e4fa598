"""Test what a history knows of updates and of the optimizer's state: arrays, tables, plots, files.

The expected values are those of a training in float64 that is computed by hand.
"""

from __future__ import annotations

import gc
import json
import math
import tracemalloc

import numpy as np
import pytest
import torch

import paramstats
from paramstats import History, Summary, summarize
from paramstats._core.derived import DERIVED, derived, derived_names
from paramstats._core.optimizer_record import OptimizerRecord
from paramstats._summary import record_of
from tests.history.test_file import are_identical, assert_refused, write_lines
from tests.history.training import WITHOUT, Truth, merged, train

KINDS = ("param", "grad", "update", "exp_avg", "exp_avg_sq")
UNKNOWN = ("2.bias", "2.running_mean")
"""A frozen parameter and a buffer."""


@pytest.fixture
def trained(backend) -> tuple[History, list[dict[str, Truth]]]:
    history = History()
    return history, train(history)


def near(values: list[float]):
    """Compare float64 statistics; NaN where the summary has no optimizer."""
    expected = [math.nan if step in WITHOUT else value for step, value in enumerate(values)]
    return pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)


# ---- arrays


def test_series_are_those_of_the_training(trained):
    history, truths = trained
    for name in truths[0]:
        series, of = history[name], [truth[name] for truth in truths]
        assert series.update.norm == near([truth.update.norm().item() for truth in of])
        assert series.update.mean == near([truth.update.mean().item() for truth in of])
        assert series.update.zero_fraction == near(
            [(truth.update == 0).double().mean().item() for truth in of]
        )
        state = series.optimizer.state
        assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
        assert state["exp_avg"].norm == near([truth.exp_avg.norm().item() for truth in of])
        assert state["exp_avg_sq"].max == near([truth.exp_avg_sq.max().item() for truth in of])
        assert_derived(series, of)
        assert series.optimizer.step == near([*range(1, 7)])
        assert series.optimizer.hyperparameters["lr"] == near([0.01 * (i + 1) for i in range(6)])
        assert series.optimizer.lr == near([0.01 * (i + 1) for i in range(6)])
        assert series.optimizer.weight_decay == near([0.1] * 6)
        methods = [None if step in WITHOUT else "formula" for step in range(6)]
        assert series.optimizer.update_method == methods
    assert len(series.optimizer) == 6
    assert repr(series.optimizer) == "<OptimizerSeries of step, exp_avg, exp_avg_sq, 6 steps>"
    with pytest.raises(ValueError, match="expected 'update' and 'grad', or 'grad' and one of"):
        series.optimizer.cosine("param", "grad")


def assert_derived(series, of: list[Truth]) -> None:
    expected = [truth.derived() for truth in of]
    for name, found in (
        ("update_ratio", series.update_ratio),
        ("update_cosine_grad", series.optimizer.cosine("update", "grad")),
        ("grad_cosine_exp_avg", series.optimizer.cosine("grad", "exp_avg")),
        ("optimizer_rms", series.optimizer.rms),
        ("optimizer_eps_fraction", series.optimizer.eps_fraction),
    ):
        assert found.dtype == np.float64
        assert found == near([one[name] for one in expected]), name
    assert any(0 < one["optimizer_eps_fraction"] < 1 for one in expected) or len(of[0].param) < 40


def test_total_series_are_those_of_all_parameters(trained):
    history, truths = trained
    total, of = history.total, [merged([*truth.values()]) for truth in truths]
    assert total.update.norm == near([truth.update.norm().item() for truth in of])
    assert total.optimizer.state["exp_avg"].norm == near([t.exp_avg.norm().item() for t in of])
    assert total.optimizer.rms == near([truth.derived()["optimizer_rms"] for truth in of])
    # |w| has the frozen parameter, which is zero.
    assert total.update_ratio == near([truth.derived()["update_ratio"] for truth in of])


def test_what_no_optimizer_has_is_nan(trained):
    history, _ = trained
    for name in UNKNOWN:
        series = history[name]
        arrays = [series.update.norm, series.update_ratio, series.optimizer.rms]
        arrays += [series.optimizer.lr, series.optimizer.cosine("grad", "exp_avg")]
        for array in arrays:
            assert array.shape == (6,) and np.isnan(array).all()
        assert series.optimizer.update_method == [None] * 6
        assert not series.optimizer.state and not series.optimizer.hyperparameters


def test_min_update_ratio_is_for_steps_without_the_exact_one(trained):
    history, truths = trained
    for name in truths[0]:
        series = history[name]
        assert np.isnan(series.min_update_ratio).tolist() == [s not in WITHOUT for s in range(6)]
        assert np.isnan(series.update_ratio).tolist() == [s in WITHOUT for s in range(6)]
        for step in WITHOUT:
            before, truth = truths[step - 1][name].param, truths[step][name]
            exact = (truth.update.norm() / before.norm()).item()
            assert 0 <= series.min_update_ratio[step] <= exact * (1 + 1e-9)


# ---- tables


def test_columns_of_data_frames(trained):
    pytest.importorskip("pandas")
    history, truths = trained
    frame = history.to_pandas(stats=("norm", "zero_count"))
    names = ["", "grad_", "update_", "exp_avg_", "exp_avg_sq_"]
    numbers = [n for n in DERIVED if "cosine" not in n or n.endswith(("cosine_grad", "exp_avg"))]
    assert len(numbers) == 5
    expected = [f"{kind}{stat}" for kind in names for stat in ("norm", "zero_count")]
    assert list(frame.columns) == [*expected, *numbers]
    for name in truths[0]:
        rows, of = frame.xs(name, level="name"), [truth[name] for truth in truths]
        assert rows["update_norm"].tolist() == near([t.update.norm().item() for t in of])
        assert rows["exp_avg_norm"].tolist() == near([t.exp_avg.norm().item() for t in of])
        for number in numbers:
            assert rows[number].tolist() == near([t.derived()[number] for t in of]), number
        one = history._entries()[5].summary.to_pandas().loc[name]
        for number in numbers:
            assert one[number] == pytest.approx(of[5].derived()[number], rel=1e-9, abs=1e-12)
        assert one["update_norm"] == pytest.approx(of[5].update.norm().item(), rel=1e-9)
        assert one["exp_avg_sq_max"] == pytest.approx(of[5].exp_avg_sq.max().item(), rel=1e-9)
    for name in UNKNOWN:
        rows = frame.xs(name, level="name")
        assert rows["norm"].notna().all() and rows.filter(regex="update|exp|opt").isna().all(
            axis=None
        )
    csv = history._entries()[5].summary.to_pandas().to_csv()
    assert "update_ratio" in csv.splitlines()[0] and "step" not in csv.splitlines()[0]


def test_derived_numbers_equal_those_of_the_entries(backend):
    """Of odd tensors: without a momentum, with NaN, not read, with two momenta."""
    params = [torch.nn.Parameter(torch.randn(5)) for _ in range(5)]
    optimizer = torch.optim.SGD(params[:4], lr=0.1, momentum=0.9)
    for p in params[:3]:
        p.grad = torch.randn(5)
    optimizer.step()
    params[1].grad[2] = math.nan
    optimizer.state[params[0]] |= {"exp_avg": torch.ones(5), "momentum": torch.ones(2)}
    summary = summarize([(str(i), p) for i, p in enumerate(params)], optimizer=optimizer)
    record = record_of(summary)
    assert {"grad_cosine_exp_avg", "grad_cosine_momentum_buffer"} < {*derived_names(record)}
    for momentum in ("exp_avg", "momentum_buffer", "momentum"):
        found = np.array(derived(record, f"grad_cosine_{momentum}"), np.float64)  # None: NaN
        expected = [
            one.optimizer.cosine("grad", momentum) if one.optimizer else math.nan
            for one in summary.values()
        ]
        assert found == pytest.approx(expected, nan_ok=True)
    known = {m: derived(record, f"grad_cosine_{m}") for m in ("exp_avg", "momentum_buffer")}
    assert not math.isnan(known["exp_avg"][0]) and known["momentum_buffer"][0] is None
    assert math.isnan(known["momentum_buffer"][1]) and not math.isnan(known["momentum_buffer"][2])


def test_rows_that_were_not_read_give_nan(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer.step()
    record = record_of(summarize(model, optimizer=optimizer))
    n, known = len(record.layout), record.optimizer
    unread = [paramstats._core.moments.unread(p.numel()) for p in model.parameters()]
    rows = b"".join(paramstats._core.moments.ROW.pack(*row) for row in unread)
    broken = known._replace(table=4 * rows + known.table[4 * n * 72 :])
    summary = Summary(record._replace(optimizer=broken))
    for name in derived_names(summary._record):
        assert np.isnan(derived(summary._record, name)).all(), name
    one = summary["0.weight"]
    for value in (one.optimizer.cosine("grad", "exp_avg"), one.optimizer.eps_fraction):
        assert math.isnan(value)
    line = summary.table(width=300).splitlines()[2]
    assert line.split()[-1] == "-", "the ratio"


@pytest.mark.parametrize("step", [math.nan, math.inf])
def test_a_step_that_is_no_number_is_unknown(model, step):
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    optimizer.state[model[0].weight]["step"] = step
    history = History()
    history.append(0, summarize(model, optimizer=optimizer))
    assert np.isnan(history["0.weight"].optimizer.step).all()


# ---- plots


def test_plots_of_the_bound_leave_out_steps_with_the_exact_one(trained):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    history, truths = trained
    names = [*truths[0]]
    lines = history.plot(names, stat="min_update_ratio").axes[0].lines
    for name, line in zip(names, lines, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), history[name].min_update_ratio)
        assert np.isfinite(line.get_ydata()).sum() == len(WITHOUT)


@pytest.mark.parametrize("stat", ["norm", "zero_fraction"])
@pytest.mark.parametrize("kind", KINDS)
def test_plots_of_a_kind(trained, stat, kind):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    history, truths = trained
    axes = history.plot(["0.weight", "total"], stat=stat, kind=kind).axes[0]
    line, total = axes.lines
    of = [getattr(truth["0.weight"], kind) for truth in truths]
    measure = {"norm": torch.Tensor.norm, "zero_fraction": lambda x: (x == 0).double().mean()}
    values = [measure[stat](x).item() for x in of]
    is_known = kind in ("param", "grad")
    assert line.get_ydata() == (pytest.approx(values, rel=1e-9) if is_known else near(values))
    names = {"param": "parameter", "grad": "gradient"}
    words = {"norm": "L2 norm", "zero_fraction": "zero fraction"}
    assert axes.get_title(loc="left") == f"{names.get(kind, kind)} {words[stat]}"
    series = {"param": history.total, "grad": history.total.grad, "update": history.total.update}
    of_total = series.get(kind) or history.total.optimizer.state[kind]
    assert total.get_ydata() == pytest.approx(getattr(of_total, stat), nan_ok=True)
    mesh = history.heatmap(stat=stat, kind=kind).axes[0].collections[0].get_array()
    assert mesh.shape == (len(history.names), 6)


@pytest.mark.parametrize("stat", [n for n in DERIVED if "momentum" not in n and "moving" not in n])
def test_plots_of_derived_numbers(trained, stat):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from paramstats._history import cells

    history, truths = trained
    records = [record_of(summary) for _, summary in history]
    names = [*truths[0], "missing"]
    found = cells.collect(history.steps, records, names, stat, "grad")
    for name, row in zip(truths[0], found.values, strict=False):
        assert row == near([truth[name].derived()[stat] for truth in truths])
    assert np.isnan(found.values[-1]).all() and not found.is_nonfinite.any()
    axes = history.plot(["0.weight", "total"], stat=stat).axes[0]
    assert axes.lines[0].get_ydata() == near([t["0.weight"].derived()[stat] for t in truths])
    title = axes.get_title(loc="left")
    assert title and "_" not in title.replace("exp_avg", "")
    legend = history.heatmap(stat=stat).axes[0].get_legend().get_texts()
    assert "not known" in [text.get_text() for text in legend]


def test_plots_say_what_is_missing(model):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    without, known = History(), History()
    without.append(0, summarize(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    known.append(0, summarize(model, optimizer=optimizer))
    for arguments in ({"stat": "update_ratio"}, {"kind": "update"}, {"stat": "optimizer_rms"}):
        with pytest.raises(
            ValueError, match=r"got none at any step; summarize.*optimizer=optimizer"
        ):
            without.plot(**arguments)
    with pytest.raises(ValueError, match=r"expected min_update_ratio, got none .*update_ratio"):
        without.plot(stat="min_update_ratio")
    with pytest.raises(ValueError, match="'grad', 'param' or 'update' for kind, got 'exp_avg'"):
        without.plot(kind="exp_avg")


# ---- files and memory


def hostile_summaries() -> list[Summary]:
    """Return summaries with keys, numbers and states that need care in a file."""
    params = {
        "plain": torch.nn.Parameter(torch.ones(3)),
        "infinite": torch.nn.Parameter(torch.tensor([-math.inf, 1.0])),
        "complex": torch.nn.Parameter(torch.tensor([1 + 2j, 3j])),
        "empty": torch.nn.Parameter(torch.empty(0)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "other": torch.nn.Parameter(torch.ones(2)),
    }
    for p in params.values():
        p.grad = torch.full_like(p, 1e-3) if p.requires_grad else None
    groups = [
        {"params": [params[name] for name in ("plain", "infinite", "complex", "empty", "frozen")]},
        {"params": [params["other"]], "lr": math.inf, "weight_decay": 0.5},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    optimizer.step()
    odd = {'NaN "quoted"\n': torch.ones(2), "Infinity": math.inf, "NaN": torch.tensor([math.nan])}
    optimizer.state[params["other"]] |= odd
    optimizer.param_groups[0]["NaN"] = math.nan
    empty = torch.optim.SGD(params.values(), lr=0.5)
    several = [params["plain"], params["infinite"]]
    return [
        summarize(params, optimizer=optimizer),
        summarize({}),
        summarize(params),
        summarize(params, optimizer=empty),
        summarize(params, optimizer=[torch.optim.SGD(several, lr=1, momentum=0.5), optimizer]),
        summarize(params, optimizer=optimizer, grad_scale=1024.0, params=False),
    ]


def without_nan(record: OptimizerRecord | None) -> object:
    """Return a record whose hyperparameters can be compared."""
    return record and record._replace(hyperparameters=repr(record.hyperparameters))


@pytest.mark.filterwarnings("ignore:.*updates of complex parameters")
def test_a_file_keeps_what_the_optimizer_knows(backend, tmp_path):
    path = tmp_path / "run.jsonl"
    with History(path) as history:
        for step, summary in enumerate(hostile_summaries()):
            history.append(step, summary)
    for loaded in (History.load(path), History(path, resume=True)):
        assert len(loaded) == 6
        for (_, a), (_, b) in zip(history, loaded, strict=True):
            mine, other = record_of(a), record_of(b)
            assert mine._replace(optimizer=None) == other._replace(optimizer=None)
            assert without_nan(mine.optimizer) == without_nan(other.optimizer)

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_files_with_and_without_an_optimizer(backend, tmp_path):
    """A reader that does not know the key finds the statistics as before."""
    path = tmp_path / "run.jsonl"
    history = History(path)
    train(history)
    assert are_identical(History.load(path), history)
    header, layout, *entries = map(json.loads, path.read_text().splitlines())
    assert header["version"] == 1
    assert list(entries[0]["optimizer"]) == ["groups", "group", "methods", "updates", "state"]
    assert list(entries[0]["optimizer"]["updates"]["lag"]) == ["count", "zeros", "mean"]
    assert "optimizer" not in entries[2]
    for entry in entries:
        entry.pop("optimizer", None)
    write_lines(path, layout, *entries)
    for (_, a), (_, b) in zip(history, History.load(path), strict=True):
        assert record_of(a)._replace(optimizer=None) == record_of(b)


INVALID = [
    (("group",), [0]),
    (("group",), [1, None]),
    (("group",), [-1, None]),
    (("group",), [True, None]),
    (("groups",), [[]]),
    (("groups",), [{"lr": "0.1"}]),
    (("groups",), [{"lr": True}]),
    (("methods",), ["formula"]),
    (("methods",), [1, 2]),
    (("updates",), []),
    (("state",), None),
    (("updates", "lag", "mean"), [-1.0, 0.0]),
    (("updates", "lag", "mean"), [1.0]),
    (("updates", "lag", "zeros"), [3, 0]),
    (("updates", "lag", "nans"), [-1, 0]),
    (("updates", "update", "m2"), [-1.0, 0.0]),
    (("updates", "update", "count"), [-2, 1]),
    (("updates", "update", "mean"), ["0", 0.0]),
    (("state", "exp_avg", "zeros"), [3, 0]),
    (("state", "exp_avg", "min"), [2.0, 0.0]),
    (("state", "exp_avg", "count"), [1 << 62, 1 << 62]),
    ((), []),
]


@pytest.mark.parametrize(("keys", "value"), INVALID)
def test_an_invalid_value_is_an_error(tmp_path, keys, value):
    path = tmp_path / "run.jsonl"
    params = {"w": torch.nn.Parameter(torch.ones(2)), "b": torch.nn.Parameter(torch.ones(1))}
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(params.values())
    optimizer.step()
    with History(path) as history:
        history.append(0, summarize(params, optimizer=optimizer))
    assert len(History.load(path)) == 1
    _, layout, entry = map(json.loads, path.read_text().splitlines())
    place, key = entry, "optimizer"
    for next_key in keys:
        place, key = place[key], next_key
    place[key] = value
    write_lines(path, layout, entry, entry)
    assert_refused(path, "expected whole lines, got a broken one, line 3 of ")


@pytest.mark.parametrize("groups", [1, 60])
def test_memory_includes_the_optimizer(groups):
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(60)]
    for p in params:
        p.grad = torch.ones(2)
    each = len(params) // groups
    optimizer = torch.optim.AdamW(
        [{"params": params[i : i + each]} for i in range(0, len(params), each)]
    )
    optimizer.step()
    named, limit = {f"block.{i}": p for i, p in enumerate(params)}, 1 << 20
    summarize(named, optimizer=optimizer)
    gc.collect()
    tracemalloc.start()
    history = History(max_bytes=limit)
    for step in range(60):
        history.append(step, summarize(named, optimizer=optimizer))
    gc.collect()
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(history) < 60 and 0.4 * limit < used < limit, used
