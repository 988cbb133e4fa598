"""Checkpoints to read: the same tensors in every format."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from paramstats import Summary
from paramstats._core.moments import ROW

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
save_file, load_file = safetensors.save_file, safetensors.load_file

FORMATS = ("safetensors", "pt", "legacy", "dcp", "sharded safetensors", "sharded bin")


def tensors() -> dict[str, torch.Tensor]:
    """Of every type that all formats hold, of odd sizes, and larger than a piece."""
    torch.manual_seed(0)
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    eights = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    unsigned = (torch.uint16, torch.uint32, torch.uint64)
    made = {
        "large": torch.randn(1300, 1021),
        "one more than chunks": torch.randn(2 * 131072 + 1).bfloat16(),
        "byte": torch.tensor([7], dtype=torch.uint8),  # what follows it is not aligned
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "odd": torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30]),
        "bool": torch.rand(1000) > 0.5,
        "complex": torch.randn(700, dtype=torch.complex64),
    }
    made |= {str(t): torch.randn(3, 333).to(t) for t in floats}
    made |= {str(t): torch.rand(3, 333).to(t) for t in eights}
    made |= {str(t): torch.randint(0, 99, (3, 333)).to(t) for t in (*integers, *unsigned)}
    return made


def save(made: dict[str, torch.Tensor], form: str, folder: Path) -> Path:
    """Writes them in a format; returns what to name."""
    if form == "safetensors":
        save_file({k: v.contiguous() for k, v in made.items()}, folder / "model.safetensors")
        return folder / "model.safetensors"
    if form == "pt":
        torch.save(made, folder / "model.pt")
        return folder / "model.pt"
    if form == "legacy":
        torch.save(made, folder / "old.pt", _use_new_zipfile_serialization=False)
        return folder / "old.pt"
    if form == "dcp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process alone
            dcp.save(dict(made), checkpoint_id=folder / "dcp")
        return folder / "dcp"
    suffix = "safetensors" if form == "sharded safetensors" else "bin"
    return _sharded(made, suffix, folder)


def _sharded(made: dict[str, torch.Tensor], suffix: str, folder: Path) -> Path:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    places = {name: f"{stem}-{1 + i % 2}.{suffix}" for i, name in enumerate(made)}
    for file in set(places.values()):
        here = {name: made[name] for name in made if places[name] == file}
        (save_file if suffix == "safetensors" else torch.save)(here, folder / file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def assert_same(summary: Summary, expected: Summary) -> None:
    """Bit by bit, whatever the order."""
    assert set(summary) == set(expected)
    for name in expected:
        left, right = summary[name], expected[name]
        assert ROW.pack(*left._state) == ROW.pack(*right._state), name
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
        assert left.aliases == right.aliases and left.requires_grad == right.requires_grad
        assert left.grad is None
    assert not summary.skipped
