"""A child of fork() has none of its parent's threads, so a call must not wait for them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import paramstats
from paramstats._core import loading

FORK = """
import os, signal, sys, torch, paramstats
from paramstats._core import backend as backends
from paramstats._core import loading
torch.set_num_threads(2)
x = torch.randn(3_000_000)
tensors = {"x": x, "complex": torch.view_as_complex(x.view(-1, 2))}
for name in sys.argv[1:]:
    backends._active = backends.choose(name)
    expected = paramstats.summarize(tensors)  # on torch's threads, which the child lacks
    x.sum()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        summary = paramstats.summarize(tensors)
        same = all(
            abs(getattr(summary[key], stat) - getattr(expected[key], stat)) <= 1e-6
            for key in tensors for stat in ("mean", "std", "min", "max", "count")
        )
        same = same and (name == "reference" or summary["x"] == expected["x"])
        os._exit(0 if same and torch.get_num_threads() == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, name
    again = paramstats.summarize(tensors)  # the parent still has its threads
    assert name == "reference" or again["x"] == expected["x"]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_large_model_is_read_in_a_forked_child():
    names = ["native", "reference"] if loading.load()[0] else ["reference"]
    run = subprocess.run([sys.executable, "-c", FORK, *names], timeout=180)
    assert run.returncode == 0


def test_outside_a_forked_child_the_number_of_threads_is_not_touched(backend, monkeypatch):
    def fail(*_):
        raise AssertionError("used torch's number of threads")

    monkeypatch.setattr(torch, "get_num_threads", fail)
    monkeypatch.setattr(torch, "set_num_threads", fail)
    assert paramstats.summarize({"x": torch.ones(3, dtype=torch.cfloat)})["x"].mean == 1.0
