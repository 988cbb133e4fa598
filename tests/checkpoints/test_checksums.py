"""Flipped bytes of a torch.save file are noticed, because its records have a CRC-32."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.utils.serialization import config

from paramstats.checkpoints import _reading as reading
from paramstats.checkpoints import compare_files, summarize_file

DAMAGED = "damaged: the CRC-32 of record 'a/data/"


def make_tensors() -> dict[str, torch.Tensor]:
    large = torch.randn(300_000)
    square = torch.randn(40, 40)
    return {
        "first": torch.randn(7),
        "large": large,
        "its end": large[100_000:],
        "transposed": torch.randn(50, 60).t(),
        "last": torch.randn(5),
        "rows": square[::2],
    }


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Tensors, the path of their file, and a function that flips a bit of one of them."""
    monkeypatch.setattr(reading, "PIECE", 1 << 19)
    tensors = make_tensors()
    path = tmp_path / "a.pt"
    torch.save(tensors, path)

    def flip(name: str, index: int) -> None:
        data = bytearray(path.read_bytes())
        stored = tensors[name].untyped_storage()
        data[data.index(bytes(stored)) + 4 * index] ^= 1
        path.write_bytes(data)

    return tensors, path, flip


def read(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return summarize_file(path)


@pytest.mark.parametrize(
    ("name", "index", "damaged"),
    [
        ("first", 0, ["first"]),
        ("large", 0, ["large", "its end"]),
        ("large", 299_999, ["large", "its end"]),
        ("its end", 150_000, ["large", "its end"]),
        ("transposed", 1234, ["transposed"]),
        ("last", 4, ["last"]),
    ],
)
def test_tensors_of_a_damaged_record_are_not_read(backend, files, tmp_path, name, index, damaged):
    tensors, path, flip = files
    undamaged = tmp_path / "b.pt"
    torch.save(tensors, undamaged)
    assert not read(path).skipped
    flip(name, index)
    summary = read(path)
    assert list(summary.skipped) == damaged and math.isnan(summary[name].norm)
    assert all(reason.startswith(DAMAGED) for reason in summary.skipped.values())
    for pair in ((path, undamaged), (undamaged, path)):
        comparison = compare_files(*pair)
        assert sorted(comparison.skipped) == sorted(damaged)
        assert {row.name for row in comparison.rows} == set(tensors) - set(damaged)


def test_record_with_bytes_that_no_tensor_needs_is_not_checked(files):
    _, path, flip = files
    flip("rows", 39 * 40)  # in the last row, which is in no tensor
    assert not read(path).skipped


def test_file_without_checksums_is_read(tmp_path):
    tensors = make_tensors()
    with config.patch({"save.compute_crc32": False}):
        torch.save(tensors, tmp_path / "a.pt")
    summary = summarize_file(tmp_path / "a.pt")
    assert not summary.skipped and summary["first"].max == float(tensors["first"].max())
