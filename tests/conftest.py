"""Fixtures that every test may use: each backend in turn, and a model with gradients."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from paramstats._core import backend as backends

settings.register_profile("default", deadline=None, derandomize=True)  # one seed: CI repeats itself
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def load_backend(name: str) -> backends.Implementation:
    """The backend called `name`; skips, saying why, where the native one is not installed."""
    try:
        return backends.choose(name)
    except RuntimeError as error:
        if os.environ.get("PARAMSTATS_STRICT_BUILD", "0") not in ("", "0"):
            raise
        pytest.skip(str(error))


def in_a_small_thread(call: Callable[[], object]) -> None:
    """On a thread with a stack of 64 KiB."""
    before = threading.stack_size(64 * 1024)
    thread = threading.Thread(target=call)
    thread.start()
    threading.stack_size(before)
    thread.join()


@pytest.fixture(params=["native", "reference"])
def backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> backends.Implementation:
    """Runs the test once with each backend."""
    chosen = load_backend(request.param)
    monkeypatch.setattr(backends, "_active", chosen)
    return chosen


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> backends.Implementation:
    """Runs the test with the native backend alone."""
    chosen = load_backend("native")
    monkeypatch.setattr(backends, "_active", chosen)
    return chosen


@pytest.fixture(params=["avx512", "avx2", "plain"])
def simd_level(request: pytest.FixtureRequest, native: backends.Implementation) -> Iterator[str]:
    """Runs the test once with the native kernels of each SIMD level that is here."""
    extension = native.native
    if request.param not in extension.simd_levels():
        pytest.skip(f"this processor has no {request.param}")
    before = extension.simd_level()
    extension.set_simd_level(request.param)
    yield request.param
    extension.set_simd_level(before)


@pytest.fixture
def model() -> torch.nn.Module:
    """Two layers after a backward pass."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    model(torch.randn(4, 8)).square().mean().backward()
    return model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the test is, so that loggers write there, and to no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    yield tmp_path
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # or it stays in this folder
