"""Pickles are read as data, and nothing in them is executed."""

from __future__ import annotations

import collections
import io
import pickle

import pytest
import torch

from paramstats.checkpoints import CheckpointError, summarize_file
from paramstats.checkpoints import _pickles as pickles
from paramstats.checkpoints._budget import Budget
from paramstats.checkpoints._errors import PickleError
from paramstats.checkpoints._pickles import RecordedCall

PLAIN = {
    "none": [None, True, False],
    "numbers": (0, 1, -1, 255, 256, 65536, 2**31, -(2**40), 10**30, 1.5, float("inf")),
    "text": ["", "a", "é" * 300, b"", b"bytes", b"x" * 300, bytearray(b"y" * 9)],
    "nested": {"a": {"b": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}]}},
    "keys": {1: 2, -5: 6},
    "set": {7},
    "frozen": frozenset({4}),
}


def load(data: bytes, allowed=()):
    return pickles.load(io.BytesIO(data), allowed, Budget())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_of_every_protocol(protocol):
    allowed = {"builtins.bytearray", "_codecs.encode", "builtins.set", "__builtin__.set"}
    allowed |= {"builtins.frozenset", "__builtin__.frozenset", "__builtin__.bytearray"}
    value = {**PLAIN, "again": PLAIN["nested"]}
    if protocol < 5:
        value = {name: value[name] for name in ("none", "numbers", "nested", "again")}
    loaded = load(pickle.dumps(value, protocol), allowed)
    if protocol == 5:
        loaded |= {"set": set(loaded["set"]), "frozen": frozenset(loaded["frozen"])}
    assert loaded == value
    assert loaded["again"] is loaded["nested"]


def test_calls_are_recorded():
    value = collections.Counter("aab"), complex(1, 2), collections.OrderedDict(x=1)
    allowed = {"collections.Counter", "collections.OrderedDict", "builtins.complex"}
    counter, number, ordered = load(pickle.dumps(value), allowed)
    assert counter == {"a": 2, "b": 1} and ordered == {"x": 1}
    assert isinstance(number, RecordedCall)
    assert (number.function, number.args) == ("builtins.complex", (1, 2))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"(K\x01K\x02l.", [1, 2]),  # LIST
        (b"(K\x01K\x02d.", {1: 2}),  # DICT
        (b"K\x01K\x020.", 1),  # POP
        (b"K\x01(K\x02K\x031.", 1),  # POP_MARK
        (b"ccollections\nOrderedDict\n(]K\x01K\x02\x86atR.", {1: 2}),
        (b"ccollections\nOrderedDict\n)R}b.", {}),
        (b"ctorch\nSize\n(K\x01K\x02\x86tR.", (1, 2)),
    ],
)
def test_instructions_that_pickle_rarely_writes(data, expected):
    allowed = ("collections.OrderedDict", "torch.Size")
    assert load(data, allowed) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged pickle"),
        (b"\x80\x02", "damaged pickle"),
        (b"\x80\x02K\x01", "damaged pickle"),
        (b"\x80\x02.", "damaged pickle"),
        (b"\x80\x02(.", "a mark in place of a value"),
        (b"\x80\x02K\x01K\x02R.", "a call of an object that is not a function"),
        (b"\x80\x02K\x01K\x02a.", "items for int"),
        (b"\x80\x02]K\x02b.", "a state for an object without one"),
        (b"\x80\x02K\x01K\x02\x93.", "a name that is not a string"),
        (b"\x80\x02h\x07.", "damaged pickle"),
        (b"\x80\x02K\x01Q.", "the instruction BINPERSID"),
        (b"cos\nsystem\n.", r"refers to 'os\.system'"),
        (b"cbuiltins\neval\n.", r"refers to 'builtins\.eval'"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", r"refers to 'os\.system'"),
        (b"\x80\x04\x8c\x05torch\x8c\x06load.x\x93.", r"refers to 'torch\.load\.x'"),
        (b"(S'true'\nios\nsystem\n.", "the instruction INST"),
        (b"(cos\nsystem\no.", r"refers to 'os\.system'"),
        (b"\x82\x01.", "the instruction EXT1"),
        (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.", "a value of 9,223,"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "damaged pickle"),
        (b"Np-1\n.", "a negative number"),
        (b"Np3\ng-1\n.", "a negative number"),
        (b"Nq\x02h\x01.", "a mark in place of a value"),
    ],
)
def test_damaged_or_forbidden_pickle_is_refused(data, message):
    with pytest.raises(PickleError, match=message):
        load(data)


class Calls:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_file_with_code_is_refused_and_not_executed(tmp_path, zipped):
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    saved = {"w": torch.ones(2), "z": Calls(open, str(marker), "w")}
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"refers to '_?i?o\.open'.*nothing was executed"):
        summarize_file(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "torch.load would have executed it"


def test_whole_model_is_refused_with_the_remedy(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"'torch.nn.*Linear'.*save the state_dict\(\)"):
        summarize_file(tmp_path / "a.pt")


def test_endless_lists_are_refused(tmp_path):
    cyclic: list[object] = []
    cyclic.append(cyclic)
    doubled: list[object] = [torch.ones(1)]
    for _ in range(60):
        doubled = [doubled, doubled]
    for saved in (cyclic, doubled):
        torch.save(saved, tmp_path / "a.pt")
        with pytest.raises(
            CheckpointError, match=r"lists in lists without end|describes very large"
        ):
            summarize_file(tmp_path / "a.pt")
