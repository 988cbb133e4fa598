"""The command line and the demo, each run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paramstats import _cli

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120"} | environment,
    )


def test_info_prints_the_backend_and_no_warning():
    result = run("-m", "paramstats", "info")
    assert result.returncode == 0 and "CPU tensors" in result.stdout
    assert result.stderr == ""


def test_unknown_backend_in_the_environment_is_a_one_line_error():
    result = run("-m", "paramstats", "info", PARAMSTATS_BACKEND="typo")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1


def test_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        _cli.main(["undo"])
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["", "reference"])
def test_demo_trains_and_agrees_with_the_item_loop(backend):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    result = run(DEMO, "--epochs", "1", PARAMSTATS_BACKEND=backend)
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert "lazy" in out and "stem.weight" in out and "= hidden_again.weight" in out
    assert "Largest relative difference from the .item() loop" in out
    assert "times as fast" in out and "Epochs: 1; digits: 1797" in out
    assert "step/s" not in result.stderr, "no progress bar outside a terminal"
