"""Test the files of histories: writing, reading, damage, locks."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import pickle
import re
import resource
import subprocess
import sys
import time
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
OPENERS = (History.load, History)


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
    with History(path) as second:
        assert are_identical(second, first)
        second.append(2, summarize(model))
    assert path.read_text().count('"names"') == 1, "the layout is already in the file"
    third = History(path)
    with pytest.warns(RuntimeWarning, match="step 1 comes after step 2"):
        third.append(1, ones())
    assert third.steps.tolist() == [0, 1] and third.names[-1] == "w"
    assert are_identical(History.load(path), third), "dropped entries stay dropped"
    third.save(path)  # replaces its own file
    third.append(5, ones())
    third.close()
    assert are_identical(History.load(path), third)
    kinds = ["names" if "names" in line else "step" for line in path.read_text().splitlines()[1:]]
    assert kinds == ["names", "step", "names", "step", "step"], "a layout only where it changes"
    third.save(path)  # closed before and after
    for step in (6, 7):  # opens the file again
        third.append(step, ones())
        third.close()
    third.close()
    assert History.load(path).steps.tolist() == [0, 1, 5, 6, 7]


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
        found.close()
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
    column = {"mean": [0.5, None], "m2": [1.0, None], "min": [0, None], "max": [1, None]}
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
    assert len(history.total.grad.mean) == len(history.steps)
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
    write_lines(path, *layout_and_entry(), {**layout_and_entry()[1], "step": 4, "number": 1})
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


# ---- failures while writing


@contextlib.contextmanager
def disk_full_at(size: int):
    """Let every write fail that would make a file larger than `size`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_does_not_stop_training(tmp_path):
    path = tmp_path / "run.jsonl"
    with disk_full_at(10), pytest.raises(OSError, match="too large") as caught:
        History(path)
    history = History(path)  # not locked, although the traceback of the error is alive
    del caught
    history.append(0, ones())
    before = path.read_bytes()
    with disk_full_at(len(before) + 20), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        history.append(1, ones())
        history.append(2, ones())
    (warning,) = map(str, (w.message for w in warned))
    assert "entries from step 1 on are kept in memory only: [Errno 27]" in warning
    assert len(history) == 3 and path.read_bytes() == before, "no line is cut"


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    history = written(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        history.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["run.jsonl"]


KILLED = """
import sys, torch, paramstats
history = paramstats.History(sys.argv[1])
weights = {f"layer.{i}.weight": torch.randn(8) for i in range(50)}
for step in range(len(history), 1_000_000):
    history.append(step, paramstats.summarize(weights))
    print(step, flush=True)
"""


def test_appended_entries_survive_kill_9(tmp_path):
    path = tmp_path / "run.jsonl"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(path)]
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        printed = [process.stdout.readline() for _ in range(5)]
        process.kill()
        printed += process.stdout.read().split()
        process.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            history = History.load(path)
        assert history.steps.tolist() == list(range(len(history)))
        assert len(history) > int(printed[-1]) and len(history.names) == 50


@pytest.mark.parametrize("is_closed", [False, True])
@pytest.mark.parametrize("change", ["grown", "shrunk", "removed", "replaced"])
def test_file_changed_by_others_is_not_written(tmp_path, change, is_closed):
    path = tmp_path / "run.jsonl"
    history = History(path)
    history.append(0, ones())
    if is_closed:
        history.close()
    data = path.read_bytes()
    if change in ("removed", "replaced"):
        path.unlink()
    if change != "removed":
        path.write_bytes({"grown": data + b" ", "shrunk": data[:-1], "replaced": b""}[change])
    before = path.exists() and path.read_bytes()
    with pytest.warns(RuntimeWarning, match=rf"cannot write '{path}' any more, .* from step 1 on"):
        history.append(1, ones())
    history.append(2, ones())
    assert len(history) == 3 and (path.exists() and path.read_bytes()) == before


# ---- one writer


OTHER = """
import sys, warnings, torch, paramstats
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    history = paramstats.History(sys.argv[1])
    for step in (10, 11):
        history.append(step, paramstats.summarize({"w": torch.ones(1)}))
    history.close()
    print(len(history), *(w.message for w in caught if "paramstats.History" in str(w.message)))
"""


def append_in_another_process(path) -> str:
    command = [sys.executable, "-W", "ignore", "-c", OTHER, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_second_process_keeps_its_entries_in_memory(tmp_path):
    path = tmp_path / "run.jsonl"
    history = History(path)
    history.append(0, ones())
    assert append_in_another_process(path) == (
        f"3 paramstats.History: '{path}' is already open in another History, maybe in another "
        f"process: entries appended to this one are kept in memory only\n"
    )
    with pytest.warns(RuntimeWarning, match="already open in another History"):
        second = History(path)
    second.append(1, ones())
    assert len(second) == 2 and len(History.load(path)) == 1
    history.append(1, ones())
    history.close()
    assert are_identical(History.load(path), history)
    assert append_in_another_process(path) == "4\n", "close releases the lock"
    assert History.load(path).steps.tolist() == [0, 1, 10, 11]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_process_does_not_write(tmp_path):
    path = tmp_path / "run.jsonl"
    history = History(path)
    history.append(0, ones())
    one = ones()
    reader, writer = os.pipe()
    history._journal.lock.acquire()  # another thread may hold it during the fork
    child = os.fork()
    if child == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history.append(1, one)
            history.append(2, one)
            history.close()
        os.write(writer, f"{len(history)} {[str(w.message) for w in caught]}".encode())
        time.sleep(1)
        os._exit(0)
    history._journal.lock.release()
    message = os.read(reader, 1000).decode()
    assert message.startswith("3 [") and message.count("the parent process writes it") == 1
    history.append(5, one)
    history.close()
    assert "another" not in append_in_another_process(path), "the child does not hold the lock"
    assert History.load(path).steps.tolist() == [0, 5, 10, 11]
    os.waitpid(child, 0)


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
