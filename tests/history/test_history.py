"""Test histories in memory: arrays by name, the memory limit, min_update_ratio."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import paramstats
from paramstats import History, Summary
from paramstats._core.layout import Layout
from paramstats._core.options import STATS
from paramstats._core.reading import DeferredRecord
from paramstats._summary import layout_of, record_of

summarize = paramstats.summarize

SMALL_LIMIT = 16 * (2 * 72 + 400) + 1000
"""Bytes for about 16 entries of one parameter."""


def train(history, model, steps):
    """Append a summary at each step; every third step has no gradients."""
    for step in steps:
        model(torch.full((4, 8), 0.1 * (step + 1))).square().mean().backward()
        if step % 3 == 2:
            model.zero_grad(set_to_none=True)
        history.append(step, summarize(model))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01).add_(0.01)
    return history


def full(value: float, n: int = 4) -> Summary:
    return summarize({"w": torch.full((n,), value, dtype=torch.float64)})


def history_of(*sources) -> History:
    history = History()
    for step, source in enumerate(sources):
        history.append(step, summarize(source))
    return history


# ---- entries and arrays


def test_history_is_a_sequence_of_summaries(backend, model):
    summaries = [summarize(model) for _ in range(3)]
    history = History()
    assert len(history) == 0 and list(history) == [] and history.names == ()
    for step, summary in zip((3, 5, 20), summaries, strict=True):
        history.append(step, summary)
    assert list(history) == list(zip((3, 5, 20), summaries, strict=True))
    assert len(history) == 3 and history.names == tuple(summaries[0])
    assert history.steps.dtype == np.int64 and history.steps.tolist() == [3, 5, 20]
    assert "0.weight" in history and "weight" not in history
    assert repr(history) == "<History of 3 summaries of 4 tensors, steps 3 to 20>"


def test_series_equal_the_statistics_of_summaries(backend, model):
    history = train(History(), model, range(8))
    series = history["0.weight"]
    assert len(series) == 8 and series.steps.tolist() == list(range(8))
    for stat in STATS:
        own, grads = getattr(series, stat), getattr(series.grad, stat)
        assert own.dtype == np.float64 and own.shape == (8,)
        for (_, summary), value, grad in zip(history, own, grads, strict=True):
            entry = summary["0.weight"]
            assert value == getattr(entry, stat)
            assert math.isnan(grad) if entry.grad is None else grad == getattr(entry.grad, stat)
    assert np.isnan(series.grad.norm).tolist() == [step % 3 == 2 for step in range(8)]
    assert (series.name, series.shape, series.kind) == ("0.weight", (6, 8), "param")
    assert (series.dtype, series.device) == (torch.float32, torch.device("cpu"))
    assert series.requires_grad and series.aliases == ()
    assert repr(series) == "<ParamSeries of '0.weight', 8 steps>"
    total = history.total
    assert total.norm.tolist() == [summary.total.norm for _, summary in history]
    assert total.grad.norm[0] == next(iter(history))[1].total.grad.norm
    assert math.isnan(total.grad.norm[2]) and repr(total) == "<TotalSeries of 8 steps>"


def test_finite_ignores_nan_and_infinities(backend):
    series = history_of(*({"w": torch.tensor([3.0, 4.0, x])} for x in (1, math.nan, math.inf)))["w"]
    assert series.norm[0] == pytest.approx(26**0.5) and math.isnan(series.norm[1])
    assert series.finite.norm[1:] == pytest.approx([5, 5])
    assert series.finite.count.tolist() == [3, 2, 2]
    assert series.nonfinite_count.tolist() == [0, 1, 1]


def test_series_return_copies_and_cannot_be_set(model):
    series = train(History(), model, range(2))["0.bias"]
    series.mean[:] = 7
    assert 7 not in series.mean
    with pytest.raises(AttributeError):
        series.mean = 1  # type: ignore[misc]
    with pytest.raises(AttributeError, match=r"no attribute 'stddev'; did you mean 'std'\?"):
        series.grad.stddev  # noqa: B018


def test_tensors_may_appear_disappear_and_change_size():
    a, b = torch.ones(2), torch.ones(3)
    history = history_of({"a": a}, {"b": b, "a": torch.ones(5)}, {"b": b})
    assert history.names == ("a", "b")
    assert history["a"].count[:2].tolist() == [2, 5] and math.isnan(history["a"].mean[2])
    assert history["a"].shape == (5,)
    assert math.isnan(history["b"].mean[0]) and math.isnan(history["b"].grad.norm[2])


def test_aliases_are_found_and_unknown_names_get_suggestions(model):
    model[2].bias = torch.nn.Parameter(torch.ones(6))
    model[0].bias = model[2].bias
    model[2] = torch.nn.Identity()
    model[2].bias = model[0].bias
    history = history_of(model)
    assert history["2.bias"].norm == history["0.bias"].norm
    assert history["2.bias"].name == "0.bias" and history["0.bias"].aliases == ("2.bias",)
    assert history.names == ("0.weight", "0.bias") and "2.bias" in history
    with pytest.raises(KeyError, match=r"no parameter '0.weigth' among 2; did you mean '0.weight'"):
        history["0.weigth"]


def test_to_pandas(backend, model):
    testing = pytest.importorskip("pandas").testing
    history = train(History(), model, range(4))
    frame = history.to_pandas()
    assert list(frame.index.names) == ["step", "name"] and len(frame) == 4 * 4
    assert list(frame.columns) == [*STATS, *(f"grad_{stat}" for stat in STATS)]
    for step, summary in history:
        expected = summary.to_pandas()[frame.columns].astype(float)
        # math.hypot and std::hypot may differ in the last bit.
        testing.assert_frame_equal(frame.loc[step], expected, rtol=3e-16, atol=0)
    some = history.to_pandas(stats="norm")
    assert list(some.columns) == ["norm", "grad_norm"]
    wide = some["grad_norm"].unstack("name")
    assert wide["2.bias"].to_numpy() == pytest.approx(history["2.bias"].grad.norm, nan_ok=True)
    assert History().to_pandas().shape == (0, 30)
    assert history.to_pandas(stats=()).shape == (16, 0)
    with pytest.raises(ValueError, match=r"^paramstats.History.to_pandas: expected each of stats"):
        history.to_pandas(stats=("median",))


# ---- steps


@pytest.mark.parametrize("step", [3, 2, 0, -1])
def test_step_back_drops_later_entries_and_warns_once(step):
    history = History()
    for before in range(4):
        history.append(before, full(before))
    with pytest.warns(RuntimeWarning, match=f"step {step} comes after step 3, .*dropped"):
        history.append(step, full(10))
    assert history.steps.tolist() == [*range(max(step, 0)), step]
    assert history["w"].mean[-1] == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history.append(step, full(11))
    assert history["w"].mean[-1] == 11


@pytest.mark.parametrize(
    ("step", "summary", "error", "message"),
    [
        (1.5, None, TypeError, "expected a whole number for step, got 1.5"),
        ("1", None, TypeError, "expected a whole number for step, got '1'"),
        (1 << 63, None, ValueError, "expected a step of 64 bits, got 9223372036854775808"),
        (1, {"w": 1.0}, TypeError, "expected a Summary, got dict at step 1; pass"),
    ],
)
def test_append_refuses_bad_arguments(step, summary, error, message):
    with pytest.raises(error, match=f"^paramstats.History.append: {message}"):
        History().append(step, summary or full(1))


def test_steps_may_be_integers_of_any_type():
    history = History()
    for step in (np.int64(-5), torch.tensor(3), 1 << 62):
        history.append(step, full(1))
    assert history.steps.tolist() == [-5, 3, 1 << 62]


# ---- statistics that are still under way


class Transfer:
    """A transfer from a device that is ready when the test says so."""

    def __init__(self, table: bytes) -> None:
        self.table, self.is_ready, self.waits = table, False, 0

    def ready(self) -> bool:
        return self.is_ready

    def details(self) -> dict[int, Any]:
        return {}

    def write(self, table: bytearray) -> None:
        self.waits += not self.is_ready
        table[:] = self.table


def pending(value: float) -> tuple[Summary, Transfer]:
    """Return a summary whose table is still under way, and its transfer."""
    record = record_of(full(value))
    transfer = Transfer(record.table)
    unfinished = record._replace(table=bytes(len(record.table)))
    return Summary(None, DeferredRecord(unfinished, [transfer])), transfer


def test_append_does_not_wait_and_writes_in_order(tmp_path):
    path = tmp_path / "run.jsonl"
    transfers = []
    with History(path, max_bytes=SMALL_LIMIT) as history:
        for step in range(4):
            summary, transfer = pending(step)
            transfers.append(transfer)
            history.append(step, summary)
        assert repr(history) == "<History of 0 summaries of 0 tensors, 4 pending>"
        assert path.read_text().count('"step"') == 0
        transfers[0].is_ready = transfers[2].is_ready = True
        history.append(4, full(4))
        assert path.read_text().count('"step"') == 1, "entry 1 is not ready, so 2 has to wait"
        assert sum(transfer.waits for transfer in transfers) == 0
        history.wait()
        assert [transfer.waits for transfer in transfers] == [0, 1, 0, 1]
        assert path.read_text().count('"step"') == 5
        assert history["w"].mean.tolist() == [0, 1, 2, 3, 4]


def test_close_and_save_wait_for_statistics(tmp_path):
    for name, finish in (("closed", History.close), ("saved", lambda h: h.save(tmp_path / "x"))):
        history = History(tmp_path / name)
        summary, _ = pending(3)
        history.append(0, summary)
        finish(history)
        assert History.load(tmp_path / name)["w"].mean.tolist() == [3]
        assert summary.ready(), "the memory of the transfer is freed"
    assert list(History.load(tmp_path / "x")) == list(history)


class LostRecord:
    """A record that cannot be computed, as when another rank has ended."""

    def __init__(self, method: str, is_ready: bool = True) -> None:
        self.method, self.is_ready = method, is_ready

    def ready(self) -> bool:
        if self.method == "ready":
            raise RuntimeError("rank 1 has ended")
        return self.is_ready

    def record(self) -> Any:
        raise AssertionError("waited for the exchange")

    def result(self) -> Any:
        self.is_ready = True
        raise RuntimeError("rank 1 has ended")


@pytest.mark.parametrize("method", ["ready", "result"])
def test_an_entry_without_statistics_is_left_out(tmp_path, method):
    history = History(tmp_path / "run.jsonl")
    history.append(0, full(0))
    with pytest.warns(RuntimeWarning, match=r"entry of step 1 is left out, .*rank 1 has ended"):
        history.append(1, Summary(None, LostRecord(method)))
    history.append(2, full(2))
    assert history.steps.tolist() == History.load(tmp_path / "run.jsonl").steps.tolist() == [0, 2]


def test_an_exchange_is_not_waited_for_until_the_history_is_read():
    history = History()
    history.append(0, Summary(None, LostRecord("result", is_ready=False)))
    history.append(1, full(1))
    assert "2 pending" in repr(history)
    with pytest.warns(RuntimeWarning, match="entry of step 0 is left out"):
        assert len(history) == 1


def test_a_thread_that_waits_does_not_stop_others_from_appending():
    history, began, end = History(), threading.Event(), threading.Event()

    class Slow(LostRecord):
        def result(self) -> Any:
            began.set()
            assert end.wait(60)
            return record_of(full(0))

    history.append(0, Summary(None, Slow("result", is_ready=False)))
    later = LostRecord("result", is_ready=False)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(history.wait)
        assert began.wait(60)
        history.append(1, full(1))
        history.append(2, Summary(None, later))  # it is not waited for
        end.set()
        waiting.result(60)
    assert not later.is_ready and repr(history).endswith("steps 0 to 1, 1 pending>")


def test_a_step_that_goes_back_is_appended_before_the_warning_is_raised():
    history = History()
    history.append(3, full(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="step 2 comes after step 3"):
            history.append(2, full(1))
        assert history.steps.tolist() == [2]
        history.append(1, full(2))  # once


@pytest.mark.parametrize("use", ["history", "watch"])
def test_after_an_error_the_file_has_the_entries_that_are_available(tmp_path, monkeypatch, use):
    """The other ranks may have ended: the second entry never arrives, the first arrives late."""
    path = tmp_path / "run.jsonl"
    first, second = LostRecord("result", is_ready=False), LostRecord("result", is_ready=False)
    first.result = lambda: record_of(full(0))  # type: ignore[method-assign]
    summaries = [Summary(None, first), Summary(None, second)]
    monkeypatch.setattr("paramstats._watcher.summarize", lambda *_, **__: summaries.pop(0))
    watching = {"history": path, "every": 1, "grads": False}
    history: Any = History(path) if use == "history" else paramstats.watch({}, **watching)

    def run() -> None:
        with history:
            for step in (0, 1):
                history.append(step, summaries.pop(0)) if use == "history" else history.step()
            first.is_ready = True
            raise ZeroDivisionError

    with pytest.warns(RuntimeWarning, match="lacks 1 entry"), pytest.raises(ZeroDivisionError):
        run()
    assert History.load(path).steps.tolist() == [0]


def test_names_that_are_missing_in_some_entries_are_not_searched_for(monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("searched for similar names")

    monkeypatch.setattr("difflib.get_close_matches", fail)
    history = history_of({"a": torch.ones(2)}, {"b": torch.ones(3)}, {"b": torch.ones(3)})
    assert np.isnan(history["a"].norm).tolist() == [False, True, True]
    assert history.to_pandas("count")["count"].tolist() == [2, 3, 3]


def test_whether_shards_were_read_survives_saving(tmp_path):
    record = record_of(full(1))
    fields = record.layout.fields[:-1]
    history = History()
    history.append(0, Summary(record._replace(layout=Layout.shared(*fields, True))))
    history.save(tmp_path / "run.jsonl")
    ((_, loaded),) = History.load(tmp_path / "run.jsonl")
    assert layout_of(loaded).is_sharded


# ---- memory


@pytest.mark.parametrize("entries", [1, 2, 3, 7, 64, 1000])
def test_entries_are_evenly_spaced_within_the_limit(entries):
    history = History(max_bytes=SMALL_LIMIT)
    summary = full(1)
    for step in range(entries):
        history.append(step, summary)
        steps = history.steps
        assert (
            history._journal.store.kept.bytes <= SMALL_LIMIT and steps[0] == 0 and steps[-1] == step
        )
        gaps = set(np.diff(steps)[:-1].tolist())
        assert len(gaps) <= 1, "one spacing, except before the latest entry"
        assert len(gaps) == 0 or np.diff(steps)[-1] <= min(gaps)
    assert len(history) == entries or len(history) >= 8


@pytest.mark.filterwarnings("ignore:.*the run went back")
@pytest.mark.parametrize("stride", [1, 10])
@pytest.mark.parametrize("restarts", [1, 40])
def test_entries_stay_evenly_spaced_after_going_back(tmp_path, stride, restarts):
    history = History(tmp_path / "run.jsonl", max_bytes=SMALL_LIMIT)
    summary = full(1)
    for time in range(restarts):
        for step in range(61 + 7 * time if time else 0, 500 + 11 * time):
            history.append(stride * step, summary)
            history.append(stride * step, summary)  # replaces the one before
    history.close()
    read = History.load(tmp_path / "run.jsonl", max_bytes=SMALL_LIMIT)
    for found in (history, read):
        gaps = np.diff(found.steps)[:-1]
        assert len(found) >= 8 and gaps.max() <= 2 * gaps.min(), gaps


def test_first_and_latest_entry_stay_at_any_limit(model):
    assert train(History(max_bytes=1), model, range(20)).steps.tolist() == [0, 19]


@pytest.mark.parametrize("growth", [0, 2])
def test_limit_holds_for_the_memory_in_use(growth):
    limit = 1 << 20
    summarize({f"block.{i}": torch.ones(2) for i in range(200 + 120 * growth)})
    gc.collect()
    tracemalloc.start()
    history = History(max_bytes=limit)
    for step in range(120):  # with growth, every entry has its own layout
        names = [f"block.{i}" for i in range(200 + growth * step)]
        history.append(step, summarize({name: torch.ones(2) for name in names}))
    gc.collect()
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.4 * limit < used < limit, used
    assert 0.4 * limit < history._journal.store.kept.bytes <= limit
    layouts = {id(layout_of(summary)) for _, summary in history}
    assert len(layouts) == (len(history) if growth else 1)


def test_selections_of_a_mapping_share_one_layout():
    named = {f"layer{i}.weight": torch.ones(3) for i in range(10)} | {"bias": torch.ones(3)}
    history = History()
    for step in range(0, 20, 2):
        history.append(step, paramstats.summarize(named, include="weight"))
        history.append(step + 1, paramstats.summarize(named).filter("weight"))
    assert len({id(layout_of(summary)) for _, summary in history}) == 1


def test_names_under_wrappers_survive_saving(model, tmp_path):
    history = history_of(torch.nn.DataParallel(torch.nn.Linear(2, 2)))
    history.save(tmp_path / "run.jsonl")
    loaded = History.load(tmp_path / "run.jsonl")
    assert loaded["module.weight"].norm == loaded["weight"].norm == history["weight"].norm


@pytest.mark.parametrize("max_bytes", [0, -1, 1.5, None, True])
def test_max_bytes_must_be_a_positive_integer(max_bytes):
    with pytest.raises(ValueError, match="expected a number of bytes > 0 for max_bytes, got"):
        History(max_bytes=max_bytes)


# ---- min_update_ratio


def ratio(before: torch.Tensor, after: torch.Tensor) -> float:
    first, second = history_of({"w": before}, {"w": after})["w"].min_update_ratio
    assert math.isnan(first)
    return second


NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)
PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=40)


@given(PAIRS, st.sampled_from([1.0, 1e-3, 1e-8]), st.booleans())
def test_min_update_ratio_never_exceeds_the_true_ratio(pairs, size, is_complex):
    before, change = torch.tensor(pairs, dtype=torch.float64).T
    if is_complex:
        before, change = torch.complex(before, before.flip(0)), torch.complex(change, -change)
    after = before + size * change
    norm = before.norm().item()
    if norm < 1e-100:
        return
    true = (after - before).norm().item() / norm
    rounding = 1e-13 * max(1.0, after.norm().item() / norm)  # of float64, over up to 40 elements
    assert 0 <= ratio(before, after) <= true + rounding


NAN = math.nan


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([3.0, 5.0], [4.0, 6.0], (2 / 34) ** 0.5),  # mean 4, deviations -1 and 1, norm sqrt(34)
        ([3.0, 5.0], [2.0, 6.0], (2 / 34) ** 0.5),  # exact for shifts and scaled deviations
        ([1.0, 2.0, 6.0], [0.0, 1.0, 5.0], (3 / 41) ** 0.5),
        ([1.0, 2.0, 6.0], [-1.0, 1.0, 9.0], (14 / 41) ** 0.5),
        ([3.0, 5.0], [5.0, 3.0], 0),  # a swap keeps mean and spread
        ([3.0, 5.0], [3.0, 5.0], 0),
        ([1.0, NAN], [1.0, 2.0], NAN),
        ([1.0, 2.0], [1.0, math.inf], NAN),
        ([0.0, 0.0], [1.0, 2.0], NAN),
        ([1.0, 2.0], [1.0, 2.0, 3.0], NAN),
        ([], [], NAN),
    ],
)
def test_min_update_ratio_by_hand(backend, before, after, expected):
    found = ratio(torch.tensor(before), torch.tensor(after))
    assert found == pytest.approx(expected, nan_ok=True)


def test_min_update_ratio_is_nan_for_missing_tensors():
    history = History()
    lazy = torch.nn.LazyLinear(2)
    history.append(0, summarize(lazy))
    lazy(torch.ones(1, 3))
    history.append(1, summarize(lazy))
    history.append(2, summarize(lazy))
    history.append(3, summarize({"other": torch.ones(1)}))
    history.append(4, summarize(lazy, params=False))
    assert np.isnan(history["weight"].min_update_ratio).tolist() == [True, True, False, True, True]


# ---- optional dependencies


def test_history_needs_no_optional_library_before_arrays_are_used():
    code = """
import sys
for name in ("numpy", "matplotlib", "pandas"):
    sys.modules[name] = None
import torch, paramstats
h = paramstats.History()
h.append(0, paramstats.summarize(torch.nn.Linear(2, 2)))
print(len(h), h.names)
for use in (lambda: h["bias"], lambda: h.steps, h.to_pandas, h.plot, h.heatmap):
    try:
        use()
    except ImportError as error:
        print(str(error).removeprefix("paramstats: "))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "1 ('weight', 'bias')",
        "History needs numpy: pip install numpy",
        "History needs numpy: pip install numpy",
        "History.to_pandas needs pandas: pip install pandas",
        "History.plot needs matplotlib: pip install matplotlib",
        "History.heatmap needs matplotlib: pip install matplotlib",
    ]
