"""Random tensors: any dtype, bits, shape, strides, offset and alignment."""

from __future__ import annotations

import math
import random

import numpy as np
import torch

from tests.dtypes import DTYPES

Sizes = tuple[int, ...]

_BYTES = np.random.RandomState(0).bytes(1 << 22)
_NORMAL = np.random.RandomState(1).standard_normal(1 << 18)


def random_tensor(
    rng: random.Random, numel: int | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A tensor of about `numel` elements, or of any size."""
    sizes, strides, offset = _geometry(rng, _size(rng) if numel is None else numel)
    return strided_tensor(rng, sizes, strides, offset, dtype or rng.choice(DTYPES))


def strided_tensor(
    rng: random.Random, sizes: Sizes, strides: Sizes, offset: int, dtype: torch.dtype
) -> torch.Tensor:
    """Random elements in a buffer that may begin at any byte."""
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype)
    count = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1
    begin = rng.choice((0, 0, 0, 1, 2, 3, 4, 7, 8, rng.randrange(64)))
    buffer = np.frombuffer(bytes(begin) + _bits(rng, count, dtype), np.uint8).copy()
    flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=begin)
    return flat.as_strided(sizes, strides, offset)


def _bits(rng: random.Random, n: int, dtype: torch.dtype) -> bytes:
    """n > 0 elements with one of nine kinds of values."""
    size = n * dtype.itemsize
    kind = rng.randrange(9)
    if kind <= 2:  # any bits: NaN, infinities, subnormals
        start = rng.randrange(max(1, len(_BYTES) - size))
        return _BYTES[start : start + size].ljust(size, b"\x7f")
    start = rng.randrange(len(_NORMAL))
    values = np.resize(_NORMAL[start : start + n], n) * rng.choice((1.0, 1e-3, 1e4, 1e-38))
    if kind == 4:  # the mean is much larger than the standard deviation
        values = values * 10.0 ** -rng.randrange(8) + rng.choice((1.0, -1000.0, 1e5))
    elif kind == 5:  # a constant, perhaps with one outlier
        values[:] = rng.choice((0.0, 1.0, -0.0, 3.14, 1e30, -1e-40))
        if rng.random() < 0.5:
            values[rng.randrange(n)] += rng.choice((1.0, 1e-7, -1e30))
    elif kind == 6:
        values[rng.randrange(n) :] = 0
    elif kind == 7:  # the ends of a dtype's range
        with np.errstate(over="ignore"):
            values *= rng.choice((1e38, 1e-44, 1e200, 1e-200, 1e308))
    if kind == 8 and dtype.is_floating_point:
        values[rng.randrange(n)] = rng.choice((math.nan, math.inf, -math.inf))
    if dtype is torch.bool:
        values = values > 0
    elif not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        values = np.clip(values, max(info.min, -(2.0**53)), min(info.max, 2.0**53))
        values = values.astype(str(dtype).removeprefix("torch."))
    return torch.from_numpy(values).to(dtype).view(torch.uint8).numpy().tobytes()


def _size(rng: random.Random) -> int:
    """Mostly small, and often next to a size at which the kernels change their path."""
    kind = rng.random()
    if kind < 0.45:
        return rng.randrange(40)
    if kind < 0.8:
        return max(0, rng.choice((16, 32, 64, 128, 256, 512, 1024, 2048)) + rng.randrange(-3, 4))
    block = 4096 if kind < 0.93 else 16384 if kind < 0.98 else 131072
    return block * rng.randrange(1, 3) + rng.randrange(-2, 3)


def _geometry(rng: random.Random, n: int) -> tuple[Sizes, Sizes, int]:
    """Sizes, strides and an offset of about n elements."""
    layout = rng.randrange(8)
    offset = rng.choice((0, 0, 1, 5, rng.randrange(100)))
    sizes = _factors(rng, n)
    if layout == 0 or n == 0:
        return (n,), (1,), offset
    if layout == 1:
        return sizes, contiguous(sizes), offset
    if layout == 2:  # permuted
        order = rng.sample(range(len(sizes)), len(sizes))
        strides = contiguous(sizes)
        return tuple(sizes[d] for d in order), tuple(strides[d] for d in order), offset
    if layout == 3:  # gaps
        sizes = _factors(rng, min(n, 3000))
        return sizes, contiguous(tuple(s + rng.randrange(3) for s in sizes)), offset
    if layout == 4:  # expanded
        return sizes, tuple(rng.choice((0, s)) for s in contiguous(sizes)), offset
    if layout == 5:  # overlapping or far apart
        sizes = _factors(rng, min(n, 2000))
        largest = 200_000 // max(1, sum(sizes))
        return sizes, tuple(rng.randrange(largest + 1) for _ in sizes), offset
    if layout == 6:  # dimensions of size 1 with arbitrary strides
        pairs = zip(sizes, contiguous(sizes), strict=True)
        both = [d for n, s in pairs for d in ((1, rng.choice((0, 1, 7, 10**12))), (n, s))]
        return tuple(n for n, _ in both), tuple(s for _, s in both), offset
    many = [1] * rng.randrange(40, 64)  # more dimensions than usual
    for _ in range(rng.randrange(8)):
        many[rng.randrange(len(many))] = rng.randrange(1, 4)
    return tuple(many), contiguous(tuple(many)), offset


def _factors(rng: random.Random, n: int) -> Sizes:
    """Sizes whose product is n or a little less."""
    sizes = []
    while n > 1 and len(sizes) < 5:
        size = rng.randrange(1, min(n, 60) + 1)
        sizes.append(size)
        n //= size
    return (*sizes, n) if rng.random() < 0.7 else (n, *sizes)


def contiguous(sizes: Sizes) -> Sizes:
    """The strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
