"""In a child of fork(), which has none of its parent's threads, a call does not wait for them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import paramstats

FORK = """
import os, signal, sys, torch, paramstats
from paramstats._core import backend as backend
backend._active = backend.choose(sys.argv[1])
torch.set_num_threads(2)
x = torch.randn(3_000_000)
tensors = {"x": x, "complex": torch.view_as_complex(x.view(-1, 2))}
expected = paramstats.summarize(tensors)  # on torch's threads, which the child will lack
x.sum()
child = os.fork()
if child == 0:
    signal.alarm(60)
    summary = paramstats.summarize(tensors)
    same = all(
        abs(getattr(summary[name], stat) - getattr(expected[name], stat)) <= 1e-6
        for name in tensors for stat in ("mean", "std", "min", "max", "count")
    )
    same = same and (sys.argv[1] == "reference" or summary["x"] == expected["x"])
    os._exit(0 if same and torch.get_num_threads() == 2 else 1)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
again = paramstats.summarize(tensors)  # the parent has its threads still
assert sys.argv[1] == "reference" or again["x"] == expected["x"]
sys.exit(code)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_large_model_in_a_forked_child(backend):
    run = subprocess.run([sys.executable, "-c", FORK, backend.name], timeout=120)
    assert run.returncode == 0


def test_a_process_that_is_no_child_leaves_the_threads_alone(backend, monkeypatch):
    def asked(*_):
        raise AssertionError("looked at torch's threads")

    monkeypatch.setattr(torch, "get_num_threads", asked)
    monkeypatch.setattr(torch, "set_num_threads", asked)
    assert paramstats.summarize({"x": torch.ones(3, dtype=torch.cfloat)})["x"].mean == 1.0
