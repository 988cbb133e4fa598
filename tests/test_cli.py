"""The command line and the demo, each run as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import paramstats
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


@pytest.mark.parametrize("arguments", [["undo"], ["show"], ["show", "a", "--x\x1b[31m"], []])
def test_wrong_arguments_are_a_one_line_error(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        _cli.main(arguments)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("paramstats") and err[:-1].isprintable()


def test_help_of_show_is_complete(capsys):
    with pytest.raises(SystemExit) as done:
        _cli.main(["show", "--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0 and max(map(len, out.splitlines())) <= 100
    page = (DEMO.parent.parent / "docs" / "checkpoints.md").read_text()
    options = set(re.findall(r"--[a-z-]+", out)) - {"--help"}
    assert len(options) == 13
    assert all(f"`{option}" in page for option in options), "each is documented"
    for status in ("0    success", "1    --fail-on found something", "2    a file is missing"):
        assert status in out


def test_wrong_arguments_point_to_the_help(capsys):
    with pytest.raises(SystemExit, match="2"):
        _cli.main(["show"])
    expected = "the following arguments are required: FILE; for help, run: paramstats show --help"
    assert capsys.readouterr().err.startswith(f"paramstats show: {expected}")


@pytest.mark.parametrize("arguments", ["info", "--help"])
def test_reader_that_closes_the_pipe_gets_no_traceback(arguments):
    command = f"'{sys.executable}' -m paramstats {arguments} | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stderr == "" and result.returncode in (0, 141)  # argparse ignores the error


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("large"), KeyError("\x1b")])
def test_unexpected_error_is_one_line(capsys, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(paramstats, "backend", fail)
    assert _cli.main(["info"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"paramstats info: {type(error).__name__}")
    assert err[:-1].isprintable()


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
