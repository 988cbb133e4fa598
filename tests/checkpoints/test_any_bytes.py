"""Any bytes in a file give correct statistics or a `CheckpointError`."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import paramstats
from paramstats._core.moments import ROW
from paramstats.checkpoints import CheckpointError, compare_files, summarize_file
from tests.checkpoints.files import load_file, save

np = pytest.importorskip("numpy", reason="numpy is not installed")

TENSORS = {
    "w": torch.linspace(-1, 1, 60).view(5, 12),
    "b": torch.ones(7).bfloat16(),
    "n": torch.tensor(3),
    "v": torch.linspace(0, 9, 40)[::3].contiguous(),
}
FORMATS = ("safetensors", "pt", "legacy", "dcp", "a.pkl", "whole.pt")

edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert"]), st.integers(0, 1 << 30), st.binary(max_size=9)
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """Path and bytes of a valid file, by format."""
    paths = {form: save(TENSORS, form, tmp_path_factory.mktemp(form)) for form in FORMATS}
    paths["dcp"] = paths["dcp"] / ".metadata"
    paths |= {form: tmp_path_factory.mktemp("other") / form for form in ("a.pkl", "whole.pt")}
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    paths["a.pkl"].write_bytes(pickle.dumps({"model": model, **TENSORS}))
    arrays = {name: np.asarray(TENSORS[name]) for name in ("w", "n", "v")}
    torch.save({"model": model, "arrays": arrays}, paths["whole.pt"])
    return {form: (path, path.read_bytes()) for form, path in paths.items()}


def edited(data: bytes, changes: list[tuple[str, int, bytes]], last: int) -> bytes:
    out = bytearray(data)
    for kind, where, new in changes:
        at = where % (min(last, len(out)) + 1)
        if kind == "set":
            out[at : at + len(new)] = new
        elif kind == "cut":
            del out[at : at + len(new)]
        else:
            out[at:at] = new
    return bytes(out)


def read(path):
    """Return the summary of a file, or None if it was refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return summarize_file(path)
        except CheckpointError as error:
            message = str(error)
    assert message.startswith("paramstats.checkpoints.summarize_file: expected ")
    assert str(path.parent) in message
    return None


def load(path):
    """Return what the format's own library loads, or None if it refuses the file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True)
    except Exception:
        return None


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=100)
@given(changes=edits, near=st.sampled_from([60, 2000, 1 << 30]))
def test_edited_file_is_refused_or_read_as_its_library_reads_it(valid, form, changes, near):
    path, data = valid[form]
    try:
        path.write_bytes(edited(data, changes, near))
        summary = read(path)
        if summary is None or form not in ("safetensors", "pt", "legacy"):
            return
        loaded = load(path)
        if not isinstance(loaded, dict) or not all(map(torch.is_tensor, loaded.values())):
            return
        expected = paramstats.summarize(dict(loaded))
        for name in loaded:
            if isinstance(name, str) and name in summary and name not in summary.skipped:
                assert ROW.pack(*summary[name].state()) == ROW.pack(*expected[name].state())
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=40)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_file_is_refused(valid, form, share):
    path, data = valid[form]
    try:
        path.write_bytes(data[: int(share * len(data))])
        assert read(path) is None
    finally:
        path.write_bytes(data)


def test_unedited_file_is_read(valid):
    for form, (path, _) in valid.items():
        names = {name.removeprefix("arrays.") for name in read(path)}
        assert {name for name in names if "model" not in name} >= {"w", "n", "v"}, form
        assert all(row.change_norm == 0 for row in compare_files(path, valid["pt"][0]).rows)
