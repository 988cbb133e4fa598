"""Which engine runs, and why."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paramstats import moments, reference
from paramstats import walk as python_walk

_ENGINE_VARIABLE = "PARAMSTATS_BACKEND"
_SIMD_VARIABLE = "PARAMSTATS_SIMD"
_REBUILD = (
    "pip install --force-reinstall --no-deps . in a checkout of paramstats, with a C++ compiler, "
    "in an environment that has torch (uv: --no-build-isolation, too)"
)


@dataclass(frozen=True)
class Engine:
    """The four functions that differ between engines."""

    name: str
    walk: Callable[..., Any]
    """`(module, buffers, make_layout) -> (layout, tensors)`, or None: use the Python walk."""
    read: Callable[[list[torch.Tensor], bool, bool], tuple[bytes, reference.Left]]
    """`(tensors, params, grads) -> (table, what is left for reference.fill)`."""
    merge_rows: Callable[[bytes, int, int], bytes]
    figures: Callable[[bytes, list[str], list[int], float, float], dict[str, float]]
    native: Any = None
    """The extension module, where it is this engine."""
    missing: str | None = None
    """Why the native engine is not this one."""


@dataclass(frozen=True)
class Backend:
    """What `paramstats.backend()` tells."""

    cpu: str
    """The engine of CPU tensors: "native" or "reference"."""
    cuda: str
    """The engine of CUDA tensors: "reference"."""
    simd: str | None
    """The instructions that native kernels use: "avx512", "avx2" or "plain"."""
    threads: int
    """Threads that share a large model: torch's own."""
    missing: str | None
    """Why the native engine does not run, and what to do about it; None where it does."""
    torch: str
    """The version of torch."""
    version: str
    """The version of paramstats."""

    def __str__(self) -> str:
        simd = f", {self.simd} kernels" if self.simd else ""
        lines = [
            f"paramstats {self.version} on torch {self.torch}, Python {platform.python_version()}",
            f"  CPU tensors   {self.cpu}{simd}, {self.threads} threads",
            f"  CUDA tensors  {self.cuda} (torch operators on the device, one transfer)",
        ]
        if self.missing:
            lines.append(f"  why not native: {self.missing}")
        return "\n".join(lines)


_engine: Engine | None = None
_lock = threading.Lock()


def engine() -> Engine:
    """The engine of this process, chosen at the first call."""
    global _engine
    if _engine is None:
        with _lock:
            if _engine is None:
                _engine = choose(os.environ.get(_ENGINE_VARIABLE))
    return _engine


def choose(wanted: str | None) -> Engine:
    """The engine called `wanted`, or the native one where it loads."""
    if wanted not in (None, "", "native", "reference"):
        raise ValueError(
            f"paramstats: expected {_ENGINE_VARIABLE} to be native or reference, got '{wanted}'"
        )
    if wanted == "reference":
        return _reference(f"{_ENGINE_VARIABLE}=reference was set")
    native, missing = _load_native()
    if native is not None:
        _set_simd_level(native)
        return Engine("native", native.walk, native.read, native.merge_rows, native.figures, native)
    if wanted == "native":
        raise RuntimeError(
            f"paramstats: expected the native engine ({_ENGINE_VARIABLE}=native), but {missing}"
        )
    warnings.warn(
        f"paramstats runs on torch operators, correct but slower: {missing}",
        RuntimeWarning,
        stacklevel=4,
    )
    return _reference(missing)


def backend() -> Backend:
    """Which engine runs on which device, with which instructions, and why not another.

    >>> import paramstats
    >>> paramstats.backend().cpu in ("native", "reference")
    True

    Printed, it is what a bug report needs. Raises RuntimeError where PARAMSTATS_BACKEND=native asks
    for an engine that is not there.
    """
    from paramstats import __version__

    chosen = engine()
    return Backend(
        cpu=chosen.name,
        cuda="reference",
        simd=chosen.native.simd_level() if chosen.native else None,
        threads=torch.get_num_threads(),
        missing=chosen.missing,
        torch=torch.__version__,
        version=__version__,
    )


def _reference(missing: str | None) -> Engine:
    return Engine(
        "reference",
        python_walk.walk,
        reference.read,
        moments.merge_rows,
        moments.figures,
        missing=missing,
    )


def _load_native() -> tuple[Any, str | None]:
    """The extension module, or why there is none."""
    try:
        record = json.loads((Path(__file__).parent / "_build.json").read_text())
    except (OSError, ValueError):
        record = {}
    if not record.get("native"):
        reason = record.get("reason") or f"it was never built in {Path(__file__).parent}"
        return None, f"the native engine is not installed: {reason}. To get it: {_REBUILD}"
    built, running = (_minor(v) for v in (record.get("torch") or "", torch.__version__))
    if built != running:
        return None, (
            f"the native engine was built for torch {record['torch']} and this is torch "
            f"{torch.__version__}. To rebuild it: {_REBUILD}"
        )
    try:
        return importlib.import_module("paramstats._native"), None
    except ImportError as error:
        return None, f"the native engine does not load ({error}). To rebuild it: {_REBUILD}"


def _minor(version: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu": an extension runs with the minor version it was built for."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _set_simd_level(native: Any) -> None:
    level = os.environ.get(_SIMD_VARIABLE)
    if level:
        try:
            native.set_simd_level(level)
        except ValueError:
            raise ValueError(
                f"paramstats: expected {_SIMD_VARIABLE} to be one of "
                f"{', '.join(native.simd_levels())} here, got '{level}'"
            ) from None
