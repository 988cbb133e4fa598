"""Pickles are read as data, and nothing in them is executed."""

from __future__ import annotations

import collections
import contextlib
import io
import pickle
import sys

import pytest
import torch

from paramstats.checkpoints import CheckpointError, summarize_file
from paramstats.checkpoints._budget import Budget
from paramstats.checkpoints._errors import PickleError
from paramstats.checkpoints._pickles import machine as pickles
from paramstats.checkpoints._pickles.machine import RecordedCall

PLAIN = {
    "none": [None, True, False],
    "numbers": (0, 1, -1, 255, 256, 65536, 2**31, -(2**40), 10**30, 1.5, float("inf")),
    "text": ["", "a", "é" * 300, b"", b"bytes", b"x" * 300, bytearray(b"y" * 9)],
    "nested": {"a": {"b": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}]}},
    "keys": {1: 2, -5: 6},
    "set": {7},
    "frozen": frozenset({4}),
}


def load(data: bytes):
    return pickles.load(io.BytesIO(data), Budget())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_of_every_protocol(protocol):
    value = {**PLAIN, "again": PLAIN["nested"]}
    if protocol < 5:
        value = {name: value[name] for name in ("none", "numbers", "nested", "again")}
    loaded = load(pickle.dumps(value, protocol))
    if protocol == 5:
        loaded |= {"set": set(loaded["set"]), "frozen": frozenset(loaded["frozen"])}
    assert loaded == value
    assert loaded["again"] is loaded["nested"]


def test_calls_are_recorded():
    value = complex(1, 2), collections.OrderedDict(x=1), collections.deque([3])
    number, ordered, deque = load(pickle.dumps(value))
    assert (number.function, number.args) == ("builtins.complex", (1, 2))
    assert (ordered.function, ordered.entries) == ("collections.OrderedDict", {"x": 1})
    assert (deque.function, deque.members) == ("collections.deque", [3])


def call(function, *args, **others):
    return RecordedCall(function, args, **others)


class Point:
    def __init__(self):
        self.x = 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_objects_of_any_class_are_recorded_with_their_attributes(protocol):
    function = f"{__name__}.Point"
    loaded = load(pickle.dumps(Point(), protocol))
    assert (loaded.function, loaded.state) == (function, {"x": 1})


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", call("os.system", "true")),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93)\x81.", call("os.system")),
        (b"(S'true'\nios\nsystem\n.", call("os.system", "true")),  # INST
        (b"(cos\nsystem\nK\x01o.", call("os.system", 1)),  # OBJ
        (b"cos\nx\n)}(S'a'\nK\x01u\x92.", call("os.x", {"a": 1})),  # NEWOBJ_EX
        (b"cos\nx\nK\x01R.", call("os.x", 1)),  # arguments that are no tuple
        (b"K\x01)R.", call(pickles.UNNAMED, 1)),
        (b"cos\nx\n)R(K\x02tR.", call(pickles.UNNAMED, call("os.x"), 2)),
        (b"]K\x02b.", call(pickles.UNNAMED, [], state=2)),
        (b"cos\nx\n)R}b}K\x01K\x02sb.", call("os.x", state=({}, {1: 2}))),
        (b"\x82\x07.", call("a registered extension", 7)),
        (b"K\x01Q.", call("a persistent id", 1)),
        (b"Pid\n.", call("a persistent id", "id")),
    ],
)
def test_calls_become_opaque_values(data, expected):
    def plain(value):
        if isinstance(value, RecordedCall):
            return value.function, [plain(x) for x in value.args], value.state
        return value

    assert plain(load(data)) == plain(expected)


def test_long_values_stay_in_the_file():
    data = pickle.dumps([b"x" * 5000, "y" * 5000, bytearray(b"z" * 5000)], 5)
    values = load(data)
    assert [value.nbytes for value in values] == [5000] * 3
    assert [data[value.offset] for value in values] == list(b"xyz")
    assert [value.is_text for value in values] == [False, True, False]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"(K\x01K\x02l.", [1, 2]),  # LIST
        (b"(K\x01K\x02d.", {1: 2}),  # DICT
        (b"K\x01K\x020.", 1),  # POP
        (b"K\x01(K\x02K\x031.", 1),  # POP_MARK
        (b"K\x012\x86.", (1, 1)),  # DUP
        (b"ctorch\nSize\n(K\x01K\x02\x86tR.", (1, 2)),
    ],
)
def test_instructions_that_pickle_rarely_writes(data, expected):
    assert load(data) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged pickle"),
        (b"\x80\x02", "damaged pickle"),
        (b"\x80\x02K\x01", "damaged pickle"),
        (b"\x80\x02.", "damaged pickle"),
        (b"\x80\x02(.", "a mark in place of a value"),
        (b"\x80\x02K\x01K\x02a.", "items for int"),
        (b"\x80\x02K\x01K\x02\x93.", "a name that is not a string"),
        (b"\x80\x02h\x07.", "damaged pickle"),
        (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.", "its end is missing"),
        (b"\x80\x05\x97.", "data is in another file"),
        (b"\x80\x02\x00.", "unknown instruction"),
        (b"\x80\x02B\x09\x00\x00\x00abc", "its end is missing"),
        (b"\x80\x02B\x09\x20\x00\x00abc", "its end is missing"),
        (b"cos\nsystem", "damaged pickle"),
        (b"\x80\x02\x8b\xff\xff\xff\x0f.", "a value of 268,435,455 bytes"),
        (b"\x80\x02L" + b"9" * 70_000 + b"L\n.", "a line of more than 65,536 bytes"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "damaged pickle"),
        (b"Np-1\n.", "a negative number"),
        (b"Np3\ng-1\n.", "a negative number"),
        (b"Nq\x02h\x01.", "a mark in place of a value"),
    ],
)
def test_damaged_pickle_is_refused(data, message):
    with pytest.raises(PickleError, match=message):
        load(data)


class Calls:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_executed(tmp_path, zipped):
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    saved = {"w": torch.ones(2), "z": Calls(open, str(marker), "w")}
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    assert list(summarize_file(path)) == ["w"]
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "torch.load would have executed it"


def test_cycles_end(tmp_path):
    cyclic: dict[str, object] = {"w": torch.ones(1)}
    cyclic["again"] = [cyclic]
    point = Point()
    point.x = {"w": torch.ones(2), "point": point}
    torch.save({"cyclic": cyclic, "point": point}, tmp_path / "a.pt")
    assert list(summarize_file(tmp_path / "a.pt")) == ["cyclic.w", "point.x.w"]


def test_endless_lists_are_refused(tmp_path):
    doubled: list[object] = [torch.ones(1)]
    for _ in range(60):
        doubled = [doubled, doubled]
    deep: list[object] = [torch.ones(1)]
    for _ in range(2000):
        deep = [deep]
    with raised_recursion_limit():
        for saved in (doubled, deep):
            torch.save(saved, tmp_path / "a.pt")
            with pytest.raises(CheckpointError, match=r"without end|describes very large"):
                summarize_file(tmp_path / "a.pt")


@contextlib.contextmanager
def raised_recursion_limit():
    """Allow pickle to write what this module then refuses."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
