"""The memory limit: a loop in C++ that only reads, compiled when first asked for."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

_PIECE = 1 << 20
"""Bytes that a thread takes at a time: long enough for the processor's own prefetching to run."""

_AHEAD = (0, 4096, 16384)
"""Prefetch distances in bytes; which one is fastest depends on the processor."""

_THREADS_FROM = 1 << 20
"""Bytes below which one thread reads them all: waking another would take longer (paramstats has the
same bound)."""

_TRIALS = 5
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")


class NoCompilerError(RuntimeError):
    """Why there is no memory limit to compare with."""


class ReadOnly:
    """Reads all bytes of `tensors` when called, and returns the sum of their 64-bit words.

    The fastest prefetch distance is found out here, so that what is timed later is the limit and
    not a poor loop. The call from Python takes a microsecond of its own.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], threads: int) -> None:
        self._read = _library().read_only
        pieces = [piece for tensor in tensors for piece in _pieces(tensor)]
        self._keep = tensors
        self._starts = (ctypes.c_void_p * len(pieces))(*(start for start, _ in pieces))
        self._sizes = (ctypes.c_int64 * len(pieces))(*(size for _, size in pieces))
        self._count = len(pieces)
        total = sum(size for _, size in pieces)
        self._threads = threads if total >= _THREADS_FROM else 1
        self._ahead = self._fastest()

    def __call__(self) -> int:
        return self._sum(self._ahead)

    def _sum(self, ahead: int) -> int:
        return int(self._read(self._starts, self._sizes, self._count, self._threads, ahead))

    def _fastest(self) -> int:
        seconds = dict.fromkeys(_AHEAD, float("inf"))
        for _ in range(_TRIALS):
            for ahead in _AHEAD:
                begin = time.perf_counter()
                self._sum(ahead)
                seconds[ahead] = min(seconds[ahead], time.perf_counter() - begin)
        return min(_AHEAD, key=seconds.__getitem__)


def checksum(tensors: Sequence[torch.Tensor]) -> int:
    """What `ReadOnly` returns, by torch."""
    total = 0
    for tensor in tensors:
        raw = tensor.detach().flatten().view(torch.uint8)
        whole = raw.numel() // 8 * 8
        total += int(raw[:whole].view(torch.int64).sum())  # wraps around like the loop's
        total += int.from_bytes(bytes(raw[whole:].tolist()).ljust(8, b"\0"), sys.byteorder)
    return total % 2**64


def _pieces(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Addresses and sizes of a tensor's memory, cut up."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous CPU tensor, got {tensor.device}")
    size = tensor.numel() * tensor.element_size()
    begin = tensor.data_ptr()
    return [(begin + at, min(_PIECE, size - at)) for at in range(0, size, _PIECE)]


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = next(filter(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++")), "")
    if not compiler:
        raise NoCompilerError(
            "the memory limit needs a C++ compiler (c++, g++ or clang++; set CXX)"
        )
    source = Path(__file__).with_name("read_only.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read_only.so"
        done = subprocess.run(
            [compiler, *_FLAGS, str(source), "-o", str(library)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            reason = (done.stderr.strip() or "no message").splitlines()[0]
            raise NoCompilerError(f"{compiler} could not compile benches/read_only.cpp: {reason}")
        loaded = ctypes.CDLL(str(library))
    loaded.read_only.restype = ctypes.c_uint64
    loaded.read_only.argtypes = [
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.POINTER(ctypes.c_int64),
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int,
    ]
    return loaded
