"""Write checkpoints with the same tensors in every format."""

from __future__ import annotations

import json
import struct
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from paramstats import Summary
from paramstats._core.backend import active
from paramstats._core.moments import ROW

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
save_file, load_file = safetensors.save_file, safetensors.load_file

FORMATS = ("safetensors", "pt", "legacy", "dcp", "sharded safetensors", "sharded bin")


def make_tensors() -> dict[str, torch.Tensor]:
    """Return tensors of every dtype that all formats hold; some are larger than a piece."""
    torch.manual_seed(0)
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    eights = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    unsigned = (torch.uint16, torch.uint32, torch.uint64)
    tensors = {
        "large": torch.randn(1300, 1021),
        "one more than chunks": torch.randn(2 * 131072 + 1).bfloat16(),
        "byte": torch.tensor([7], dtype=torch.uint8),  # the next tensor is not aligned
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "odd": torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30]),
        "bool": torch.rand(1000) > 0.5,
        "complex": torch.randn(700, dtype=torch.complex64),
    }
    tensors |= {str(t): torch.randn(3, 333).to(t) for t in floats}
    tensors |= {str(t): torch.rand(3, 333).to(t) for t in eights}
    tensors |= {str(t): torch.randint(0, 99, (3, 333)).to(t) for t in (*integers, *unsigned)}
    return tensors


def save(tensors: dict[str, torch.Tensor], form: str, folder: Path) -> Path:
    """Write tensors in a format and return the path of the checkpoint."""
    if form == "safetensors":
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
        return folder / "model.safetensors"
    if form in ("pt", "legacy"):
        path = folder / f"{form}.pt"
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "pt")
        return path
    if form == "dcp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is only one rank
            dcp.save(dict(tensors), checkpoint_id=folder / "dcp")
        return folder / "dcp"
    suffix = form.removeprefix("sharded ")
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    file_of = {name: f"{stem}-{1 + i % 2}.{suffix}" for i, name in enumerate(tensors)}
    for file in set(file_of.values()):
        shard = {name: tensors[name] for name in tensors if file_of[name] == file}
        (save_file if suffix == "safetensors" else torch.save)(shard, folder / file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return index


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict[str, object]:
    """Return an entry of a safetensors header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    """Return a safetensors file with any header: an object for JSON, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def assert_equal(summary: Summary, expected: Summary) -> None:
    """Assert equal statistics and properties, in any order.

    The native backend has the same bits in pieces. The reference backend has the same counts,
    minimum and maximum; the others are within the error bound.
    """
    assert set(summary) == set(expected)
    for name in expected:
        left, right = summary[name], expected[name]
        a, b = left.state(), right.state()
        if active().name == "native":
            assert ROW.pack(*a) == ROW.pack(*b), name
        else:
            assert (*a[:5], a.min, a.max) == pytest.approx(
                (*b[:5], b.min, b.max), rel=0, nan_ok=True
            )
            assert left.norm == pytest.approx(right.norm, rel=2e-6, nan_ok=True)
            assert left.std == pytest.approx(right.std, rel=2e-6, nan_ok=True)
            assert left.mean == pytest.approx(right.mean, abs=2e-6 * right.rms, nan_ok=True)
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
        assert left.aliases == right.aliases and left.requires_grad == right.requires_grad
        assert left.grad is None
    assert not summary.skipped
