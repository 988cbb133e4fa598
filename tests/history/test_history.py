"""Summaries over training: arrays by name, the bound on memory, the least that a step moved."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import paramstats
from paramstats import History, Summary
from paramstats._core.options import STATS
from paramstats._core.reading import DeferredRecord
from paramstats._summary import record_of

summarize = paramstats.summarize


def train(history, model, steps):
    """Appends a summary at each step; the gradients of every third are taken away."""
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


# ---- what is there


def test_it_is_a_sequence_of_summaries(backend, model):
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


def test_series_have_the_figures_of_summaries(backend, model):
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
    total = history.total
    assert total.norm.tolist() == [summary.total.norm for _, summary in history]
    assert total.grad.norm[0] == next(iter(history))[1].total.grad.norm
    assert math.isnan(total.grad.norm[2])


def test_finite(backend):
    history = History()
    for step, bad in enumerate((1.0, math.nan, math.inf)):
        history.append(step, summarize({"w": torch.tensor([3.0, 4.0, bad])}))
    series = history["w"]
    assert series.norm[0] == pytest.approx(26**0.5) and math.isnan(series.norm[1])
    assert series.finite.norm[1:] == pytest.approx([5, 5])
    assert series.finite.count.tolist() == [3, 2, 2]
    assert series.nonfinite_count.tolist() == [0, 1, 1]


def test_arrays_are_the_callers_own(backend, model):
    series = train(History(), model, range(2))["0.bias"]
    series.mean[:] = 7
    assert 7 not in series.mean
    with pytest.raises(AttributeError):
        series.mean = 1  # type: ignore[misc]


def test_names_that_come_go_and_change_size(backend):
    history = History()
    history.append(0, summarize({"a": torch.ones(2)}))
    history.append(1, summarize({"b": torch.ones(3), "a": torch.ones(5)}))
    history.append(2, summarize({"b": torch.ones(3)}))
    assert history.names == ("a", "b")
    assert history["a"].count[:2].tolist() == [2, 5] and math.isnan(history["a"].mean[2])
    assert history["a"].shape == (5,)
    assert math.isnan(history["b"].mean[0]) and math.isnan(history["b"].grad.norm[2])


def test_aliases_and_unknown_names(backend, model):
    model[2].bias = torch.nn.Parameter(torch.ones(6))
    model[0].bias = model[2].bias
    model[2] = torch.nn.Identity()
    model[2].bias = model[0].bias
    history = History()
    history.append(0, summarize(model))
    assert history["2.bias"].norm == history["0.bias"].norm
    assert history["2.bias"].name == "0.bias" and history["0.bias"].aliases == ("2.bias",)
    assert history.names == ("0.weight", "0.bias") and "2.bias" in history
    with pytest.raises(KeyError, match=r"no parameter '0.weigth' among 2; did you mean '0.weight'"):
        history["0.weigth"]


def test_to_pandas(backend, model):
    history = train(History(), model, range(4))
    frame = history.to_pandas()
    assert list(frame.index.names) == ["step", "name"] and len(frame) == 4 * 4
    assert list(frame.columns) == [*STATS, *(f"grad_{stat}" for stat in STATS)]
    for step, summary in history:
        expected = summary.to_pandas()[frame.columns].astype(float)
        assert frame.loc[step].equals(expected)
    some = history.to_pandas(stats="norm")
    assert list(some.columns) == ["norm", "grad_norm"]
    wide = some["grad_norm"].unstack("name")
    assert wide["2.bias"].to_numpy() == pytest.approx(history["2.bias"].grad.norm, nan_ok=True)
    assert History().to_pandas().shape == (0, 30)
    assert history.to_pandas(stats=()).shape == (16, 0)
    with pytest.raises(ValueError, match="expected stats out of"):
        history.to_pandas(stats=("median",))


# ---- steps


@pytest.mark.parametrize("step", [3, 2, 0, -1])
def test_going_back_drops_what_comes_later(backend, step):
    history = History()
    for before in range(4):
        history.append(before, full(before))
    with pytest.warns(RuntimeWarning, match=f"step {step} comes after step 3, .*dropped"):
        history.append(step, full(10))
    assert history.steps.tolist() == [*range(max(step, 0)), step]
    assert history["w"].mean[-1] == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
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
def test_what_cannot_be_appended(step, summary, error, message):
    with pytest.raises(error, match=f"^paramstats.History: {message}"):
        History().append(step, summary or full(1))


def test_steps_may_be_numpys_and_negative():
    history = History()
    for step in (np.int64(-5), torch.tensor(3), 1 << 62):
        history.append(step, full(1))
    assert history.steps.tolist() == [-5, 3, 1 << 62]


# ---- statistics on their way


class Transfer:
    """A device's transfer that takes as long as the test likes."""

    def __init__(self, table: bytes) -> None:
        self.table, self.is_here, self.waits = table, False, 0

    def ready(self) -> bool:
        return self.is_here

    def write(self, table: bytearray) -> None:
        self.waits += not self.is_here
        table[:] = self.table


