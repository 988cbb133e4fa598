"""A small input for every path of the CUDA kernels, to be run under compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benches.sanitizer_case [--small]

Tensors are created on the CPU and copied, so that only kernels of paramstats run. All results are
checked against the tests' oracle.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import nn

import paramstats
from tests import oracle
from tests.dtypes import DTYPES, FLOATS

_CHUNK_BYTES = 1 << 17
"""Bytes per thread block: kChunkBytes in csrc/cuda/engine.h."""

_EXTRA = 13
"""Elements in addition to a whole number of chunks."""


def tensors() -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors on the CPU."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        chunk = _CHUNK_BYTES // dtype.itemsize
        for numel in (0, 1, 31, 32, 33, chunk + _EXTRA):
            yield f"{dtype}, {numel} elements", _random(numel, dtype)
    for dtype in FLOATS:
        chunk = _CHUNK_BYTES // dtype.itemsize
        yield f"{dtype}, a chunk of NaN", _random(chunk, dtype).fill_(math.nan)
        nonfinite = _random(2 * chunk + _EXTRA, dtype)
        nonfinite[chunk + 5] = math.nan  # in the second chunk
        if dtype is not torch.float8_e4m3fn:  # has no infinity
            nonfinite[chunk + 6], nonfinite[-1] = math.inf, -math.inf
        yield f"{dtype}, NaN and infinities", nonfinite
        yield f"{dtype}, zeros", torch.zeros(chunk + _EXTRA).to(dtype)
    yield "far from zero", _random(50_000, torch.float32) + 1e4
    outliers = _random(_CHUNK_BYTES, torch.float32)
    outliers[::4096] = 1e6  # at the sampled positions, so that the kernel reads the chunk again
    yield "outliers", outliers


def _random(numel: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(numel).to(dtype)
    if dtype is torch.bool:
        return torch.randint(0, 2, (numel,)).to(dtype)
    return torch.randint(-100 if dtype.is_signed else 0, 100, (numel,)).to(dtype)


_OFFSETS = (0, 1, 3)
"""Elements by which a tensor begins later: other alignments."""


def check(device: torch.device, offsets: Sequence[int] = _OFFSETS) -> None:
    """Raise AssertionError if a result is wrong or differs between two calls."""
    on_cpu, on_device = {}, {}
    for name, tensor in tensors():
        for offset in offsets:
            key = f"{name}, from {offset}"
            on_cpu[key], on_device[key] = tensor[offset:], tensor.to(device)[offset:]
    summary = paramstats.summarize(on_device)
    for name, stats in summary.items():
        oracle.check(stats, on_cpu[name])
    assert paramstats.summarize(on_device) == summary, "the second call differs from the first"
    model = nn.Sequential(nn.Linear(33, 31), nn.Linear(31, 7, bias=False))
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    expected = {name: (p.detach(), p.grad) for name, p in model.named_parameters()}
    for name, entry in paramstats.summarize(model.to(device)).items():
        parameter, gradient = expected[name]
        assert entry.grad is not None and gradient is not None
        oracle.check(entry, parameter.cpu())
        oracle.check(entry.grad, gradient.cpu())


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("benches.sanitizer_case: torch finds no CUDA device")
    check(torch.device("cuda"), _OFFSETS[1:2] if "--small" in sys.argv else _OFFSETS)
    print(f"{paramstats.backend().cuda} backend: all results are right")
