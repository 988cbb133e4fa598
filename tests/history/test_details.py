"""Test what histories keep of distributions, rows and zero rows: files, memory and series."""

from __future__ import annotations

import base64
import copy
import gc
import json
import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from paramstats import History, Summary, summarize
from paramstats._core.details import NOT_KNOWN, Detail, Distribution
from paramstats._core.options import DISTRIBUTION_STATS
from paramstats._summary import record_of
from tests.history.test_file import (
    are_identical,
    assert_refused,
    details_content,
    layout_and_entry,
    use_everything,
    write_lines,
)

QUANTILES = (0.0, 0.1, 0.5, 0.99, 1.0)
COLUMNS = ["mean", "m2", "abs_max", "zeros", "nonfinite", "hash"]
ROW = np.dtype({"names": COLUMNS, "formats": ["<f8"] * 3 + ["<i8"] * 2 + ["<u8"]})
"""A row in a file, as docs/history.md describes it."""


def sources() -> list[dict[str, torch.Tensor]]:
    """Return tensors of all kinds with gradients; the second group has dead rows."""
    torch.manual_seed(0)
    special = torch.tensor([[math.nan, math.inf, 0.0], [-math.inf, -0.0, 1e-40]])
    kinds = {
        "normal": torch.randn(40, 30),
        "NaN": special,  # names that are words of JSON
        "Infinity": torch.randn(4, 3, dtype=torch.float64).mul_(1e60),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(-3.0),
        "constant": torch.full((3, 2), 0.1),
        "short": torch.randn(5, 7).bfloat16(),
        "zero": torch.zeros(9, 2),
        "integer": torch.tensor([[2**62, -(2**63)], [0, 5]]),
        "byte": torch.arange(6, dtype=torch.uint8).view(3, 2),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([[1 + 2j], [0]]),
        "sparse": torch.eye(4).to_sparse(),
    }
    dead = torch.randn(64, 20)
    dead[3:43] = 0
    dead[50] = dead[51]
    group = {"weight": torch.nn.Parameter(torch.randn(64, 20)), "dead": torch.nn.Parameter(dead)}
    for p in group.values():
        p.grad = dead * 1e-3
    return [kinds, group]


def statistics(stats) -> list[object]:
    """Return everything that can be asked of a tensor's details."""
    rows, histogram = stats.rows, stats.histogram
    return [
        [stats.quantile(q) for q in QUANTILES],
        [getattr(stats, name) for name in DISTRIBUTION_STATS],
        None if histogram is None else histogram.edges(),
        None if histogram is None else [histogram.underflow("float8_e5m2", "mx")],
        stats.zero_rows,
        rows and [getattr(rows, name).tolist() for name in ("mean", "std", "norm", "abs_max")],
        rows and (rows.zero_count.tolist(), rows.nonfinite_count.tolist(), rows.dead, rows.equal),
    ]


@pytest.mark.filterwarnings("ignore:.*complex numbers have no")
def test_loaded_details_give_equal_statistics(backend, tmp_path):
    path = tmp_path / "run.jsonl"
    kinds, group = sources()
    with History(path) as history:
        history.append(0, summarize(kinds, distribution=True, rows=True))
        history.append(1, summarize(group, distribution=True, rows=True, grad_scale=3.0))
        history.append(2, summarize(group, distribution="dead", correction=0))
        history.append(3, summarize(group, rows="weight"))
        history.append(4, summarize(group))  # zero rows are always known
    loaded = History.load(path)
    assert are_identical(loaded, history) and list(loaded) == list(history)
    for (_, a), (_, b) in zip(history, loaded, strict=True):
        for x, y in [*((a[name], b[name]) for name in a), (a.total, b.total)]:
            assert repr(statistics(x)) == repr(statistics(y))  # NaN equals NaN
            if x.grad is not None:
                assert repr(statistics(x.grad)) == repr(statistics(y.grad))
    _, last = list(loaded)[-1]
    assert last["dead"].zero_rows == last["weight"].grad.zero_rows == tuple(range(3, 43))
    assert list(loaded)[1][1]["dead"].rows.equal == ((50, 51),)
    loaded.save(tmp_path / "saved.jsonl")
    assert (tmp_path / "saved.jsonl").read_bytes() == path.read_bytes()