def pending(record, transfer):
    """A summary of `record`, whose table is still under way."""
    unfinished = record._replace(table=bytes(len(record.table)))
    return Summary(None, DeferredRecord(unfinished, [transfer]))


def test_append_waits_for_nothing(tmp_path):
    path = tmp_path / "run.jsonl"
    transfers = []
    with History(path) as history:
        for step in range(4):
            done = record_of(full(step))
            transfers.append(Transfer(done.table))
            history.append(step, pending(done, transfers[-1]))
        assert sum(transfer.waits for transfer in transfers) == 0 and len(history) == 4
        assert path.read_text().count('"step"') == 0
        transfers[0].is_here = transfers[2].is_here = True
        history.append(4, full(4))
        assert path.read_text().count('"step"') == 1, "in order: 1 is not here"
        assert sum(transfer.waits for transfer in transfers) == 0
        history.wait()
        assert [transfer.waits for transfer in transfers] == [0, 1, 0, 1]
        assert path.read_text().count('"step"') == 5
        assert history["w"].mean.tolist() == [0, 1, 2, 3, 4]


def test_close_and_save_take_what_is_on_its_way(tmp_path):
    for name, finish in (("closed", History.close), ("saved", lambda h: h.save(tmp_path / "x"))):
        history = History(tmp_path / name)
        done = record_of(full(3))
        summary = pending(done, Transfer(done.table))
        history.append(0, summary)
        finish(history)
        assert History.load(tmp_path / name)["w"].mean.tolist() == [3]
        assert summary.ready(), "the transfer's memory is let go of"
    assert list(History.load(tmp_path / "x")) == list(history)


# ---- memory


@pytest.mark.parametrize("entries", [1, 2, 3, 7, 64, 1000])
def test_entries_span_the_run_evenly(entries):
    bound = 16 * (2 * 72 + 400) + 1000
    history = History(max_bytes=bound)
    summary = full(1)
    for step in range(entries):
        history.append(step, summary)
        steps = history.steps
        assert history._kept.bytes <= bound and steps[0] == 0 and steps[-1] == step
        gaps = set(np.diff(steps)[:-1].tolist())
        assert len(gaps) <= 1, "one spacing up to the last but one"
        assert len(gaps) == 0 or np.diff(steps)[-1] <= min(gaps)
    assert len(history) == entries or len(history) >= 8


@pytest.mark.parametrize("stride", [1, 10])
@pytest.mark.parametrize("often", [1, 40])
def test_entries_stay_even_after_going_back(tmp_path, stride, often):
    bound = 16 * (2 * 72 + 400) + 1000
    history = History(tmp_path / "run.jsonl", max_bytes=bound)
    history._went_back = True
    summary = full(1)
    for time in range(often):
        for step in range(61 + 7 * time if time else 0, 500 + 11 * time):
            history.append(stride * step, summary)
    history.close()
    read = History.load(tmp_path / "run.jsonl", max_bytes=bound)
    for found in (history, read):
        gaps = np.diff(found.steps)[:-1]
        assert len(found) >= 8 and gaps.max() <= 2 * gaps.min(), gaps


def test_each_step_twice_keeps_as_many():
    history = History(max_bytes=16 * (2 * 72 + 400) + 1000)
    history._went_back = True
    for step in range(1000):
        for value in (1, 2):
            history.append(step, full(value))
    assert len(history) >= 8 and set(history["w"].mean) == {2}
    assert len(set(np.diff(history.steps)[:-1])) == 1


def test_two_entries_stay_at_any_bound(backend, model):
    history = train(History(max_bytes=1), model, range(20))
    assert history.steps.tolist() == [0, 19]


def test_the_bound_holds_for_real_sizes(backend):
    names = [f"block.{i}.weight" for i in range(200)]
    summarize({name: torch.ones(2) for name in names})
    bound = 1 << 20
    gc.collect()
    tracemalloc.start()
    history = History(max_bytes=bound)
    for step in range(120):  # a mapping gives every summary a layout of its own
        history.append(step, summarize({name: torch.ones(2) for name in names}))
    gc.collect()
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.4 * bound < used < bound, used
    assert 0.4 * bound < history._kept.bytes <= bound
    assert len({id(summary._layout) for _, summary in history}) == 1
    tables = sum(sys.getsizeof(record_of(summary).table) for _, summary in history)
    assert tables == len(history) * (144 * 200 + sys.getsizeof(b""))


