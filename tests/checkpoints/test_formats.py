"""Every format gives what `summarize` gives of the loaded tensors, bit by bit."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct

import pytest
import torch

import paramstats
from paramstats import checkpoints
from paramstats.checkpoints import CheckpointError, summarize_file
from paramstats.checkpoints import _reading as reading
from paramstats.checkpoints import _states as states
from tests import oracle
from tests.checkpoints.files import FORMATS, assert_same, save, save_file, tensors


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The same tensors in every format: written once, as the tests only read."""
    made = tensors()
    folders = {form: tmp_path_factory.mktemp(form.replace(" ", "_")) for form in FORMATS}
    return made, {form: save(made, form, folder) for form, folder in folders.items()}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_figures_of_loaded_tensors(backend, written, form):
    made, paths = written
    summary = summarize_file(paths[form])
    assert_same(summary, paramstats.summarize(made))
    if form != "safetensors":  # which orders by type
        assert list(summary) == list(made)
    assert summary.total.count == sum(x.numel() for x in made.values())


def test_figures_against_the_truth(backend, written):
    made, paths = written
    summary = summarize_file(paths["pt"], correction=0)
    for name, x in made.items():
        if not x.is_complex():
            oracle.check(summary[name], x, correction=0)


def test_a_summary_is_a_summary(written):
    summary = summarize_file(written[1]["pt"], include="float", exclude=["16", "float8"])
    assert list(summary) == ["torch.float64", "torch.float32"]
    assert json.loads(json.dumps(summary.to_dict()))["params"]["torch.float32"]["shape"] == [3, 333]
    assert len(summary.scalars()) == 4 * 3 and "torch.float64" in summary.table()
    assert summary.to_pandas().loc["torch.float64", "norm"] == summary["torch.float64"].norm


@pytest.mark.parametrize("form", ["sharded safetensors", "sharded bin"])
def test_a_folder_is_read_by_its_index(written, form):
    made, paths = written
    assert_same(summarize_file(paths[form].parent), paramstats.summarize(made))


def test_a_folder_of_files_without_an_index(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    torch.save({"optimizer": torch.ones(9)}, tmp_path / "training_args.bin")
    assert list(summarize_file(tmp_path)) == ["a", "b"]
    shutil.copy(tmp_path / "two.safetensors", tmp_path / "two.fp16.safetensors")
    with pytest.raises(
        CheckpointError, match=r"got 'b' in two\.fp16\.safetensors and in two\.safe"
    ):
        summarize_file(tmp_path)


def test_pieces_of_any_size_make_the_same(backend, written, monkeypatch):
    made, paths = written
    monkeypatch.setattr(reading, "PIECE", 1 << 20)
    monkeypatch.setattr(states, "_BATCH", 1)
    for form in ("safetensors", "pt"):
        assert_same(summarize_file(paths[form]), paramstats.summarize(made))


def test_nested_containers_have_dotted_names(backend, tmp_path):
    saved = {
        "model": {"w": torch.ones(2), "deep": {"b": torch.zeros(3)}},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "groups": [{"lr": 0.1}]},
        "list": [torch.ones(1), (torch.ones(4), "text"), None],
        "epoch": 3,
        "set": {1, 2},
    }
    torch.save(saved, tmp_path / "a.pt")
    assert {name: entry.count for name, entry in summarize_file(tmp_path / "a.pt").items()} == {
        "model.w": 2,
        "model.deep.b": 3,
        "optimizer.state.0.exp_avg": 2,
        "list.0": 1,
        "list.1.0": 4,
    }
    torch.save(torch.ones(3), tmp_path / "one.pt")
    assert list(summarize_file(tmp_path / "one.pt")) == ["tensor"]
    torch.save({}, tmp_path / "none.pt")
    assert list(summarize_file(tmp_path / "none.pt")) == []


def test_a_modules_state_dict(backend, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert_same(
        summarize_file(tmp_path / "a.pt"), paramstats.summarize(model.state_dict(), grads=False)
    )
    torch.save({"p": torch.nn.Parameter(torch.ones(3))}, tmp_path / "p.pt")
    assert summarize_file(tmp_path / "p.pt")["p"].requires_grad is True


@pytest.mark.parametrize("new", [True, False])
def test_tied_tensors_are_one_entry(backend, tmp_path, new):
    w = torch.randn(6, 4)
    saved = {"a": w, "tied": w.view(6, 4), "transposed": w.t(), "rows": w[2:], "again": w}
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    summary = summarize_file(tmp_path / "a.pt")
    assert list(summary) == ["a", "transposed", "rows"]
    assert summary["again"].aliases == ("tied", "again")
    assert_same(summary, paramstats.summarize(saved))
    assert list(summarize_file(tmp_path / "a.pt", include="again")) == ["a"]


@pytest.mark.parametrize("new", [True, False])
def test_tensors_that_are_not_contiguous(backend, tmp_path, new, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 1 << 20)
    x = torch.randn(900, 1000)
    saved = {
        "transposed": torch.randn(300, 1000).t(),
        "channels last": torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last),
        "columns": x[:, ::3],
        "rows": x[100:700:7],
        "column": x[:, 4],
        "expanded": torch.randn(3, 1).expand(3, 1000),
        "unfolded": torch.randn(1000).unfold(0, 9, 2),
    }
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    summary = summarize_file(tmp_path / "a.pt")
    for name, tensor in saved.items():
        assert summary[name].shape == tuple(tensor.shape)
        oracle.check(summary[name], tensor)
    dense = {name: saved[name] for name in ("transposed", "channels last")}
    assert_same(summarize_file(tmp_path / "a.pt", include="tr|ch"), paramstats.summarize(dense))


