"""Subnormal numbers count, also on threads that inherited torch.set_flush_denormal(True)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import paramstats
from paramstats._core import backend as backends
from paramstats._core import loading
from paramstats.checkpoints import compare_files, summarize_file
from tests.conftest import run_python
from tests.modes.conditions import flush_denormal, flushes_subnormals

N = 1_200_000
SMALL = {"float32": "1e-40", "float64": "1e-310", "float16": "3e-7"}
"""As text, which Python would parse to 0 in this mode."""

CODE = """
import sys
import torch
torch.set_num_threads(2)
torch.set_flush_denormal(True)
from tests.modes import test_flush_denormal
test_flush_denormal.in_own_process(*sys.argv[1:])
"""


def test_float64_is_exact(backend):
    values = np.array([-3e-310, 1e-310, 2e-310, 5e-324])
    with flush_denormal():
        entry = paramstats.summarize({"w": torch.from_numpy(values)}, grad_scale=2.0)["w"]
        statistics = entry.min, entry.max, entry.abs_max, entry.zero_count, entry.mean
    *extremes, mean = statistics
    assert extremes == [-3e-310, 2e-310, 3e-310, 0]
    assert mean == pytest.approx(values.mean(), abs=1e-320)


def test_large_tensors_on_threads_that_flush(tmp_path):
    """Run in an own process, because torch's threads keep the mode that they were started in."""
    names = ["native", "reference"] if loading.load()[0] else ["reference"]
    done = run_python("-c", CODE, str(tmp_path), *names, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def in_own_process(folder: str, *names: str) -> None:
    torch.set_flush_denormal(False)
    tensors = {
        dtype: torch.from_numpy(np.full(N, float(text), dtype)) for dtype, text in SMALL.items()
    }
    single = tensors["float32"]
    tensors["complex"] = torch.view_as_complex(single.view(-1, 2))
    indices = torch.from_numpy(np.arange(N)[None])
    tensors["sparse"] = torch.sparse_coo_tensor(indices, single, (N,), is_coalesced=True)
    saved = {"float32": single.clone(), "complex": tensors["complex"]}
    torch.save(saved, f"{folder}/a.pt")
    torch.save({k: torch.from_numpy(np.zeros_like(v)) for k, v in saved.items()}, f"{folder}/b.pt")
    assert single.count_nonzero() < N, "torch's threads take subnormal numbers as zero"
    for name, is_on in itertools.product(names, (True, False)):  # the threads keep the mode
        backends._active = backends.choose(name)
        torch.set_flush_denormal(is_on)
        summary = paramstats.summarize(tensors)
        in_file = summarize_file(f"{folder}/a.pt")
        changes = compare_files(f"{folder}/a.pt", f"{folder}/b.pt").rows
        assert flushes_subnormals() == is_on and torch.get_num_threads() == 2
        torch.set_flush_denormal(False)
        for key, entry in [*summary.items(), *in_file.items()]:
            check(entry, float(SMALL.get(key, 1e-40)), is_complex=key == "complex")
        for change in changes:
            norm = 1e-40 * math.sqrt(N)
            assert change.change_norm == pytest.approx(norm, rel=1e-4, abs=0), change
            assert change.norm_a == pytest.approx(norm, rel=1e-4, abs=0), change
            assert change.changed_fraction == 1.0, change


def check(entry: paramstats.ParamStats, value: float, is_complex: bool) -> None:
    count = N // 2 if is_complex else N
    modulus = value * math.sqrt(2) if is_complex else value
    tolerance = {"rel": 1e-1 if value == 3e-7 else 1e-4, "abs": 0}
    assert (entry.count, entry.zero_count) == (count, 0), entry
    assert entry.mean == pytest.approx(modulus, **tolerance), entry
    assert entry.min == pytest.approx(modulus, **tolerance), entry
    assert entry.norm == pytest.approx(modulus * math.sqrt(count), **tolerance), entry
    assert entry.std <= modulus * 1e-5, entry
