"""Describes the hardware and versions of a run, and measures how much of the CPU was free."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import paramstats
from tests import fake_device

PEERS = ("numpy", "numkong", "polars", "lovely-tensors", "lightning", "wandb")

LEAST_FREE = 0.9
"""Share of the processors that must be free for a timing to be published (`FreeShare`)."""


def cores() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class FreeShare:
    """Measures the share of all processors that was idle or used by this process.

    The time of ended child processes counts as this process's. Other programs used the rest; if
    they used much, timings are not reliable.
    """

    def __init__(self) -> None:
        self._begin = _cpu_seconds()

    def __call__(self) -> float | None:
        """Return the share since construction, or None without /proc/stat."""
        end = _cpu_seconds()
        if self._begin is None or end is None or end[0] == self._begin[0]:
            return None
        return min(1.0, (end[1] - self._begin[1]) / (end[0] - self._begin[0]))


def _cpu_seconds() -> tuple[float, float] | None:
    """Return the seconds of all processors, and those that were idle or used by this process."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    seconds = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
    idle = seconds[3] + seconds[4]  # idle, iowait
    children = os.times()
    own = time.process_time() + children.children_user + children.children_system
    return sum(seconds), idle + own


def describe(device: str) -> dict[str, Any]:
    """Return hardware, versions, backend and date for JSON, without the name of the machine.

    On the fake device it contains "dry_run", so that benches.report does not publish the numbers.
    """
    on_gpu = device == "cuda" and torch.cuda.is_available()
    backend = paramstats.backend()  # after CUDA is initialized: it then reports more
    return {
        **({"dry_run": True} if fake_device.active() else {}),
        "date": datetime.date.today().isoformat(),
        "device": device,
        "hardware": {
            "cpu": cpu_name(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if on_gpu else None,
            "cuda": torch.version.cuda if on_gpu else None,
        },
        "versions": {
            "paramstats": backend.version,
            "torch": backend.torch,
            "python": platform.python_version(),
            **_peers(),
        },
        "backend": backend.cuda if device == "cuda" else backend.cpu,
        "simd": backend.simd,
    }


def _peers() -> dict[str, str]:
    """Return the versions of the libraries and tools that are compared with paramstats."""
    found = {}
    for name in PEERS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
