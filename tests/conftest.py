"""Fixtures for all tests: each backend, each SIMD level, a model with gradients."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from paramstats._core import backend as backends
from paramstats._core import reading

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and tables would be fitted to it
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored
settings.register_profile("default", deadline=None, derandomize=True)  # CI is repeatable
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def load_backend(name: str) -> backends.Implementation:
    """Return a backend; skip the test if the native one is not installed, unless it must be."""
    try:
        return backends.choose(name)
    except RuntimeError as error:
        if os.environ.get("PARAMSTATS_STRICT_BUILD", "0") not in ("", "0"):
            raise
        pytest.skip(str(error))


def run_python(
    *arguments: str, cwd: str | Path = os.sep, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python without the variables PARAMSTATS_*, except those in `environment`.

    `python -c` looks for packages in the working directory first, so this is not the checkout.
    """
    keep = {k: v for k, v in os.environ.items() if not k.startswith("PARAMSTATS_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=keep | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_with_small_stack(call: Callable[[], object]) -> None:
    """Run `call` in a thread with a stack of 64 KiB."""
    before = threading.stack_size(64 * 1024)
    thread = threading.Thread(target=call)
    thread.start()
    threading.stack_size(before)
    thread.join()


@pytest.fixture(params=["native", "reference"])
def backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> backends.Implementation:
    """Run the test with each backend."""
    chosen = load_backend(request.param)
    monkeypatch.setattr(backends, "_active", chosen)
    return chosen


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> backends.Implementation:
    """Run the test with the native backend only."""
    chosen = load_backend("native")
    monkeypatch.setattr(backends, "_active", chosen)
    return chosen


@pytest.fixture(params=["avx512", "avx2", "neon", "plain"])
def simd_level(request: pytest.FixtureRequest, native: backends.Implementation) -> Iterator[str]:
    """Run the test with the native kernels of each SIMD level that the processor has."""
    extension = native.native
    if request.param not in extension.simd_levels():
        pytest.skip(f"this processor has no {request.param}")
    before = extension.simd_level()
    extension.set_simd_level(request.param)
    yield request.param
    extension.set_simd_level(before)


@pytest.fixture
def new_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warn again about reasons that another test has already caused a warning about."""
    monkeypatch.setattr(reading, "_warned", set())


@pytest.fixture
def model() -> torch.nn.Module:
    """Two layers after a backward pass."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    model(torch.randn(4, 8)).square().mean().backward()
    return model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Run the test in a temporary folder; loggers write there and use no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    yield tmp_path
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # otherwise it keeps using this folder
