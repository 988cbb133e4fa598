"""Numpy arrays in pickles are read as tensors, or listed with a reason."""

from __future__ import annotations

import functools
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

import paramstats
from paramstats._summary import record_of
from paramstats.checkpoints import CheckpointError, summarize_file
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._opening import list_tensors
from paramstats.checkpoints._pickles import stored_bytes as pickled_bytes

np = pytest.importorskip("numpy", reason="numpy is not installed")

FORMATS = {
    "zip": torch.save,
    **{
        f"protocol {n}": lambda value, path, n=n: path.write_bytes(pickle.dumps(value, n))
        for n in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
}
DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "c16")


def arrays():
    """Return arrays of every dtype that torch has, in every layout, small and large."""
    numbers = np.random.default_rng(0).normal(size=(30, 40)) * 9
    large = np.random.default_rng(1).normal(size=(300, 400)).astype("f4")
    return {
        **{code: np.abs(numbers).astype(code) for code in DTYPES},
        "small": numbers[:2, :3].copy(),
        "scalar": np.array(3.0),
        "empty": np.zeros((0, 3), "f4"),
        "large": large,
        "Fortran order": np.asfortranarray(large),
        "transposed": large.T,
        "columns": large[:, ::3],
        "matrix": np.asmatrix(numbers),
    }


@pytest.mark.parametrize("form", FORMATS)
def test_arrays_are_read(backend, tmp_path, form):
    expected = arrays()
    value = {"a": expected, "set": (expected["small"],), "scalar": np.float32(3)}
    FORMATS[form](value, tmp_path / "a.pkl")
    summary = summarize_file(tmp_path / "a.pkl")
    assert not summary.skipped and list(summary) == [f"a.{name}" for name in expected]
    assert summary["a.small"].aliases == ("set.0",)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in expected.items()}
    for name, entry in paramstats.summarize(tensors).items():
        got = summary[f"a.{name}"]
        assert (got.shape, got.dtype) == (entry.shape, entry.dtype), name
        for stat in ("norm", "mean", "min", "max", "zero_count"):
            value, right = getattr(got, stat), getattr(entry, stat)
            assert value == pytest.approx(right, rel=1e-6, abs=1e-7, nan_ok=True), (name, stat)


REASONS = {
    "objects": (np.array([torch.ones(2), None], dtype=object), "of objects, for which torch has"),
    "text": (np.array(["a", "b"]), "of dtype 'U1', for which torch has no dtype"),
    "records": (np.zeros(2, dtype=[("a", "f4")]), "for which torch has no dtype"),
    "dates": (np.array(["2020-01-01"], dtype="M8[D]"), "for which torch has no dtype"),
    "other byte order": (
        np.arange(3, dtype=np.dtype("f4").newbyteorder("S")),
        "in the byte order of another machine",
    ),
}


@pytest.mark.parametrize("form", FORMATS)
def test_other_arrays_are_listed_with_a_reason(tmp_path, form):
    FORMATS[form]({name: array for name, (array, _) in REASONS.items()}, tmp_path / "a.pkl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summary = summarize_file(tmp_path / "a.pkl")
    assert set(summary) == {*REASONS, "objects.4.0"}  # the tensor in the array of objects
    for name, (array, reason) in REASONS.items():
        assert summary[name].shape == array.shape and reason in summary.skipped[name]


def test_masked_array_has_a_label(tmp_path):
    torch.save({"m": np.ma.array([1.0, 2.0], mask=[False, True])}, tmp_path / "a.pt")
    summary = summarize_file(tmp_path / "a.pt")
    assert summary["m"].max == 2
    assert record_of(summary).file.labels == {"m": "all elements of a masked array"}


def test_long_array_in_text_of_protocol_0_is_listed_with_a_reason(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": np.ones(30_000), "b": np.ones(3)}, 0))
    with pytest.warns(RuntimeWarning, match="'a' could not be read.*in an unknown form"):
        summary = summarize_file(tmp_path / "a.pkl")
    assert (summary["a"].shape, summary["b"].norm) == ((30_000,), 3**0.5)


@pytest.mark.parametrize("protocol", [2, 4])
def test_array_with_another_number_of_bytes_is_refused(tmp_path, protocol):
    data = pickle.dumps({"a": np.full(2000, 1.5)}, protocol)
    path = tmp_path / "a.pkl"
    assert data.count(b"M\xd0\x07") == 1  # the size
    for size in (b"M\x00\x01", b"M\xd1\x07", b"M\xcf\x07", b"M\x00\x09"):
        path.write_bytes(data.replace(b"M\xd0\x07", size))
        with pytest.raises(CheckpointError, match=r"bytes of a value that needs|expected text of"):
            summarize_file(path)


def test_text_of_an_array_is_read_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(pickled_bytes, "_CHUNK", 999)
    expected = bytes(range(256)) * 40
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(np.frombuffer(expected, "u1"), 2))
    with Files() as files:
        (tensor,) = list_tensors(files, path, None, None).tensors
        with files.open(tensor.parts[0].path) as file:
            for begin in (0, 5000, 4999, 10, 10_000, 0):
                file.seek(begin)
                assert file.read(240) == expected[begin : begin + 240]


READ = """
import json, resource, sys
from paramstats.checkpoints import summarize_file
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
assert len(summarize_file(sys.argv[1])) == 1
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize("save", [torch.save, functools.partial(torch.save, pickle_protocol=4)])
def test_large_arrays_are_not_in_memory(tmp_path, save):
    pytest.importorskip("resource", reason="this system does not measure a process's memory")
    save(np.random.default_rng(0).normal(size=16 << 20), tmp_path / "a.pt")
    process = subprocess.run(
        [sys.executable, "-c", READ, tmp_path / "a.pt"], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert json.loads(process.stdout) * unit < 64 << 20
