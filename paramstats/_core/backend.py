"""Choose the backend: the native module where it loads, torch operators otherwise."""

from __future__ import annotations

import functools
import os
import platform
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from paramstats._core import images, loading, moments, reference
from paramstats._core import walk as python_walk
from paramstats._core.cuda import CudaBackend
from paramstats._core.details import Details
from paramstats._core.transfers import Transfer
from paramstats._version import __version__

_BACKEND_VARIABLE = "PARAMSTATS_BACKEND"
_SIMD_VARIABLE = "PARAMSTATS_SIMD"


@dataclass(frozen=True)
class Implementation:
    """The functions of a backend, and why another one is not used."""

    name: str
    walk: Callable[..., Any]
    """`(module, buffers, make_layout) -> (layout, tensors)`; None: `_core.walk` must list it."""
    read: Callable[..., tuple[bytes, reference.DeferredRows, Sequence[Transfer], Details]]
    """`(tensors, params, grads, *, updates=(), details=b"") -> (table, rows for Python, transfers,
    details)`."""
    merge_rows: Callable[[bytes, int, int], bytes]
    scalars: Callable[[bytes, bytes, dict[Any, None], bytes, float, float], dict[Any, float]]
    statistic: Callable[[bytes, int, int, float, float], float]
    finalize_row: Callable[[bytes, int, float, float], moments.Statistics]
    finalize_table: Callable[[bytes, float, float], bytes]
    crc32: Callable[..., int]
    """`(data, value=0)`, as zlib.crc32."""
    native: Any = None
    """The extension module of the native backend; None in the reference backend."""
    missing: str | None = None
    """Why this is not the native backend; None if it is."""
    cuda: CudaBackend | None = None
    """Starts the CUDA kernels, if torch has CUDA."""
    cuda_missing: str | None = None
    """Why there is no CUDA backend; None if there is."""
    forced: bool = False
    """Whether PARAMSTATS_BACKEND=native forbids the fallback to torch operators."""

    def cuda_reason(self, device: torch.device) -> str | None:
        """Return why the kernels do not read tensors on a CUDA device; None if they do.

        While they are being compiled, the reason is an `images.NotYet`.
        """
        reason = self.cuda.reason(device.index) if self.cuda else self.cuda_missing
        return reason or None

    def explain_cuda(self, devices: Iterable[torch.device]) -> None:
        """Warn, once per device, why CUDA tensors are read with torch operators.

        There is no warning while the kernels are being compiled.

        Raises RuntimeError if the native backend is forced.
        """
        for device in {device for device in devices if device.type == "cuda"}:
            reason = self.cuda_reason(device)
            if reason is None or isinstance(reason, images.NotYet):
                continue
            if self.forced:
                raise RuntimeError(
                    f"paramstats: expected the native backend ({_BACKEND_VARIABLE}=native) for "
                    f"tensors on {device}, but {reason}"
                )
            if device not in _explained:
                _explained.add(device)
                warnings.warn(
                    f"paramstats uses torch operators on {device}: the same results, but slower. "
                    f"Reason: {reason}",
                    RuntimeWarning,
                    stacklevel=3,
                )


@dataclass(frozen=True)
class Backend:
    """The backend in use; what `paramstats.backend()` returns."""

    cpu: str
    """The backend for CPU tensors: "native" or "reference"."""
    cuda: str
    """The backend for CUDA tensors: "native" or "reference"."""
    simd: str | None
    """The SIMD instructions of the native kernels: "avx512", "avx2", "neon" or "plain"."""
    threads: int
    """The number of torch's threads, which read a large model together."""
    missing: str | None
    """Why the native backend is not used, and what to do about it; None if it is."""
    cuda_missing: str | None
    """Why the native backend is not used for CUDA tensors; None if it is."""
    cuda_kernels: str | None
    """Where the CUDA kernels come from, such as "cubin sm_90"; before CUDA is initialized, the
    architectures for which the package has them."""
    cuda_devices: tuple[str, ...]
    """The GPUs that torch sees; their names once CUDA is initialized."""
    torch: str
    """The version of torch."""
    version: str
    """The version of paramstats."""

    def __str__(self) -> str:
        simd = f", {self.simd} kernels" if self.simd else " (torch operators)"
        cuda = "reference (torch operators on the device, one transfer)"
        if self.cuda == "native":
            cuda = f"native ({self.cuda_kernels})"
        lines = [
            f"paramstats {self.version} on torch {self.torch}, Python {platform.python_version()}",
            f"  CPU tensors   {self.cpu}{simd}, {self.threads} threads",
            f"  CUDA tensors  {', '.join(self.cuda_devices) or 'no device here'}; {cuda}",
        ]
        if self.missing:
            lines.append(f"  why not native: {self.missing}")
        if self.cuda_missing and self.cuda_missing != self.missing:
            lines.append(f"  why not native on CUDA: {self.cuda_missing}")
        return "\n".join(lines)


