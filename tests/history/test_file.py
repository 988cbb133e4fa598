"""A history on disk: equal summaries back, whatever ended the process or cut the file."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import paramstats
from paramstats import History, Summary
from paramstats._core.record import Record
from paramstats._summary import record_of

summarize = paramstats.summarize


class Odd(torch.nn.Module):
    """What a layout and a table may hold: ties, buffers, lazy, meta, half, complex, empty, NaN."""

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
        self.waves = torch.nn.Parameter(torch.tensor([1 + 2j, math.nan]), requires_grad=False)
        self.sick = torch.nn.Parameter(torch.tensor([math.nan, math.inf, -math.inf, 0.1]))
        self.large = torch.nn.Parameter(torch.tensor([1e308, -1e308], dtype=torch.float64))
        self.register_buffer('"quoted"\n\u00e9', torch.tensor([1, 2, 3]))
        self.one.weight.grad = torch.full((2, 3), 0.1)
        self.sick.grad = torch.tensor([math.nan, 0.0, 0.0, 1.0])


def odd_summaries() -> list[Summary]:
    torch.manual_seed(0)
    model = Odd()
    table = summarize(model)
    plain = summarize({"a": torch.randn(5), "b": torch.randn(2, 2)}, correction=0)
    n = len(plain)
    return [
        table,
        summarize(model, buffers=True, grad_scale=65536.0),
        summarize(model, params=False),
        plain,
        plain,
        summarize({}),
        Summary(
            Record(
                record_of(plain).layout,
                record_of(plain).table,
                1.0,
                1.0,
                {"a": f"TypeError: hidden, {n}"},
                {"b": "ranks 1, 3: \u00fc"},
                True,
            )
        ),
        table,
    ]


def the_same(a: History, b: History) -> bool:
    """To the last bit, and with what equality of summaries leaves out."""

    def all_of(history: History) -> list[object]:
        return [
            (step, s, record_of(s)._replace(layout=None), record_of(s).layout.fields)
            for step, s in history
        ]

    return all_of(a) == all_of(b)


def written(path) -> History:
    with History(path) as history:
        for step, summary in enumerate(odd_summaries()):
            history.append(10 * step, summary)
    return history


def test_load_gives_equal_summaries_back(backend, tmp_path):
    history = written(tmp_path / "run.jsonl")
    assert the_same(History.load(tmp_path / "run.jsonl"), history)
    history.save(tmp_path / "saved.jsonl")
    assert the_same(History.load(tmp_path / "saved.jsonl"), history)
    assert (tmp_path / "saved.jsonl").read_bytes() == (tmp_path / "run.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["run.jsonl", "saved.jsonl"], "nothing left beside it"


def test_every_line_is_plain_json(backend, tmp_path, model):
    path = tmp_path / "run.jsonl"
    with History(path) as history:
        for step in (0, 7):
            history.append(step, summarize(model))
    written(path.with_name("odd.jsonl"))

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    for name in ("run.jsonl", "odd.jsonl"):
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
    assert list(grads) == ["mean", "m2", "min", "max"], "what says nothing is left out"
    norm = math.sqrt(grads["m2"][0] + 48 * grads["mean"][0] ** 2)
    assert norm == pytest.approx(summarize(model)["0.weight"].grad.norm, rel=1e-12)


def test_a_layout_is_written_when_it_changes(tmp_path):
    path = tmp_path / "run.jsonl"
    with History(path) as history:
        for step in range(6):
            history.append(step, summarize({"w": torch.ones(1 + step // 3)}))
    kinds = ["names" if "names" in line else "step" for line in path.read_text().splitlines()[1:]]
    assert kinds == ["names", "step", "step", "step"] * 2


def test_cut_at_any_byte_it_loads_up_to_the_cut(tmp_path):
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
        for open_ in (History.load, History):  # the second cuts it, so that it comes last
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = open_(path)
            assert [str(w.message) for w in caught] == is_broken * [
                f"paramstats.History: the end of '{path}' is broken, as after a crash: 1 line lost"
            ]
            assert len(found) == entries
        found.append(100, summarize({"w": torch.ones(2)}))
        found.close()
        again = History.load(path)
        assert again.steps.tolist() == [*range(entries), 100] and the_same(again, found)


def test_several_broken_lines_at_the_end(tmp_path):
    path = tmp_path / "run.jsonl"
    written(path)
    with open(path, "ab") as file:
        file.write(b"\0\0\0\n{}x\n\xff\n{")
    with pytest.warns(RuntimeWarning, match="4 lines lost"):
        assert len(History.load(path)) == 8


def test_broken_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "run.jsonl"
    written(path)
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = [
        [*lines[:3], lines[3][:-20] + b"\n", *lines[4:]],
        [*lines[:3], b'{"step": 1, "number": 1}\n', *lines[4:]],
        [*lines[:1], lines[1].replace(b"float32", b"float31"), *lines[2:]],
        [*lines[:1], *lines[2:]],
    ]
    for content, number in zip(damaged, (4, 4, 2, 2), strict=True):
        path.write_bytes(b"".join(content))
        for open_ in (History.load, History):
            with pytest.raises(ValueError, match=f"got a broken one, line {number} of .*head -n"):
                open_(path)
        assert path.read_bytes() == b"".join(content), "left as it was"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"step,loss\n1,2\n", "expected a file that History wrote, got .*begins with b'step,loss"),
        (b"\x89PNG\r\n", "expected a file that History wrote"),
        (b"[1]\n", "expected a file that History wrote"),
        (b"{}\n", "expected a file that History wrote"),
        (b"[" * 5000, "expected a file that History wrote"),
        (b'{"paramstats": "history", "version": true}\n', "expected version 1, got True"),
        (b'{"paramstats": "history", "version": 1.0}\n', "expected version 1, got 1.0"),
        (b'{"paramstats": "history", "version": 2}\n', "expected version 1, got 2"),
    ],
)
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, content, message):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    for open_ in (History.load, History):
        with pytest.raises(ValueError, match=f"^paramstats.History: {message}"):
            open_(path)
    assert path.read_bytes() == content


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        History.load(tmp_path / "nothing.jsonl")
    assert not (tmp_path / "nothing.jsonl").exists()


def test_an_existing_file_is_continued(backend, tmp_path, model):
    path = tmp_path / "run.jsonl"
    with History(path) as first:
        first.append(0, summarize(model))
        first.append(1, summarize(model))
    with History(path) as second:
        assert the_same(second, first)
        second.append(2, summarize(model))
    assert path.read_text().count('"names"') == 1, "the layout is known"
    third = History(path)
    with pytest.warns(RuntimeWarning, match="step 1 comes after step 2"):
        third.append(1, summarize({"w": torch.ones(1)}))
    assert third.steps.tolist() == [0, 1] and third.names[-1] == "w"
    assert the_same(History.load(path), third), "the entries that were dropped stay so"
    third.save(path)  # over its own file
    third.append(5, summarize({"w": torch.ones(1)}))
    third.close()
    assert the_same(History.load(path), third)
    assert path.read_text().count('"step"') == 3


def test_the_file_has_more_than_the_memory(tmp_path):
    path = tmp_path / "run.jsonl"
    bound = 16 * (2 * 72 + 400) + 1000
    with History(path, max_bytes=bound) as history:
        for step in range(100):
            history.append(step, summarize({"w": torch.ones(1)}))
    assert len(history) < 20 and len(History.load(path)) == 100
    again = History.load(path, max_bytes=bound)
    assert the_same(again, history)
    history.save(tmp_path / "thin.jsonl")
    thin = History.load(tmp_path / "thin.jsonl")
    for step in range(100, 140):  # at the spacing that is there
        thin.append(step, summarize({"w": torch.ones(1)}))
    gaps = {b - a for a, b in zip(thin.steps[:-1], thin.steps[1:-1], strict=False)}
    assert gaps == {8}


def test_a_disk_that_is_full_does_not_end_the_training(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    history = History(path)
    history.append(0, summarize({"w": torch.ones(1)}))
    before = path.read_bytes()

    class Full:
        """Takes a few bytes of a line, then none."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            if len(data) < 50:
                raise OSError(28, "No space left on device")
            return self.file.write(data[:20])

        def __getattr__(self, name):
            return getattr(self.file, name)

    writer = history._journal._writer
    writer._file = Full(writer._file)
    with pytest.warns(RuntimeWarning, match=r"entries from step 1 on are in memory alone: .*No sp"):
        history.append(1, summarize({"w": torch.ones(1)}))
    history.append(2, summarize({"w": torch.ones(1)}))
    assert len(history) == 3 and path.read_bytes() == before, "no half lines"


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
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
start = len(history)
for step in range(start, 1_000_000):
    history.append(step, paramstats.summarize(weights))
    print(step, flush=True)
