"""`python -m paramstats`, as a person runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


def paramstats(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paramstats", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120"} | environment,
    )


def test_info():
    result = paramstats("info")
    assert result.returncode == 0 and "CPU tensors" in result.stdout


@pytest.mark.parametrize("backend", ["", "reference"])
def test_demo(backend):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    result = subprocess.run(
        [sys.executable, DEMO, "--epochs", "3"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120", "PARAMSTATS_BACKEND": backend},
    )
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert "lazy" in out and "stem.weight" in out and "= hidden_again.weight" in out
    assert "Agreement with the .item() loop: largest difference" in out
    assert "times as fast" in out and "Epochs: 3; digits: 1797" in out
    assert "step/s" not in result.stderr  # no bars in what is no terminal


def test_a_forced_engine_that_is_no_engine_is_one_line():
    result = paramstats("info", PARAMSTATS_BACKEND="typo")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1


def test_unknown_command():
    result = paramstats("undo")
    assert result.returncode == 2 and "invalid choice" in result.stderr