def test_a_complex_tensor_in_several_pieces(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 1 << 20)
    monkeypatch.setattr(states, "_COMPLEX_CHUNK", 1000)
    z = torch.randn(300_000, dtype=torch.complex64) + (2 - 3j)
    z[:1000] = complex(math.nan, 1)  # a first chunk without a mean
    z[5000] = complex(0, math.inf)
    torch.save({"z": z}, tmp_path / "a.pt")
    state, expected = summarize_file(tmp_path / "a.pt")["z"]._state, paramstats.summarize({"z": z})
    right = expected["z"]._state
    assert state[:5] == right[:5] and state[7:] == right[7:]
    assert state.mean == pytest.approx(right.mean, rel=1e-12)
    assert state.m2 == pytest.approx(right.m2, rel=1e-12)


def test_what_has_no_elements_to_read_is_listed_with_the_reason(backend, tmp_path):
    saved = {
        "w": torch.ones(2),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(4, 5, device="meta"),
        "negative": torch.ones(2, dtype=torch.complex64).conj().imag,
    }
    torch.save(saved, tmp_path / "a.pt")
    with pytest.warns(RuntimeWarning, match="paramstats: 'sparse' .and 2 more. could not be read"):
        summary = summarize_file(tmp_path / "a.pt")
    assert list(summary.skipped) == ["sparse", "meta", "negative"]
    assert summary["sparse"].shape == (3, 3) and summary["meta"].shape == (4, 5)
    assert math.isnan(summary["meta"].norm) and summary["w"].norm == math.sqrt(2)
    assert "a sparse tensor" in summary.skipped["sparse"] and summary.total.count == 2


def test_types_that_torch_does_not_compute_with(backend, tmp_path):
    header = {
        "four": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]},
        "six": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [3, 6]},
        "w": {"dtype": "U8", "shape": [2], "data_offsets": [6, 8]},
    }
    path = tmp_path / "a.safetensors"
    path.write_bytes(packed(header) + bytes(range(8)))
    with pytest.warns(RuntimeWarning, match="torch has no operators for F4"):
        summary = summarize_file(path)
    assert (summary["four"].count, summary["six"].count, summary["w"].max) == (6, 4, 7)
    assert list(summary.skipped) == ["four", "six"]


def test_a_type_that_torch_only_names(backend, tmp_path):
    four = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    torch.save({"four": four, "w": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.warns(RuntimeWarning, match="'four' could not be read"):
        summary = summarize_file(tmp_path / "a.pt")
    assert list(summary.skipped) == ["four"] and summary["four"].count == 4
    result = checkpoints.compare_files(tmp_path / "a.pt", tmp_path / "a.pt")
    assert list(result.skipped) == ["four"] and [row.name for row in result.rows] == ["w"]


def test_a_view_beyond_its_storage(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(3)}, path)
    data = path.read_bytes()
    assert data.count(b"K\x03\x85") == 1  # its size, (3,), pickled
    path.write_bytes(data.replace(b"K\x03\x85", b"K\x09\x85"))
    with pytest.raises(CheckpointError, match="12 bytes in storage '0', too few for 'w'"):
        summarize_file(path)


def test_tensors_that_the_file_does_not_align(backend, tmp_path):
    x = torch.randn(3, dtype=torch.float64)
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F64", "shape": [3], "data_offsets": [1, 25]},
    }
    path = tmp_path / "no suffix"
    path.write_bytes(packed(header) + b"\1" + x.numpy().tobytes())
    assert summarize_file(path)["x"]._state == paramstats.summarize({"x": x})["x"]._state


def test_progress_counts_all_bytes(tmp_path):
    saved = {"a": torch.ones(3_000_000), "b": torch.ones(5)}
    torch.save(saved, tmp_path / "a.pt")
    calls = []
    summarize_file(tmp_path / "a.pt", progress=lambda *call: calls.append(call))
    assert calls[-1] == (12_000_020, 12_000_020) and len(calls) == 3
    assert calls == sorted(calls)


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path):
    torch.save({"a": torch.ones(3_000_000)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="it was cut off meanwhile"):
        summarize_file(
            tmp_path / "a.pt", progress=lambda *_: os.truncate(tmp_path / "a.pt", 8_000_000)
        )


def test_arguments():
    assert checkpoints.summarize_file is summarize_file
    with pytest.raises(ValueError, match="expected a finite number for correction, got nan"):
        summarize_file("anything", correction=math.nan)
    with pytest.raises(FileNotFoundError):
        summarize_file("/nowhere")


def packed(header: dict[str, object]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text