_active: Implementation | None = None
_explained: set[torch.device | str | None] = set()


def active() -> Implementation:
    """Return the backend of this process, which is chosen at the first call.

    There is no lock: a signal handler, another thread or a forked child may make the first call
    while this one runs. All of them choose the same.
    """
    global _active
    chosen = _active
    if chosen is None:
        chosen = _active = choose(os.environ.get(_BACKEND_VARIABLE))
    return chosen


def choose(wanted: str | None) -> Implementation:
    """Return the backend named `wanted`; None: the native one if it loads, else the reference.

    Raises ValueError for an unknown name, and RuntimeError if `wanted` is "native" and it does not
    load. Falling back to the reference backend is a RuntimeWarning.
    """
    if wanted not in (None, "", "native", "reference"):
        raise ValueError(
            f"paramstats: expected {_BACKEND_VARIABLE} to be native or reference, got {wanted!r}"
        )
    if wanted == "reference":
        return _reference(f"{_BACKEND_VARIABLE}=reference was set")
    native, missing, cuda, cuda_missing = _extensions or _load()
    if native is not None:
        _set_simd_level(native)
        forced = wanted == "native"
        return Implementation(
            "native",
            native.walk,
            functools.partial(cuda.read, wait=forced) if cuda else native.read,
            native.merge_rows,
            native.scalars,
            native.statistic,
            native.finalize_row,
            native.finalize_table,
            native.crc32,
            native,
            cuda=cuda,
            cuda_missing=cuda_missing,
            forced=forced,
        )
    if wanted == "native":
        raise RuntimeError(
            f"paramstats: expected the native backend ({_BACKEND_VARIABLE}=native), but {missing}"
        )
    if missing not in _explained:
        _explained.add(missing)
        warnings.warn(
            f"paramstats uses torch operators: the same results, but slower. Reason: {missing}",
            RuntimeWarning,
            stacklevel=4,
        )
    return _reference(missing)


def backend() -> Backend:
    """Return which backend is used on which device, and why not another.

    >>> import paramstats
    >>> paramstats.backend().cpu in ("native", "reference")
    True

    Print it for a bug report. Raises RuntimeError if PARAMSTATS_BACKEND=native is set and the
    native backend does not load.
    """

    chosen = active()
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    cuda_missing, kernels = chosen.cuda_missing, None
    if chosen.cuda:
        names = " ".join(images.available())
        kernels = f"cubins for {names}" if names else "compiled at the first use"
    if devices and torch.cuda.is_initialized():  # else asking would initialize CUDA
        current = torch.device("cuda", torch.cuda.current_device())
        devices = [torch.cuda.get_device_name(i) for i in range(len(devices))]
        cuda_missing = chosen.cuda_reason(current)
        if chosen.cuda and not cuda_missing:
            kernels = chosen.cuda.origin(current.index)
    return Backend(
        cpu=chosen.name,
        cuda="reference" if cuda_missing else "native",
        simd=chosen.native.simd_level() if chosen.native else None,
        threads=torch.get_num_threads(),
        missing=chosen.missing,
        cuda_missing=cuda_missing,
        cuda_kernels=kernels,
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
        moments.statistic,
        moments.finalize_row,
        moments.finalize_table,
        zlib.crc32,
        missing=missing,
        cuda_missing=missing,
    )


class _Extensions(NamedTuple):
    """The extension modules, or why they are missing."""

    native: Any
    missing: str | None
    cuda: CudaBackend | None
    cuda_missing: str | None


def _load() -> _Extensions:
    native, missing = loading.load()
    cuda, cuda_missing = (None, missing) if native is None else _load_cuda(native)
    return _Extensions(native, missing, cuda, cuda_missing)


def _load_cuda(native: Any) -> tuple[CudaBackend | None, str | None]:
    """Return the CUDA backend on top of the native module and None, or None and the reason."""
    if torch.version.hip is not None:
        return None, f"the kernels do not run on AMD GPUs, for which torch {torch.__version__} is"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} has no CUDA"
    return CudaBackend(native), None


def _set_simd_level(native: Any) -> None:
    level = os.environ.get(_SIMD_VARIABLE)
    if level:
        try:
            native.set_simd_level(level)
        except ValueError:
            raise ValueError(
                f"paramstats: expected {_SIMD_VARIABLE} to be one of "
                f"{', '.join(native.simd_levels())} here, got {level!r}"
            ) from None


def _refuse_free_threading() -> None:
    """Raise ImportError if Python runs without its global interpreter lock (GIL)."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise ImportError(
            "paramstats: expected Python with the GIL, got free-threaded Python; set PYTHON_GIL=1 "
            "or use a regular build of Python"
        )


_refuse_free_threading()

# Loaded by `import paramstats`. A call that loaded them would hold Python's import lock, and a
# child that another thread forks meanwhile would wait for it forever.
_extensions = None if os.environ.get(_BACKEND_VARIABLE) == "reference" else _load()
