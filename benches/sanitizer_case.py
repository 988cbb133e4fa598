"""One small case of everything that the kernels do, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python -m benches.sanitizer_case

Every tensor is made on the CPU and copied over, so that no kernels but paramstats' run, and what
they read is known to be written. Statistics are compared with the CPU's.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator

import torch
from torch import nn

import paramstats
from tests.dtypes import DTYPES, FLOATS

_CHUNK_BYTES = 1 << 17
"""That one thread block reads: kChunkBytes in csrc/cuda/engine.h."""

_FEW = (0, 1, 31, 32, 33)
_OVER = 13
"""Elements more than a chunk."""

_OFFSETS = (0, 1, 3)


def tensors() -> Iterator[tuple[str, torch.Tensor, int]]:
    """Names, tensors on the CPU, and how many elements of each are left out at its beginning."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        chunk = _CHUNK_BYTES // dtype.itemsize
        for numel in (*_FEW, chunk + _OVER):
            for offset in _OFFSETS:
                yield f"{dtype} {numel} from {offset}", _random(numel + offset, dtype), offset
    for dtype in FLOATS:
        chunk = _CHUNK_BYTES // dtype.itemsize
        yield f"{dtype} a chunk of NaN", _random(chunk, dtype).fill_(math.nan), 0
        some = _random(2 * chunk + _OVER, dtype)
        some[chunk + 5] = math.nan  # in the second chunk
        if dtype is not torch.float8_e4m3fn:  # which has no infinity
            some[chunk + 6], some[-1] = math.inf, -math.inf
        yield f"{dtype} some NaN", some, 1
        yield f"{dtype} zeros", torch.zeros(chunk + _OVER).to(dtype), 0
    yield "far from zero", _random(50_000, torch.float32) + 1e4, 3
    outlier = _random(_CHUNK_BYTES, torch.float32)
    outlier[::4096] = 1e6  # where a pivot is looked for: such a chunk is read again
    yield "outliers", outlier, 0


def _random(numel: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(numel).to(dtype)
    if dtype is torch.bool:
        return torch.randint(0, 2, (numel,)).to(dtype)
    low = 0 if dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64) else -100
    return torch.randint(low, 100, (numel,)).to(dtype)


def model(device: torch.device) -> nn.Module:
    """Parameters with gradients, those made on the CPU, too."""
    torch.manual_seed(0)
    built = nn.Sequential(nn.Linear(33, 31), nn.Linear(31, 7, bias=False)).to(device)
    for p in built.parameters():
        p.grad = torch.randn(p.shape).to(device)
    return built


def differences(name: str, got: paramstats.TensorStats, want: paramstats.TensorStats) -> list[str]:
    """Counts and extremes are the same; the rest is what either backend promises of the truth."""
    found = []
    for stat in ("count", "zero_count", "nan_count", "pos_inf_count", "neg_inf_count"):
        if getattr(got, stat) != getattr(want, stat):
            found.append(f"{name}: {stat} {getattr(got, stat)}, expected {getattr(want, stat)}")
    finite = want.finite
    for stat, allowed in (
        ("min", 0.0),
        ("max", 0.0),
        ("mean", 3e-6 * finite.rms),
        ("std", 3e-5 * finite.std),
        ("norm", 3e-6 * finite.norm),
    ):
        a, b = getattr(got.finite, stat), getattr(finite, stat)
        if not (abs(a - b) <= allowed or (math.isnan(a) and math.isnan(b)) or a == b):
            found.append(f"{name}: {stat} {a!r}, expected {b!r}")
    return found


def check(device: torch.device) -> list[str]:
    """What is wrong, in words."""
    here, there = {}, {}
    for name, tensor, offset in tensors():
        here[name] = tensor[offset:]
        there[name] = tensor.to(device)[offset:]
    want, got = paramstats.summarize(here), paramstats.summarize(there)
    again = paramstats.summarize(there)
    found = [d for name in want for d in differences(name, got[name], want[name])]
    if again != got:
        found.append("the second call differs from the first")
    expected = paramstats.summarize(model(torch.device("cpu")))
    for name, entry in paramstats.summarize(model(device)).items():
        other = expected[name]
        assert entry.grad is not None and other.grad is not None
        found += differences(name, entry, other) + differences(
            f"{name}.grad", entry.grad, other.grad
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser("python -m benches.sanitizer_case", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benches.sanitizer_case: no CUDA device", file=sys.stderr)
        return 2
    backend = getattr(paramstats.backend(), options.device)
    found = check(torch.device(options.device))
    for difference in found[:20]:
        print(difference)
    print(f"{options.device}, {backend} backend: {len(found)} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