def test_layouts_are_counted_while_they_are_used():
    history = History(max_bytes=200_000)
    for step in range(2000):  # a model that grows all the time
        names = [f"layer.{i}" for i in range(1 + step // 20)]
        history.append(step, summarize({name: torch.ones(1) for name in names}))
    layouts = {summary._layout for _, summary in history}
    kept = history._kept
    assert set(kept._uses) == layouts == set(kept._layouts.values())
    assert sum(kept._uses.values()) == len(history)
    expected = sum(144 * len(summary) + 400 for _, summary in history)
    assert expected < kept.bytes <= 200_000


@pytest.mark.parametrize("max_bytes", [0, -1, 1.5, None, True])
def test_max_bytes_is_a_size(max_bytes):
    with pytest.raises(ValueError, match="expected a number of bytes > 0 for max_bytes, got"):
        History(max_bytes=max_bytes)


# ---- the least that a step moved


def ratio(before: torch.Tensor, after: torch.Tensor) -> float:
    history = History()
    for step, x in enumerate((before, after)):
        history.append(step, summarize({"w": x}))
    first, second = history["w"].min_update_ratio
    assert math.isnan(first)
    return second


NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)
PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=40)


@given(PAIRS, st.sampled_from([1.0, 1e-3, 1e-8]), st.booleans())
def test_update_ratio_never_exceeds_the_true_one(pairs, size, is_complex):
    before, change = torch.tensor(pairs, dtype=torch.float64).T
    if is_complex:
        before, change = torch.complex(before, before.flip(0)), torch.complex(change, -change)
    after = before + size * change
    norm = before.norm().item()
    if norm < 1e-100:
        return
    bound = ratio(before, after)
    true = (after - before).norm().item() / norm
    rounding = 1e-13 * max(1.0, after.norm().item() / norm)  # of float64, over up to 40 elements
    assert 0 <= bound <= true + rounding


@given(
    st.lists(NUMBERS, min_size=2, max_size=40), NUMBERS, st.floats(0, 3), st.sampled_from([0, 1])
)
def test_update_ratio_is_exact_for_shifts_and_scalings(values, shift, scale, is_scaled):
    before = torch.tensor(values, dtype=torch.float64)
    norm = before.norm().item()
    if norm < 1e-3:
        return
    mean = before.mean()
    after = mean + scale * (before - mean) if is_scaled else before + shift
    true = (after - before).norm().item() / norm
    rounding = 1e-13 * max(1.0, after.norm().item() / norm)
    assert ratio(before, after) == pytest.approx(true, rel=1e-9, abs=rounding)


def test_update_ratio_by_hand(backend):
    x = torch.tensor([3.0, 5.0])  # mean 4, deviations -1 and 1, norm sqrt(34)
    assert ratio(x, x + 1) == pytest.approx((2 / 34) ** 0.5)
    assert ratio(x, torch.tensor([2.0, 6.0])) == pytest.approx((2 / 34) ** 0.5)
    assert ratio(x, x.flip(0)) == 0, "a swap keeps mean and spread"
    assert ratio(x, x) == 0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([1.0, math.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, math.inf]),
        ([0.0, 0.0], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, 2.0, 3.0]),
        ([[1.0, 2.0]], [1.0, 2.0]),
        ([], []),
    ],
)
def test_update_ratio_is_nan_where_nothing_is_known(backend, before, after):
    assert math.isnan(ratio(torch.tensor(before), torch.tensor(after)))


def test_update_ratio_of_what_is_not_there(backend):
    history = History()
    lazy = torch.nn.LazyLinear(2)
    history.append(0, summarize(lazy))
    lazy(torch.ones(1, 3))
    history.append(1, summarize(lazy))
    history.append(2, summarize(lazy))
    history.append(3, summarize({"other": torch.ones(1)}))
    history.append(4, summarize(lazy, params=False))
    assert np.isnan(history["weight"].min_update_ratio).tolist() == [True, True, False, True, True]


# ---- what it needs


def test_history_needs_nothing_before_arrays_are_asked_for():
    code = """
import sys
for name in ("numpy", "matplotlib", "pandas"):
    sys.modules[name] = None
import torch, paramstats
history = paramstats.History()
history.append(0, paramstats.summarize(torch.nn.Linear(2, 2)))
print(len(history), history.names)
for use in (lambda: history["weight"], lambda: history.steps, lambda: history.to_pandas()):
    try:
        use()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "1 ('weight', 'bias')",
        "paramstats: History needs numpy: pip install numpy",
        "paramstats: History needs numpy: pip install numpy",
        "paramstats: History.to_pandas needs pandas: pip install pandas",
    ]