"""


def test_it_survives_kill_9(tmp_path):
    path = tmp_path / "run.jsonl"
    for pause in (0.0, 0.05):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", KILLED, str(path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        said = process.stdout.read().split()
        process.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            history = History.load(path)
        assert history.steps.tolist() == list(range(len(history)))
        assert not said or len(history) > int(said[-1]), "what append returned from is there"
        assert len(history.names) == 50


def test_an_entry_after_close_opens_the_file_again(tmp_path, model):
    path = tmp_path / "run.jsonl"
    history = History(path)
    for step in range(3):
        history.append(step, summarize(model))
        history.close()
    history.close()
    assert History.load(path).steps.tolist() == [0, 1, 2]


def test_a_closed_file_that_another_has_changed_stays_as_it_is(tmp_path, model):
    path = tmp_path / "run.jsonl"
    history = History(path)
    history.append(0, summarize(model))
    history.close()
    path.write_bytes(path.read_bytes() + b" ")
    before = path.read_bytes()
    with pytest.warns(RuntimeWarning, match="cannot be written any more, entries from step 1 on"):
        history.append(1, summarize(model))
    history.append(2, summarize(model))
    assert path.read_bytes() == before and len(history) == 3


# ---- lines that are JSON and make no sense


def two_lines() -> tuple[dict, dict]:
    """A layout and an entry, as they stand in a file."""
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
            "params": {
                "nans": [1, 0],
                "mean": [0.5, None],
                "m2": [1.0, None],
                "min": [0, None],
                "max": [1, None],
            },
            "grads": {
                "count": [4, -1],
                "mean": [0.5, None],
                "m2": [1.0, None],
                "min": [0, None],
                "max": [1, None],
            },
        },
    )


def put(path, *lines) -> None:
    texts = [json.dumps(line) for line in ({"paramstats": "history", "version": 1}, *lines)]
    path.write_text("".join(f"{text}\n" for text in texts))


def read_all_figures(history: History) -> None:
    for _, summary in history:
        str(summary), summary.to_dict(), summary.scalars(), summary.total.grad, repr(summary)
        pickle.dumps(summary)
    for name in history.names:
        assert len(history[name].norm) == len(history[name].grad.finite.std) == len(history)
        assert len(history[name].min_update_ratio) == len(history)
    assert len(history.total.grad.mean) == len(history.steps)
    repr(history)


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
        (1, "step", "0"),
        (1, "step", None),
        (1, "step", 1 << 63),
        (1, "number", "x"),
        (1, "number", 0.5),
        (1, "number", -1),
        (1, "grad_scale", 0),
        (1, "grad_scale", 1e-320),
        (1, "correction", "1"),
        (1, "skipped", ["b"]),
        (1, "params", {"mean": [1]}),
        (1, "params", {**two_lines()[1]["params"], "nans": [5, 0]}),
        (1, "params", {**two_lines()[1]["params"], "zeros": [-1, 0]}),
        (1, "params", {**two_lines()[1]["params"], "count": [-2, 0]}),
        (1, "params", {**two_lines()[1]["params"], "m2": [-1.0, 0]}),
        (1, "params", {**two_lines()[1]["params"], "count": [1 << 62, 1 << 62]}),
    ],
)
@pytest.mark.parametrize("is_last", [True, False])
def test_what_makes_no_sense_is_an_error_and_stays(tmp_path, line, key, value, is_last):
    path = tmp_path / "run.jsonl"
    lines = two_lines()
    put(path, *lines)
    read_all_figures(History.load(path))
    lines[line][key] = value
    put(path, *lines[: line + 1], *([] if is_last else two_lines()))
    before = path.read_bytes()
    for open_ in (History.load, History):
        with pytest.raises(ValueError, match=f"got a broken one, line {line + 2} of '.*'.*head -n"):
            open_(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", [b"5\n", b"[]\n", b"{}\n", b"[" * 100_000 + b"\n"])
def test_any_json_stays(tmp_path, line):
    path = tmp_path / "run.jsonl"
    written(path)
    path.write_bytes(path.read_bytes() + line)
    before = path.read_bytes()
    for open_ in (History.load, History):
        with pytest.raises(ValueError, match="got a broken one, line "):
            open_(path)
    assert path.read_bytes() == before


def places(value, at=()):
    """Where a JSON value has values, itself included."""
    yield at
    is_list = isinstance(value, list)
    inner = dict(enumerate(value)) if is_list else value if isinstance(value, dict) else {}
    for key, part in inner.items():
        yield from places(part, (*at, key))


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 5),
        st.sampled_from([1 << 62, 1 << 63, 10**400, 0.0, -0.5, 1e308, 1e-320, math.inf, math.nan]),
        st.sampled_from(["w", "cpu", "meta", "float64", "hub", ""]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("wb"), inner),
    max_leaves=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_any_values_are_an_error_or_can_be_read(tmp_path, data):
    path = tmp_path / "run.jsonl"
    lines = [*two_lines(), {**two_lines()[1], "step": 4, "number": 1}]
    for _ in range(data.draw(st.integers(1, 2))):
        line = data.draw(st.integers(0, 2))
        at = data.draw(st.sampled_from(list(places(lines[line]))[1:]))
        *within, last = at
        target = lines[line]
        for key in within:
            target = target[key]
        target[last] = data.draw(VALUES)
    put(path, *lines)
    try:
        history = History.load(path, max_bytes=2000)
    except ValueError as error:
        assert str(error).startswith("paramstats.History: expected")  # noqa: PT017
        return
    read_all_figures(history)


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


def in_another_process(path) -> str:
    command = [sys.executable, "-W", "ignore", "-c", OTHER, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_second_process_keeps_its_entries_in_memory(tmp_path):
    path = tmp_path / "run.jsonl"
    history = History(path)
    history.append(0, summarize({"w": torch.ones(1)}))
    said = in_another_process(path)
    assert said == (
        f"3 paramstats.History: another History, maybe in another process, has '{path}' open: "
        f"entries appended to this one are in memory alone\n"
    )
    history.append(1, summarize({"w": torch.ones(1)}))
    history.close()
    assert the_same(History.load(path), history)
    assert in_another_process(path) == "4\n", "closed, it is free"
    assert History.load(path).steps.tolist() == [0, 1, 10, 11]
    with pytest.warns(RuntimeWarning, match="cannot be written any more, .*another has changed it"):
        history.append(2, summarize({"w": torch.ones(1)}))
    assert History.load(path).steps.tolist() == [0, 1, 10, 11]


@pytest.mark.parametrize("change", ["grown", "shrunk", "removed"])
def test_a_file_that_another_changes_is_not_written_any_more(tmp_path, change):
    path = tmp_path / "run.jsonl"
    history = History(path)
    history.append(0, summarize({"w": torch.ones(1)}))
    if change == "removed":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data + b" " if change == "grown" else data[:-1])
    before = path.exists() and path.read_bytes()
    with pytest.warns(RuntimeWarning, match=rf"'{path}' cannot be written any more, .*from step 1"):
        history.append(1, summarize({"w": torch.ones(1)}))
    history.append(2, summarize({"w": torch.ones(1)}))
    assert len(history) == 3 and (path.exists() and path.read_bytes()) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_does_not_write(tmp_path):
    path = tmp_path / "run.jsonl"
    history = History(path)
    history.append(0, summarize({"w": torch.ones(1)}))
    one = summarize({"w": torch.ones(1)})
    said, say = os.pipe()
    history._journal.lock.acquire()  # as another thread might have it
    child = os.fork()
    if child == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history.append(1, one)
            history.append(2, one)
            history.close()
        os.write(say, f"{len(history)} {[str(w.message) for w in caught]}".encode())
        time.sleep(1)
        os._exit(0)
    history._journal.lock.release()
    message = os.read(said, 1000).decode()
    assert message.startswith("3 [") and message.count("was forked from") == 1
    history.append(5, one)
    history.close()
    assert "another" not in in_another_process(path), "the child does not hold the lock"
    assert History.load(path).steps.tolist() == [0, 5, 10, 11]
    os.waitpid(child, 0)


def test_threads_write_what_they_append(tmp_path):
    path = tmp_path / "run.jsonl"
    history = History(path)
    one = summarize({"w": torch.ones(1)})
    steps = itertools.count()

    def work() -> None:
        for _ in range(300):
            history.append(next(steps), one)

    history._went_back = True  # threads overtake each other: no warning
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    history.close()
    assert path.read_text().count('"step"') == 2400, "also those that another overtook"
    assert the_same(History.load(path), history)


def test_copies_live_in_memory(tmp_path):
    path = tmp_path / "run.jsonl"
    history = History(path)
    history.append(0, summarize({"w": torch.ones(1)}))
    before = path.read_bytes()
    for copied in (pickle.loads(pickle.dumps(history)), copy.deepcopy(history)):
        assert the_same(copied, history)
        copied.append(1, summarize({"w": torch.ones(1)}))
        copied.close()
        assert len(copied) == 2 and path.read_bytes() == before


def test_a_failed_first_line_leaves_nothing_open(tmp_path, monkeypatch):
    def fail(self, lines):
        raise OSError("full")

    monkeypatch.setattr("paramstats._history.file.Writer._write", fail)
    with pytest.raises(OSError, match="full") as caught:
        History(tmp_path / "run.jsonl")
    monkeypatch.undo()
    History(tmp_path / "run.jsonl").close()  # the traceback, which holds the first, has no lock
    del caught
