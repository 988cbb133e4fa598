"""The benchmarks of benches.compare: public functions only, so that old revisions can run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paramstats

_IMPORT = """
import time, torch
begin = time.perf_counter()
import paramstats
print(time.perf_counter() - begin)
"""
_import_seconds = 0.0


def _mlp() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model(torch.rand(32, 64)).square().mean().backward()
    return model


def _tensors(number: int, nbytes: int) -> dict[str, torch.Tensor]:
    block = torch.randn(min(nbytes, 1 << 20) // 4)
    return {f"{i}": block.repeat(nbytes // block.nbytes) for i in range(number)}


def _check_tree() -> None:
    tree = Path(os.environ["PYTHONPATH"]).resolve()
    assert tree in Path(paramstats.__file__).parents
    assert "paramstats._native" in sys.modules, "expected the native backend"


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(_mlp, id="mlp"),
        pytest.param(lambda: _tensors(1000, 256), id="1000_tensors"),
        pytest.param(lambda: _tensors(1, 1 << 20), id="1_MiB"),
        pytest.param(lambda: _tensors(1, 1 << 30), id="1_GiB"),
    ],
)
def test_summarize(source: Any, benchmark: Any) -> None:
    made = source()
    assert paramstats.summarize(made).total.count > 0
    _check_tree()
    benchmark(paramstats.summarize, made)


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda summary: summary.scalars(), id="scalars"),
        pytest.param(lambda summary: summary.total.grad.norm, id="total_grad_norm"),
        pytest.param(lambda summary: summary["0.weight"].grad.norm, id="one_statistic"),
    ],
)
def test_mlp(read: Any, benchmark: Any) -> None:
    made = _mlp()
    assert read(paramstats.summarize(made))
    _check_tree()
    benchmark(lambda: read(paramstats.summarize(made)))


@pytest.mark.benchmark(timer=lambda: _import_seconds)
def test_import(benchmark: Any) -> None:
    """Import paramstats after torch, in a new process that measures the time itself."""

    def import_once() -> None:
        global _import_seconds
        done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, check=True)
        _import_seconds += float(done.stdout)

    benchmark.pedantic(import_once, rounds=5)
