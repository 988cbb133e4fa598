"""The memory limit of a CPU: a C++ loop that only reads, compiled on first use."""

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
"""Bytes that a thread reads at a time: enough for the processor's own prefetching."""

_PREFETCH_DISTANCES = (0, 4096, 16384)
"""Bytes. Which distance is fastest depends on the processor."""

_THREADS_FROM = 1 << 20
"""Bytes below which one thread reads everything, because waking another takes longer. paramstats
has the same limit."""

_TRIALS = 5
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")


class NoCompilerError(RuntimeError):
    """The read-only loop cannot be compiled."""


class ReadOnly:
    """A call reads all bytes of `tensors` and returns the sum of their 64-bit words.

    The constructor finds the fastest prefetch distance. A call from Python has an overhead of one
    microsecond.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], threads: int) -> None:
        self._read = _library().read_only
        pieces = [piece for tensor in tensors for piece in _pieces(tensor)]
        self._tensors = tensors  # keeps their memory alive
        self._starts = (ctypes.c_void_p * len(pieces))(*(start for start, _ in pieces))
        self._sizes = (ctypes.c_int64 * len(pieces))(*(size for _, size in pieces))
        self._count = len(pieces)
        total = sum(size for _, size in pieces)
        self._threads = threads if total >= _THREADS_FROM else 1
        self._prefetch_distance = self._fastest()

    def __call__(self) -> int:
        return self._sum(self._prefetch_distance)

    def _sum(self, distance: int) -> int:
        return int(self._read(self._starts, self._sizes, self._count, self._threads, distance))

    def _fastest(self) -> int:
        seconds = dict.fromkeys(_PREFETCH_DISTANCES, float("inf"))
        for _ in range(_TRIALS):
            for distance in _PREFETCH_DISTANCES:
                begin = time.perf_counter()
                self._sum(distance)
                seconds[distance] = min(seconds[distance], time.perf_counter() - begin)
        return min(_PREFETCH_DISTANCES, key=seconds.__getitem__)


def checksum(tensors: Sequence[torch.Tensor]) -> int:
    """Compute with torch what `ReadOnly` returns."""
    total = 0
    for tensor in tensors:
        raw = tensor.detach().flatten().view(torch.uint8)
        whole = raw.numel() // 8 * 8
        total += int(raw[:whole].view(torch.int64).sum())  # overflow wraps around, as in C++
        total += int.from_bytes(bytes(raw[whole:].tolist()).ljust(8, b"\0"), sys.byteorder)
    return total % 2**64


def _pieces(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Split a tensor's memory into pieces; return their addresses and sizes."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous CPU tensor, got {tensor.device}")
    begin = tensor.data_ptr()
    offsets = range(0, tensor.nbytes, _PIECE)
    return [(begin + offset, min(_PIECE, tensor.nbytes - offset)) for offset in offsets]


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
        command = [compiler, *_FLAGS, str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip() or "no message").splitlines()[0]
            raise NoCompilerError(f"{compiler} could not compile benches/read_only.cpp: {reason}")
        loaded = ctypes.CDLL(str(library))
    pointers, sizes = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int64)
    loaded.read_only.restype = ctypes.c_uint64
    loaded.read_only.argtypes = [pointers, sizes, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    return loaded
