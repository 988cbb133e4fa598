"""Test the files of histories: reading, damage, and what is written when all goes well."""

from __future__ import annotations

import base64
import copy
import json
import math
import os
import pickle
import re
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import paramstats
from paramstats import History, Summary
from paramstats._core.record import Record
from paramstats._summary import layout_of, record_of

summarize = paramstats.summarize


def resumed(path) -> History:
    return History(path, resume=True)


OPENERS = (History.load, resumed)


def ones(n: int = 1) -> Summary:
    return summarize({"w": torch.ones(n)})


class MixedModule(torch.nn.Module):
    """Has ties, buffers, lazy, meta, complex, empty and non-finite tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(3, 2)
        self.two = torch.nn.Linear(3, 2)
        self.two.weight = self.one.weight
        self.norm = torch.nn.BatchNorm1d(2)
        self.lazy = torch.nn.LazyLinear(2)
        self.empty = torch.nn.Parameter(torch.empty(0, 4))
        self.meta = torch.nn.Parameter(torch.empty(2, 2, device="meta"))
        self.short = torch.nn.Parameter(torch.tensor([1e-7, -0.0], dtype=torch.bfloat16))
        self.complex = torch.nn.Parameter(torch.tensor([1 + 2j, math.nan]), requires_grad=False)
        self.nan = torch.nn.Parameter(torch.tensor([math.nan, math.inf, -math.inf, 0.1]))
        self.large = torch.nn.Parameter(torch.tensor([1e308, -1e308], dtype=torch.float64))
        self.register_buffer('"quoted"\n\u00e9', torch.tensor([1, 2, 3]))
        self.one.weight.grad = torch.full((2, 3), 0.1)
        self.nan.grad = torch.tensor([math.nan, 0.0, 0.0, 1.0])


def mixed_summaries() -> list[Summary]:
    torch.manual_seed(0)
    model = MixedModule()
    full = summarize(model)
    plain = summarize({"a": torch.randn(5), "b": torch.randn(2, 2)}, correction=0)
    reasons = {"a": "TypeError: hidden"}, {"b": "ranks 1, 3: \u00fc"}
    layout, table = layout_of(plain), record_of(plain).table
    return [
        full,
        summarize(model, buffers=True, grad_scale=65536.0),
        summarize(model, params=False),
        plain,
        plain,
        summarize({}),
        Summary(Record(layout, table, 1.0, 1.0, *reasons, True)),
        full,
    ]


def are_identical(a: History, b: History) -> bool:
    """Compare all bits, and what `Summary.__eq__` leaves out."""
    contents = [
        [
            (step, s, record_of(s)._replace(layout=None), record_of(s).layout.fields)
            for step, s in history
        ]
        for history in (a, b)
    ]
    return contents[0] == contents[1]


def written(path) -> History:
    with History(path) as history:
        for step, summary in enumerate(mixed_summaries()):
            history.append(10 * step, summary)
    return history


# ---- whole files


def test_load_returns_equal_summaries(backend, tmp_path):
    history = written(tmp_path / "run.jsonl")
    assert are_identical(History.load(tmp_path / "run.jsonl"), history)
    history.save(tmp_path / "saved.jsonl")
    assert (tmp_path / "saved.jsonl").read_bytes() == (tmp_path / "run.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["run.jsonl", "saved.jsonl"], "no temporary file is left"


def test_every_line_is_standard_json(tmp_path, model):
    path = tmp_path / "run.jsonl"
    with History(path) as history:
        for step in (0, 7):
            history.append(step, summarize(model))
    written(path.with_name("mixed.jsonl"))

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    for name in ("run.jsonl", "mixed.jsonl"):
        for line in (tmp_path / name).read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    header, layout, *entries = map(json.loads, path.read_text().splitlines())
    assert header == {"paramstats": "history", "version": 1}
    assert layout == {
        "names": ["0.weight", "0.bias", "2.weight", "2.bias"],
        "aliases": {},
        "parameters": 4,
        "shapes": [[6, 8], [6], [3, 6], [3]],
        "dtypes": ["float32"] * 4,
        "devices": ["cpu"] * 4,
        "requires_grad": [True] * 4,
    }
    assert [entry["step"] for entry in entries] == [0, 7]
    assert list(entries[0]) == ["step", "number", "correction", "grad_scale", "params", "grads"]
    grads = entries[0]["grads"]
    assert list(grads) == ["mean", "m2", "min", "max"], "columns of defaults are left out"
    norm = math.sqrt(grads["m2"][0] + 48 * grads["mean"][0] ** 2)
    assert norm == pytest.approx(summarize(model)["0.weight"].grad.norm, rel=1e-12)


def test_existing_file_is_continued(tmp_path, model):
    path = tmp_path / "run.jsonl"
    with History(path) as first:
        first.append(0, summarize(model))
        first.append(1, summarize(model))
    with resumed(path) as second:
        assert are_identical(second, first)
        second.append(2, summarize(model))
    assert path.read_text().count('"names"') == 1, "the layout is already in the file"
    third = resumed(path)
    with pytest.warns(RuntimeWarning, match="step 1 comes after step 2"):
        third.append(1, ones())
    assert third.steps.tolist() == [0, 1] and third.names[-1] == "w"
    assert are_identical(History.load(path), third), "dropped entries stay dropped"
    third.close()
    third.append(5, ones())  # no file is open between two calls
    assert are_identical(History.load(path), third)
    kinds = ["names" if "names" in line else "step" for line in path.read_text().splitlines()[1:]]
    assert kinds == ["names", *["step"] * 3, "names", *["step"] * 2], "a layout where it changes"


def test_file_keeps_entries_that_memory_drops(tmp_path):
    path = tmp_path / "run.jsonl"
    limit = 16 * (2 * 72 + 400) + 1000
    with History(path, max_bytes=limit) as history:
        for step in range(100):
            history.append(step, ones())
    assert len(history) < 20 and len(History.load(path)) == 100
    assert are_identical(History.load(path, max_bytes=limit), history)
    history.save(tmp_path / "thin.jsonl")
    thin = History.load(tmp_path / "thin.jsonl")
    for step in range(100, 140):  # continues at the spacing of the file
        thin.append(step, ones())
    assert {b - a for a, b in zip(thin.steps[:-1], thin.steps[1:-1], strict=False)} == {8}


# ---- broken files


def test_file_cut_at_any_byte_loads_up_to_the_cut(tmp_path):
    path = tmp_path / "run.jsonl"
    with History(path) as history:
        for step in range(4):
            history.append(step, summarize({"w": torch.full((1 + step // 2,), 0.1)}))
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        is_broken = cut > sum(map(len, lines[:whole]))
        entries = sum(b'"step"' in line for line in lines[:whole])
        for open_ in OPENERS:  # History cuts the file, so it comes last
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = open_(path)
            assert [str(w.message) for w in caught] == is_broken * [
                f"paramstats.History: the end of '{path}' is broken, as after a crash: 1 line lost"
            ]
            assert len(found) == entries
        found.append(100, ones(2))
        again = History.load(path)
        assert again.steps.tolist() == [*range(entries), 100] and are_identical(again, found)


def test_several_broken_lines_at_the_end_are_counted(tmp_path):
    path = tmp_path / "run.jsonl"
    written(path)
    with open(path, "ab") as file:
        file.write(b"\0\0\0\n{}x\n\xff\n{")
    with pytest.warns(RuntimeWarning, match="4 lines lost"):
        assert len(History.load(path)) == 8


def assert_refused(path, message: str) -> None:
    """Assert that no way to open the file changes it, and that each raises ValueError."""
    before = path.read_bytes()
    for open_ in OPENERS:
        with pytest.raises(ValueError, match=f"^paramstats.History: {message}"):
            open_(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("number", "damage"),
    [
        (4, lambda line: line[:-20] + b"\n"),
        (4, lambda line: b'{"step": 1, "number": 1}\n'),
        (2, lambda line: line.replace(b"float32", b"float31")),
        (2, lambda line: b""),
        (17, lambda line: b"5\n"),
        (17, lambda line: b"[]\n"),
        (17, lambda line: b"{}\n"),
        (17, lambda line: b"[" * 100_000 + b"\n"),
    ],
)
def test_damaged_line_is_an_error(tmp_path, number, damage):
    path = tmp_path / "run.jsonl"
    written(path)
    lines = [*path.read_bytes().splitlines(keepends=True), b""]
    assert len(lines) == 17
    lines[number - 1] = damage(lines[number - 1])
    path.write_bytes(b"".join(lines))
    assert_refused(path, f"expected whole lines, got a broken one, line {number} of .*head -n")


@pytest.mark.parametrize(
    "content",
    [
        b"step,loss\n1,2\n",
        b"\x89PNG\r\n",
        b"[1]\n",
        b"{}\n",
        b"[" * 5000,
        b'{"paramstats": "history", "version": 2}\n',
    ],
)
def test_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "other.txt"
    path.write_bytes(content)
    assert_refused(path, "expected a file that History wrote, of version 1, got .*begins with b'")


def test_load_does_not_create_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        History.load(tmp_path / "missing.jsonl")
    assert not (tmp_path / "missing.jsonl").exists()


# ---- lines that are JSON and have invalid values


def layout_and_entry() -> tuple[dict, dict]:
    """Return the content of a layout line and of an entry line."""
    column = {"mean": [0.5, None], "m2": [0.5, None], "min": [0, None], "max": [1, None]}
    return (
        {
            "names": ["w", "b"],
            "aliases": {"w": ["v"]},
            "parameters": 2,
            "shapes": [[2, 2], None],
            "dtypes": ["float32", "bfloat16"],
            "devices": ["cpu", "cuda:0"],
            "requires_grad": [True, False],
        },
        {
            "step": 3,
            "number": 0,
            "correction": 1.0,
            "grad_scale": 2.0,
            "skipped": {"b": "lazy"},
            "params": {"nans": [1, 0], **copy.deepcopy(column)},
            "grads": {"count": [4, -1], **column},
        },
    )


def optimizer_content() -> dict:
    """Return what an entry has about an optimizer of the first of its two tensors."""
    row = {"count": [4, -1], "mean": [0.5, None]}
    state = {**row, "m2": [0.0, None], "min": [0.5, None], "max": [0.5, None]}
    step = {name: [1, None] for name in state} | {"count": [1, -1], "m2": [0, None]}
    return {
        "groups": [{"lr": 0.1}],
        "group": [0, None],
        "methods": ["formula", ""],
        "updates": {"update": state, **dict.fromkeys(("grad_momentum", "update_grad", "lag"), row)},
        "state": {"exp_avg": state, "step": step},
    }


def details_content() -> dict:
    """Return what the entry has about the distribution and the rows of its first tensor."""
    moments = {"mean": 0.5, "m2": 0.5, "m3": 0.0, "m4": None, "abs_mean": 0.5}
    counts = {"first": -1, "negative": [0, 0], "positive": [2, 1], "mx": [1, 0, 0, 0, 0, 2]}
    rows = struct.pack("<3d2qQ3d2qQ", *(0.5, 0.5, 1, 0, 0, 7), *(0.5, 0, 0.5, 0, 1, 8))
    return {
        "distribution": {"params": {"w": counts | moments}, "grads": {}},
        "rows": {"params": {"w": [2, base64.b64encode(rows).decode()]}},
        "zero_rows": {"params": {"w": "not known"}},
    }


def write_lines(path, *lines) -> None:
    texts = [json.dumps(line) for line in ({"paramstats": "history", "version": 1}, *lines)]
    path.write_text("".join(f"{text}\n" for text in texts))


def use_everything(history: History) -> None:
    for _, summary in history:
        str(summary), summary.to_dict(), summary.scalars(), summary.total.grad, repr(summary)
        pickle.dumps(summary)
    for name in history.names:
        assert len(history[name].norm) == len(history[name].grad.finite.std) == len(history)
        assert len(history[name].min_update_ratio) == len(history)
        assert len(history[name].update.norm) == len(history[name].update_ratio) == len(history)
        for one in (history[name], history[name].grad):
            assert len(one.skewness) == len(one.kurtosis) == len(one.abs_mean) == len(history)
            for histogram in filter(None, one.histogram):
                histogram.to_numpy(), histogram.quantile(0.3), histogram.underflow("float16")
                assert 0 <= histogram.overflow("float8_e5m2", "mx") <= 1
        for _, summary in history:
            entry = summary.get(name)
            if entry is not None and entry.rows is not None:
                assert len(entry.rows.norm) == len(entry.rows.zero_count) >= len(entry.rows.dead)
                assert len(entry.zero_rows or ()) <= len(entry.rows)
        optimizer = history[name].optimizer
        for series in optimizer.state.values():
            assert len(series.norm) == len(history)
        arrays = [optimizer.step, optimizer.lr, optimizer.rms, optimizer.eps_fraction]
        arrays += [optimizer.cosine("grad", "exp_avg"), optimizer.cosine("grad", "update")]
        assert {len(array) for array in arrays} == {len(history)}
    assert len(history.total.grad.mean) == len(history.steps)
    assert len(history.total.optimizer.rms) == len(history.steps)
    repr(history)


PARAMS = layout_and_entry()[1]["params"]


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        (0, "names", ["w", "w"]),
        (0, "names", ["w", 3]),
        (0, "parameters", 99),
        (0, "parameters", -1),
        (0, "parameters", True),
        (0, "aliases", {"w": "v"}),
        (0, "shapes", [[2, -2], None]),
        (0, "shapes", [[2.0, 2], None]),
        (0, "dtypes", ["randn", "hub"]),
        (0, "devices", ["newdev:0", "cpu"]),
        (0, "devices", [0, 0]),
        (0, "requires_grad", [[], {}]),
        (0, "aliases", {"w": ["b"]}),
        (0, "aliases", {"w": ["v", "v"]}),
        (0, "aliases", {"other": ["v"]}),
        (0, "is_sharded", 1),
        (1, "step", 0.5),
        (1, "step", None),
        (1, "step", 1 << 63),
        (1, "number", 0.5),
        (1, "number", -1),
        (1, "grad_scale", 0),
        (1, "grad_scale", 1e-320),
        (1, "correction", "1"),
        (1, "skipped", ["b"]),
        (1, "params", {"mean": [1]}),
        (1, "params", {**PARAMS, "nans": [5, 0]}),
        (1, "params", {**PARAMS, "zeros": [-1, 0]}),
        (1, "params", {**PARAMS, "count": [-2, 0]}),
        (1, "params", {**PARAMS, "m2": [-1.0, 0]}),
        (1, "params", {**PARAMS, "count": [1 << 62, 1 << 62]}),
        (1, "params", {**PARAMS, "count": [-1, 0]}),
        (1, "params", {**PARAMS, "count": [4, -1]}),
        (1, "params", {**PARAMS, "min": [2, None]}),
        (1, "params", {**PARAMS, "mean": [1.1, None]}),
        (1, "params", {**PARAMS, "mean": [-0.1, None]}),
        (1, "params", {**PARAMS, "mean": [1e999, None]}),
        (1, "params", {**PARAMS, "max": [1e999, None]}),
        (1, "params", {**PARAMS, "m2": [0.8, None]}),
        (1, "params", {**PARAMS, "m2": [None, None]}),
        (1, "params", {**PARAMS, "min": [None, None]}),
        (1, "params", {**PARAMS, "mean": [None, None]}),
        (1, "params", {**PARAMS, "zeros": [1, 0], "min": [0.1, None]}),
        (1, "params", {**PARAMS, "nans": [4, 0]}),
        (1, "grads", {**PARAMS, "count": [-1, -1]}),
        (1, "grads", {**PARAMS, "count": [-2, -1]}),
    ],
)
def test_invalid_value_is_an_error(tmp_path, line, key, value):
    path = tmp_path / "run.jsonl"
    lines = layout_and_entry()
    write_lines(path, *lines)
    use_everything(History.load(path))
    lines[line][key] = value
    for rest in ((), layout_and_entry()):
        write_lines(path, *lines[: line + 1], *rest)
        assert_refused(
            path, f"expected whole lines, got a broken one, line {line + 2} of .*head -n"
        )


TOKENS = re.compile(r'"[^"]*"|[-+.0-9e]+|null|true|false')
REPLACEMENTS = [
    *("null", "true", "[]", "[[]]", "{}", '{"w": 1}', '"w"', '"cpu"', '"float64"', '"hub"', '""'),
    *("-1", "0", "3", "0.5", "1e308", "1e-320", "1e999", str(1 << 62), str(1 << 63), "1" * 400),
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_random_values_are_refused_or_usable(tmp_path, data):
    path = tmp_path / "run.jsonl"
    layout, entry = layout_and_entry()
    known = {**entry, "step": 4, "number": 1, "optimizer": optimizer_content()}
    known["details"] = details_content()
    write_lines(path, layout, entry, known)
    header, *lines = path.read_text().splitlines(keepends=True)
    for _ in range(data.draw(st.integers(1, 2))):
        i = data.draw(st.integers(0, 2))
        start, stop = data.draw(st.sampled_from([m.span() for m in TOKENS.finditer(lines[i])]))
        new = data.draw(st.sampled_from(REPLACEMENTS))
        lines[i] = lines[i][:start] + new + lines[i][stop:]
    path.write_text(header + "".join(lines))
    try:
        with warnings.catch_warnings():  # a last line that is no JSON looks like a crash
            warnings.simplefilter("ignore")
            history = History.load(path, max_bytes=2000)
    except ValueError as error:
        assert str(error).startswith("paramstats.History: expected")  # noqa: PT017
        return
    use_everything(history)


# ---- threads and copies


@pytest.mark.filterwarnings("ignore:.*the run went back")  # threads overtake each other
def test_threads_may_append(tmp_path):
    path = tmp_path / "run.jsonl"
    history = History(path)
    one = ones()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda step: history.append(step, one), range(2400)))
    history.close()
    assert path.read_text().count('"step"') == 2400, "with those that were dropped"
    assert are_identical(History.load(path), history)


def test_copies_do_not_write(tmp_path):
    path = tmp_path / "run.jsonl"
    history = History(path)
    history.append(0, ones())
    before = path.read_bytes()
    for copied in (pickle.loads(pickle.dumps(history)), copy.deepcopy(history)):
        assert are_identical(copied, history)
        copied.append(1, ones())
        copied.close()
        assert len(copied) == 2 and path.read_bytes() == before


def test_subnormal_statistics_are_kept_while_torch_flushes_them(tmp_path):
    tiny = torch.full((4,), 5e-324, dtype=torch.float64)
    torch.set_flush_denormal(True)
    try:
        with History(tmp_path / "h.jsonl") as history:
            history.append(0, summarize({"w": tiny}))
        loaded = History.load(tmp_path / "h.jsonl")
    finally:
        torch.set_flush_denormal(False)
    ((_, summary),) = loaded
    assert summary["w"].max == 5e-324
