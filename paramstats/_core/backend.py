"""Which backend runs, and why."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paramstats._core import moments, reference
from paramstats._core import walk as python_walk

_PACKAGE = Path(__file__).parent.parent
_ENGINE_VARIABLE = "PARAMSTATS_BACKEND"
_SIMD_VARIABLE = "PARAMSTATS_SIMD"
_REBUILD = (
    "pip install --force-reinstall --no-deps . in a checkout of paramstats, with a C++ compiler, "
    "in an environment that has torch (uv: --no-build-isolation, too)"
)
if (_PACKAGE.parent / "setup.py").exists():
    _REBUILD = (
        "this is a checkout, not what was installed from it: work in another folder, or build it "
        "here with pip install --editable . in an environment that has torch"
    )


@dataclass(frozen=True)
class Implementation:
    """The four functions that differ between backends."""

    name: str
    walk: Callable[..., Any]
    """`(module, buffers, make_layout) -> (layout, tensors)`, or None: use the Python walk."""
    read: Callable[
        [list[torch.Tensor], bool, bool],
        tuple[bytes, reference.Left, Sequence[reference.Transfer]],
    ]
    """`(tensors, params, grads) -> (table, what is left for reference.fill, what is under way)`."""
    merge_rows: Callable[[bytes, int, int], bytes]
    scalars: Callable[[bytes, list[str], list[int], float, float], dict[str, float]]
    finalize_table: Callable[[bytes, float, float], bytes]
    native: Any = None
    """The extension module, where it is this backend."""
    missing: str | None = None
    """Why the native backend is not this one."""
    cuda: Any = None
    """The extension module of the CUDA backend, where there is one."""
    cuda_missing: str | None = None
    """Why there is none."""
    forced: bool = False
    """Whether no other will do."""

    def cuda_trouble(self, device: torch.device) -> str | None:
        """Why this backend's kernels do not read tensors of a CUDA device; None where they do."""
        if self.cuda is None:
            return self.cuda_missing
        trouble = self.native.cuda_trouble(device.index)
        return f"the CUDA backend does not run on {device}: {trouble}" if trouble else None

    def explain_cuda(self, devices: Iterable[torch.device]) -> None:
        """Says once why tensors of a CUDA device go through torch operators.

        Raises RuntimeError where the native backend was forced.
        """
        for device in {device for device in devices if device.type == "cuda"}:
            trouble = self.cuda_trouble(device) if self.name == "native" else None
            if trouble and self.forced:
                raise RuntimeError(
                    f"paramstats: expected the native backend ({_ENGINE_VARIABLE}=native) for "
                    f"tensors on {device}, but {trouble}"
                )
            if trouble and device not in _explained:
                _explained.add(device)
                warnings.warn(
                    f"paramstats runs on torch operators on {device}, correct but slower: "
                    f"{trouble}",
                    RuntimeWarning,
                    stacklevel=3,
                )


@dataclass(frozen=True)
class Backend:
    """What `paramstats.backend()` tells."""

    cpu: str
    """The backend of CPU tensors: "native" or "reference"."""
    cuda: str
    """The backend of CUDA tensors: "native" or "reference"."""
    simd: str | None
    """The instructions that native kernels use: "avx512", "avx2" or "plain"."""
    threads: int
    """Threads that share a large model: torch's own."""
    missing: str | None
    """Why the native backend does not run, and what to do about it; None where it does."""
    cuda_missing: str | None
    """Why it is not the native one; None where it is."""
    cuda_architectures: str | None
    """What the native one was compiled for, as nvcc calls it: "sm_80 sm_90 ..."."""
    cuda_devices: tuple[str, ...]
    """The GPUs that torch sees; by name once CUDA is initialised."""
    torch: str
    """The version of torch."""
    version: str
    """The version of paramstats."""

    def __str__(self) -> str:
        simd = f", {self.simd} kernels" if self.simd else ""
        cuda = "reference (torch operators on the device, one transfer)"
        if self.cuda == "native":
            cuda = f"native, compiled for {self.cuda_architectures}"
        lines = [
            f"paramstats {self.version} on torch {self.torch}, Python {platform.python_version()}",
            f"  CPU tensors   {self.cpu}{simd}, {self.threads} threads",
            f"  CUDA tensors  {cuda}; {', '.join(self.cuda_devices) or 'no device here'}",
        ]
        if self.missing:
            lines.append(f"  why not native: {self.missing}")
        if self.cuda_missing and self.cuda_missing != self.missing:
            lines.append(f"  why not native on CUDA: {self.cuda_missing}")
        return "\n".join(lines)