def test_another_program_can_read_details(backend, tmp_path):
    """With json, base64 and numpy, as docs/history.md says."""
    path = tmp_path / "run.jsonl"
    _, group = sources()
    with History(path) as history:
        history.append(0, summarize(group, distribution=True, rows=True))
    details = json.loads(path.read_text().splitlines()[-1])["details"]
    assert list(details) == ["distribution", "rows", "zero_rows"]
    for kind, name in (("params", "weight"), ("params", "dead"), ("grads", "dead")):
        tensor = group[name] if kind == "params" else group[name].grad
        x = tensor.detach().double().numpy()
        one = details["distribution"][kind][name]
        for sign, counts in ((-1, one["negative"]), (1, one["positive"])):
            _, exponents = np.frexp(np.abs(x[x * sign > 0]))
            at = np.bincount(exponents - 1 - one["first"], minlength=len(counts))
            assert at.tolist() == counts
        d = (x - x.mean()).ravel()
        found = [one[key] for key in ("mean", "m2", "m3", "m4", "abs_mean")]
        expected = [x.mean(), (d**2).sum(), (d**3).sum(), (d**4).sum(), np.abs(x).mean()]
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6 * (np.abs(d) ** 3).sum())
        numel, text = details["rows"][kind][name]
        rows = np.frombuffer(base64.b64decode(text), ROW)
        assert numel == 20 and rows["mean"] == pytest.approx(x.mean(1), abs=1e-6)
        assert rows["m2"] == pytest.approx(x.var(1) * numel, abs=1e-4)
        assert rows["abs_max"].tolist() == np.abs(x).max(1).tolist()
        assert rows["zeros"].tolist() == (x == 0).sum(1).tolist() and not rows["nonfinite"].any()
    n, text = details["zero_rows"]["params"]["dead"]
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    is_zero = np.unpackbits(bits, count=n, bitorder="little")
    assert is_zero.nonzero()[0].tolist() == list(range(3, 43))
    assert "weight" not in details["zero_rows"]["params"]


def test_files_without_details_are_read_as_before(tmp_path):
    path = tmp_path / "run.jsonl"
    with History(path) as history:
        history.append(0, summarize(sources()[1], distribution=True, rows=True))
    _, layout, entry = map(json.loads, path.read_text().splitlines())
    del entry["details"]
    write_lines(path, layout, entry)
    (_, before), (_, after) = *history, *History.load(path)
    assert record_of(before)._replace(details={}) == record_of(after)
    assert after["dead"].histogram is after["dead"].rows is None and after["dead"].zero_rows == ()


def test_moments_may_leave_the_range_of_float64(tmp_path):
    path = tmp_path / "run.jsonl"
    record = record_of(summarize({"NaN": torch.randn(50)}, distribution=True))
    one = Distribution.unpack(record.details[0].distribution)._replace(m3=-math.inf, m4=math.nan)
    record = record._replace(details={0: Detail(one.pack())})
    with History(path) as history:
        history.append(0, Summary(record))
    assert '"NaN":{"first"' in path.read_text() and '"m3":-1e999,"m4":null' in path.read_text()
    assert are_identical(History.load(path), history)


def test_zero_rows_that_are_not_known_stay_so(tmp_path):
    path = tmp_path / "run.jsonl"
    record = record_of(summarize({"w": torch.zeros(3)}))
    record = record._replace(details={0: Detail(zero_rows=NOT_KNOWN)})
    with History(path) as history:
        history.append(0, Summary(record))
    assert json.loads(path.read_text().splitlines()[-1])["details"] == {
        "zero_rows": {"params": {"w": "not known"}}
    }
    assert are_identical(History.load(path), history)
    assert next(iter(History.load(path)))[1]["w"].zero_rows is None


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 2), torch.tensor([[1, 0], [0, math.nan]]), torch.ones(3, 3)]
)
def test_details_of_a_tensor_that_changed_meanwhile_are_not_written(tmp_path, x):
    """Another thread may change elements between two reads; the file must be readable."""
    path = tmp_path / "run.jsonl"
    before, after = (
        record_of(summarize({"w": x, "v": torch.ones(2, 2)}, distribution=True, rows=True))
        for x in (x, torch.eye(2))
    )
    with History(path) as history:
        history.append(0, Summary(after._replace(details={**after.details, 0: before.details[0]})))
    ((_, summary),) = History.load(path)
    assert summary["w"].histogram is summary["w"].rows is None and summary["w"].zero_rows == ()
    assert summary["w"].norm == math.sqrt(2)
    assert summary["v"].histogram.count == 4 and summary["v"].rows.equal == ((0, 1),)


# ---- invalid values


def encoded(text: str, change) -> str:
    data = bytearray(base64.b64decode(text))
    change(data)
    return base64.b64encode(data).decode()


def word(index: int, value: float):
    form = "<d" if isinstance(value, float) else "<q"
    return lambda data: struct.pack_into(form, data, 8 * index, value)


