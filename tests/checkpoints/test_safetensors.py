"""Unusual safetensors files are read or refused as the safetensors library does."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import SafetensorError, safe_open

from paramstats.checkpoints import CheckpointError, summarize_file
from tests.checkpoints.files import entry, safetensors_bytes

W = {"w": entry()}
VALUES = torch.tensor([3.0, 4.0])

ACCEPTED = {
    "no metadata": {},
    "null": {"__metadata__": None},
    "empty": {"__metadata__": {}},
    "strings": {"__metadata__": {"format": "pt"}},
}
REFUSED = {
    "number": ({"__metadata__": {"n": 0}}, "expected strings in __metadata__, got 0 for 'n'"),
    "null value": ({"__metadata__": {"n": None}}, "got None for 'n'"),
    "bool": ({"__metadata__": {"n": True}}, "got True for 'n'"),
    "nested": ({"__metadata__": {"ss": {"a": 1}}}, "got {'a': 1} for 'ss'"),
    "list": ({"__metadata__": []}, "expected __metadata__ of names and strings, got []"),
    "zero": ({"__metadata__": 0}, "names and strings, got 0"),
    "text": ({"__metadata__": ""}, "names and strings, got ''"),
    "false": ({"__metadata__": False}, "names and strings, got False"),
}


def write(path, header):
    path.write_bytes(safetensors_bytes({**header, **W}, VALUES.numpy().tobytes()))


@pytest.mark.parametrize("name", ACCEPTED)
def test_metadata_that_the_library_accepts_is_accepted(tmp_path, name):
    path = tmp_path / "a.safetensors"
    write(path, ACCEPTED[name])
    with safe_open(path, "pt") as opened:
        assert torch.equal(opened.get_tensor("w"), VALUES)
    assert summarize_file(path)["w"].norm == 5


@pytest.mark.parametrize("name", REFUSED)
def test_metadata_that_the_library_refuses_is_refused_with_the_reason(tmp_path, name):
    header, message = REFUSED[name]
    path = tmp_path / "a.safetensors"
    write(path, header)
    with pytest.raises(SafetensorError):
        safe_open(path, "pt").__enter__()
    with pytest.raises(CheckpointError) as caught:
        summarize_file(path)
    assert message in str(caught.value)


def test_other_keys_of_an_entry_are_ignored_as_in_the_library(tmp_path):
    path = tmp_path / "a.safetensors"
    header = json.dumps({"w": {**entry(), "extra": 1}}).encode()
    path.write_bytes(safetensors_bytes(header, VALUES.numpy().tobytes()))
    with safe_open(path, "pt") as opened:
        assert torch.equal(opened.get_tensor("w"), VALUES)
    assert summarize_file(path)["w"].norm == 5
