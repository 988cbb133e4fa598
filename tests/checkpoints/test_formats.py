"""`summarize_file` gives the statistics that `summarize` gives for the loaded tensors."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

import paramstats
from paramstats import checkpoints
from paramstats.checkpoints import CheckpointError, summarize_file
from paramstats.checkpoints import _reading as reading
from paramstats.checkpoints import _states as states
from tests import oracle
from tests.checkpoints.files import (
    FORMATS,
    assert_equal,
    entry,
    make_tensors,
    safetensors_bytes,
    save,
    save_file,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Tensors, and the paths where they are written in every format."""
    tensors = make_tensors()
    folders = {form: tmp_path_factory.mktemp(form.replace(" ", "_")) for form in FORMATS}
    return tensors, {form: save(tensors, form, folder) for form, folder in folders.items()}


@pytest.mark.parametrize("form", FORMATS)
def test_statistics_are_those_of_the_loaded_tensors(backend, written, form):
    tensors, paths = written
    summary = summarize_file(paths[form])
    assert_equal(summary, paramstats.summarize(tensors))
    if form != "safetensors":  # its library sorts tensors by dtype
        assert list(summary) == list(tensors)
    assert summary.total.count == sum(x.numel() for x in tensors.values())
    if form.startswith("sharded"):
        assert_equal(summarize_file(paths[form].parent), summary)


def test_statistics_are_correct_with_a_correction(backend, written):
    tensors, paths = written
    summary = summarize_file(paths["pt"], correction=0)
    for name, x in tensors.items():
        if not x.is_complex():
            oracle.check(summary[name], x, correction=0)


def test_include_and_exclude(written):
    summary = summarize_file(written[1]["pt"], include="float", exclude=["16", "float8"])
    assert list(summary) == ["torch.float64", "torch.float32"]
    assert summary.to_dict()["params"]["torch.float32"]["shape"] == [3, 333]


def test_folder_without_an_index_is_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    torch.save({"optimizer": torch.ones(9)}, tmp_path / "training_args.bin")
    assert list(summarize_file(tmp_path)) == ["a", "b"]
    shutil.copy(tmp_path / "two.safetensors", tmp_path / "again.safetensors")
    with pytest.raises(CheckpointError, match=r"got 'b' in again\.safetensors and in two\.saf"):
        summarize_file(tmp_path)


def test_size_of_pieces_changes_no_bit(backend, written, monkeypatch):
    tensors, paths = written
    monkeypatch.setattr(reading, "PIECE", 1 << 20)
    monkeypatch.setattr(states, "_BATCH", 1)
    for form in ("safetensors", "pt"):
        assert_equal(summarize_file(paths[form]), paramstats.summarize(tensors))


def test_nested_containers_give_dotted_names(backend, tmp_path):
    saved = {
        "model": {"w": torch.ones(2), "deep": {"b": torch.zeros(3)}},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "groups": [{"lr": 0.1}]},
        "list": [torch.ones(1), (torch.ones(4), "text"), None],
        "set": {1, 2},
    }
    names = ["model.w", "model.deep.b", "list.0", "list.1.0", "optimizer.state.0.exp_avg"]
    for value, expected in ((saved, names), (torch.ones(3), ["tensor"]), ({}, [])):
        torch.save(value, tmp_path / "a.pt")
        assert list(summarize_file(tmp_path / "a.pt")) == expected