_active: Implementation | None = None
_lock = threading.Lock()
_explained: set[torch.device] = set()


def active() -> Implementation:
    """The backend of this process, chosen at the first call."""
    global _active
    if _active is None:
        with _lock:
            if _active is None:
                _active = choose(os.environ.get(_ENGINE_VARIABLE))
    return _active


def choose(wanted: str | None) -> Implementation:
    """The backend called `wanted`, or the native one where it loads."""
    if wanted not in (None, "", "native", "reference"):
        raise ValueError(
            f"paramstats: expected {_ENGINE_VARIABLE} to be native or reference, got '{wanted}'"
        )
    if wanted == "reference":
        return _reference(f"{_ENGINE_VARIABLE}=reference was set")
    native, missing = _load_native()
    if native is not None:
        _set_simd_level(native)
        cuda, cuda_missing = _load_cuda(native)
        return Implementation(
            "native",
            native.walk,
            native.read,
            native.merge_rows,
            native.scalars,
            native.finalize_table,
            native,
            cuda=cuda,
            cuda_missing=cuda_missing,
            forced=wanted == "native",
        )
    if wanted == "native":
        raise RuntimeError(
            f"paramstats: expected the native backend ({_ENGINE_VARIABLE}=native), but {missing}"
        )
    warnings.warn(
        f"paramstats runs on torch operators, correct but slower: {missing}",
        RuntimeWarning,
        stacklevel=4,
    )
    return _reference(missing)


def backend() -> Backend:
    """Which backend runs on which device, with which instructions, and why not another.

    >>> import paramstats
    >>> paramstats.backend().cpu in ("native", "reference")
    True

    Printed, it is what a bug report needs. Raises RuntimeError where PARAMSTATS_BACKEND=native asks
    for an backend that is not there.
    """
    from paramstats import __version__

    chosen = active()
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    cuda_missing = chosen.cuda_missing
    if devices and torch.cuda.is_initialized():  # else asking would initialise CUDA
        devices = [torch.cuda.get_device_name(i) for i in range(len(devices))]
        if chosen.cuda:
            cuda_missing = chosen.cuda_trouble(torch.device("cuda", torch.cuda.current_device()))
    return Backend(
        cpu=chosen.name,
        cuda="reference" if cuda_missing else "native",
        simd=chosen.native.simd_level() if chosen.native else None,
        threads=torch.get_num_threads(),
        missing=chosen.missing,
        cuda_missing=cuda_missing,
        cuda_architectures=_record().get("cuda_architectures") if chosen.cuda else None,
        cuda_devices=tuple(devices),
        torch=torch.__version__,
        version=__version__,
    )


def _reference(missing: str | None) -> Implementation:
    return Implementation(
        "reference",
        python_walk.walk,
        reference.read,
        moments.merge_rows,
        moments.scalars,
        moments.finalize_table,
        missing=missing,
        cuda_missing=missing,
    )


def _record() -> dict[str, Any]:
    """What setup.py left: which extensions it built, for which torch, and why not."""
    try:
        record = json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _load_native() -> tuple[Any, str | None]:
    """The extension module, or why there is none."""
    record = _record()
    if not record.get("native"):
        reason = record.get("reason") or f"it was never built in {_PACKAGE}"
        return None, f"the native backend is not installed: {reason}. To get it: {_REBUILD}"
    built, running = (_minor(v) for v in (record.get("torch") or "", torch.__version__))
    if built != running:
        return None, (
            f"the native backend was built for torch {record['torch']} and this is torch "
            f"{torch.__version__}. To rebuild it: {_REBUILD}"
        )
    try:
        return importlib.import_module("paramstats._native"), None
    except ImportError as error:
        return None, f"the native backend does not load ({error}). To rebuild it: {_REBUILD}"


def _load_cuda(native: Any) -> tuple[Any, str | None]:
    """The CUDA backend's extension module, made known to the native one; or why there is none."""
    record = _record()
    if not record.get("cuda"):
        reason = record.get("cuda_reason") or "it was never built"
        remedy = "" if torch.version.cuda is None else f". To get it, with nvcc: {_REBUILD}"
        return None, f"the CUDA backend is not installed: {reason}{remedy}"
    try:
        cuda = importlib.import_module("paramstats._cuda")
        native.use_cuda_engine(cuda.api())
    except (ImportError, ValueError) as error:
        return None, f"the CUDA backend does not load ({error}). To rebuild it: {_REBUILD}"
    return cuda, None


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