W = ("distribution", "params", "w")
ROWS, ZERO_ROWS = ("rows", "params", "w"), ("zero_rows", "params", "w")
TEXT = details_content()["rows"]["params"]["w"][1]
INVALID = [
    ((), []),
    (("distribution",), []),
    (("distribution", "params"), None),
    (("distribution", "params"), {"other": details_content()["distribution"]["params"]["w"]}),
    (("distribution", "params"), {"b": details_content()["distribution"]["params"]["w"]}),
    (("distribution", "grads"), {"b": details_content()["distribution"]["params"]["w"]}),
    (W, 3),
    ((*W, "first"), 0.5),
    ((*W, "first"), -1075),
    ((*W, "first"), 1023),
    ((*W, "negative"), [0]),
    ((*W, "negative"), [0, True]),
    ((*W, "negative"), [-1, 1]),
    ((*W, "negative"), [1, 0]),
    ((*W, "positive"), [2.0, 1]),
    ((*W, "positive"), [1 << 64, 1]),
    ((*W, "positive"), None),
    ((*W, "mean"), "0.5"),
    ((*W, "mean"), 1.1),
    ((*W, "mean"), None),
    ((*W, "m2"), -1.0),
    ((*W, "m4"), -1.0),
    ((*W, "abs_mean"), -1.0),
    ((*W, "mx"), [0] * 5),
    ((*W, "mx"), [0, 0, 0, 0, -1, 0]),
    ((*W, "mx"), [2, 2, 0, 0, 0, 0]),
    (ROWS, [2]),
    (ROWS, [2, TEXT, 0]),
    (ROWS, [3, TEXT]),
    (ROWS, [2.0, TEXT]),
    (ROWS, [2, 5]),
    (ROWS, [2, TEXT[:-4]]),
    (ROWS, [2, TEXT[:64]]),
    (ROWS, [2, "!" * 128]),
    (ROWS, [2, encoded(TEXT, word(1, -1.0))]),
    (ROWS, [2, encoded(TEXT, word(2, -1.0))]),
    (ROWS, [2, encoded(TEXT, word(3, -1))]),
    (ROWS, [2, encoded(TEXT, word(3, 1))]),
    (ROWS, [2, encoded(TEXT, word(10, 0))]),
    (ROWS, [2, encoded(TEXT, word(4, 3))]),
    (ROWS, [2, encoded(encoded(TEXT, word(3, -1)), word(9, 1))]),
    (ROWS, [2, encoded(encoded(TEXT, word(4, -1)), word(10, 2))]),
    (ZERO_ROWS, None),
    (ZERO_ROWS, "known"),
    (ZERO_ROWS, [2, "AQ=="]),
    (("zero_rows", "params", "b"), "not known"),
]


@pytest.mark.parametrize(("keys", "value"), INVALID)
def test_an_invalid_value_is_an_error(tmp_path, keys, value):
    path = tmp_path / "run.jsonl"
    layout, entry = layout_and_entry()
    entry["details"] = details_content()
    write_lines(path, layout, entry)
    use_everything(History.load(path))
    place, key = entry, "details"
    for next_key in keys:
        place, key = place[key], next_key
    place[key] = copy.deepcopy(value)
    write_lines(path, layout, entry, entry)
    assert_refused(path, "expected whole lines, got a broken one, line 3 of ")


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("rows", word(3, 3)),  # zeros of the first row, of two elements
        ("zero_rows", [3, "BQA="]),
        ("zero_rows", [3, "DQ=="]),
        ("zero_rows", [3, "AA=="]),
        ("zero_rows", [3, "Bw=="]),
        ("zero_rows", [4, "BQ=="]),
        ("zero_rows", [0, ""]),
        ("zero_rows", [-3, "BQ=="]),
        ("zero_rows", [1 << 64, "BQ=="]),
    ],
)
def test_zeros_that_no_tensor_has(tmp_path, what, change):
    path = tmp_path / "run.jsonl"
    x = torch.tensor([[0.0, 0], [1, 2], [0, 0]])
    with History(path) as history:
        history.append(0, summarize({"w": x}, rows=True))
    _, layout, entry = map(json.loads, path.read_text().splitlines())
    of_kind = entry["details"][what]["params"]
    assert entry["details"]["zero_rows"]["params"]["w"] == [3, "BQ=="]
    if what == "rows":
        text = encoded(of_kind["w"][1], change)
        change = [2, encoded(text, word(15, 1))]  # the same sum
    of_kind["w"] = change
    write_lines(path, layout, entry, entry)
    assert_refused(path, "expected whole lines, got a broken one, line 3 of ")


# ---- memory


@pytest.mark.parametrize("options", [{"distribution": True}, {"rows": True}, {}])
def test_memory_includes_details(options):
    params = {f"block.{i}": torch.nn.Parameter(torch.randn(16, 8)) for i in range(60)}
    for p in params.values():
        p.grad = torch.eye(16, 8)  # has zero rows
    limit = 1 << 20
    summarize(params, **options)
    gc.collect()
    tracemalloc.start()
    history = History(max_bytes=limit)
    for step in range(100):
        history.append(step, summarize(params, **options))
    gc.collect()
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(history) < 60 and 0.4 * limit < used < limit, used