def test_state_dict_and_parameters(backend, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    expected = paramstats.summarize(model.state_dict(), grads=False)
    assert_equal(summarize_file(tmp_path / "a.pt"), expected)
    model[0].weight.decay = True  # saved differently, because it has an attribute
    tensor = torch.ones(2)
    tensor.decay = True
    torch.save({**dict(model.named_parameters()), "tensor": tensor}, tmp_path / "a.pt")
    summary = summarize_file(tmp_path / "a.pt")
    assert [entry.requires_grad for entry in summary.values()] == [True] * 4 + [False]


@pytest.mark.parametrize("zipped", [True, False])
def test_tied_tensors_are_one_entry(backend, tmp_path, zipped):
    w = torch.randn(6, 4)
    saved = {"a": w, "tied": w.view(6, 4), "transposed": w.t(), "rows": w[2:], "again": w}
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    summary = summarize_file(tmp_path / "a.pt")
    assert list(summary) == ["a", "transposed", "rows"]
    assert summary["again"].aliases == ("tied", "again")
    assert_equal(summary, paramstats.summarize(saved))
    assert list(summarize_file(tmp_path / "a.pt", include="again")) == ["a"]


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_are_not_contiguous(backend, tmp_path, zipped, monkeypatch):
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
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    summary = summarize_file(tmp_path / "a.pt")
    for name, tensor in saved.items():
        assert summary[name].shape == tuple(tensor.shape)
        oracle.check(summary[name], tensor)
    dense = {name: saved[name] for name in ("transposed", "channels last")}
    assert_equal(summarize_file(tmp_path / "a.pt", include="tr|ch"), paramstats.summarize(dense))


def test_complex_tensor_in_several_pieces(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 1 << 20)
    monkeypatch.setattr(states, "_COMPLEX_CHUNK", 1000)
    z = torch.randn(300_000, dtype=torch.complex64) + (2 - 3j)
    z[:1000] = complex(math.nan, 1)  # the first chunk has no finite element
    z[5000] = complex(0, math.inf)
    torch.save({"z": z}, tmp_path / "a.pt")
    state = summarize_file(tmp_path / "a.pt")["z"].state()
    expected = paramstats.summarize({"z": z})["z"].state()
    assert state[:5] == expected[:5] and state[7:] == expected[7:]
    assert state.mean == pytest.approx(expected.mean, rel=1e-12)
    assert state.m2 == pytest.approx(expected.m2, rel=1e-12)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_without_readable_elements_are_listed_with_the_reason(backend, tmp_path):
    path = tmp_path / "a.pt"
    saved = {
        "w": torch.ones(2),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(4, 5, device="meta"),
        "huge": torch.empty(1 << 40, 1 << 20, device="meta"),
        "negative": torch.ones(2, dtype=torch.complex64).conj().imag,
        "quantized": torch.quantize_per_tensor(torch.ones(3, 2), 0.1, 0, torch.qint8),
        "expanded": torch.ones(1).expand(1 << 45),
        "float4": torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }
    torch.save(saved, path)
    with pytest.warns(RuntimeWarning, match=r"summarize_file: 'sparse' and 6 more could not be re"):
        summary = summarize_file(path)
    assert set(summary.skipped) == set(saved) - {"w"}
    assert "a sparse tensor; load it and pass it to" in summary.skipped["sparse"]
    for name, x in saved.items():
        assert (summary[name].shape, summary[name].count) == (tuple(x.shape), x.numel())
    assert summary["quantized"].dtype == torch.qint8
    assert math.isnan(summary["meta"].norm) and summary.total.norm == math.sqrt(2)
    result = checkpoints.compare_files(path, path)
    assert set(result.skipped) == set(summary.skipped) and [r.name for r in result.rows] == ["w"]


def test_safetensors_without_alignment_and_with_unknown_dtypes(backend, tmp_path):
    x = torch.randn(3, dtype=torch.float64)
    header = {
        "__metadata__": {"format": "pt"},
        "four": entry("F4", (2, 3), (0, 3)),
        "six": entry("F6_E2M3", (4,), (3, 6)),
        "x": entry("F64", (3,), (6, 30)),
    }
    path = tmp_path / "no suffix"
    path.write_bytes(safetensors_bytes(header, bytes(6) + x.numpy().tobytes()))
    with pytest.warns(RuntimeWarning, match="torch has no operators for F4"):
        summary = summarize_file(path)
    assert [summary[name].count for name in summary.skipped] == [6, 4]
    assert summary["x"].state() == paramstats.summarize({"x": x})["x"].state()


def test_progress_counts_all_bytes(tmp_path):
    torch.save({"a": torch.ones(3_000_000), "b": torch.ones(5)}, tmp_path / "a.pt")
    calls = []
    summarize_file(tmp_path / "a.pt", progress=lambda *call: calls.append(call))
    assert calls[-1] == (12_000_020, 12_000_020) and len(calls) == 3
    assert calls == sorted(calls)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="expected a finite number for correction, got nan"):
        summarize_file("anything", correction=math.nan)
    with pytest.raises(FileNotFoundError):
        summarize_file("/nowhere")
