"""Scales and zero points: one number for each block of a tensor's elements."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from paramstats.checkpoints._quantized.companions import Load, UnclearError
from paramstats.checkpoints._stored_tensors import Box

FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})

_WIDE = frozenset({torch.float64, torch.float32})


def to_float(x: torch.Tensor) -> torch.Tensor:
    """Return numbers in float32, or in float64 if they are already."""
    return x if x.dtype in _WIDE else x.to(torch.float32)


class Numbers(Protocol):
    """A number for each element of a tensor."""

    def of(self, box: Box) -> torch.Tensor:
        """Return the numbers of the elements in a box, of a shape that broadcasts to it."""


@dataclass(frozen=True)
class Grid:
    """A number for each block of a grid, which has as many dimensions as the tensor."""

    load: Load
    blocks: tuple[int, ...]
    """Elements of a block in each dimension. A dimension with one block needs no size."""
    groups: dict[int, Load] = field(default_factory=dict)
    """Functions that return which block an element is in, for dimensions without such an order."""
    convert: Callable[[torch.Tensor], torch.Tensor] = to_float

    def of(self, box: Box) -> torch.Tensor:
        """Return the numbers of the elements in a box, of a shape that broadcasts to it."""
        numbers = self.load()
        indexes: dict[int, torch.Tensor] = {}
        for d, (start, size) in enumerate(zip(*box, strict=True)):
            if numbers.shape[d] == 1:
                continue
            if d in self.groups:
                indexes[d] = self.groups[d]()[start : start + size]
                continue
            block = self.blocks[d]
            first, last = start // block, (start + size - 1) // block
            numbers = numbers.narrow(d, first, last - first + 1)
            if block > 1 and last > first:
                indexes[d] = _blocks(start - first * block, size, block)
        if not self.groups:  # the blocks in the box are few
            numbers = self.convert(numbers)
        for d in sorted(indexes, reverse=True):  # copies of whole rows come last
            if numbers.stride(d) == max(numbers.stride()):  # copying whole rows is faster
                numbers = numbers.movedim(d, 0).index_select(0, indexes[d]).movedim(0, d)
            else:
                numbers = numbers.index_select(d, indexes[d])
        return self.convert(numbers) if self.groups else numbers


@functools.lru_cache(16)
def _blocks(start: int, size: int, block: int) -> torch.Tensor:
    """Return which block each element is in; the boxes of a tensor often need the same."""
    return torch.arange(start, start + size, dtype=torch.int64, device="cpu") // block


@dataclass(frozen=True)
class FlatBlocks:
    """A number for each block of the flattened tensor, where blocks begin and end within rows."""

    load: Load
    block: int
    shape: tuple[int, ...]

    def of(self, box: Box) -> torch.Tensor:
        """Return the numbers of the elements in a box."""
        positions = torch.zeros((), dtype=torch.int64, device="cpu")
        for start, size, full in zip(*box, self.shape, strict=True):
            here = torch.arange(start, start + size, dtype=torch.int64, device="cpu")
            positions = (positions * full).unsqueeze(-1) + here
        return self.load()[positions // self.block]


def grid_of(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the shape of scales with as many dimensions as a tensor, and the size of a block.

    There is one scale for the tensor, for each element of the first dimensions (such as a row), or
    for each block of a grid. Raises UnclearError if they do not fit the tensor.
    """
    message = f"a scale of shape {list(scales)} does not fit {list(shape)}"
    n = len(shape)
    while len(scales) > n and scales[-1] == 1:
        scales = scales[:-1]
    if math.prod(scales) == 1:
        return (1,) * n, (1,) * n
    if len(scales) < n:
        if scales != shape[: len(scales)]:
            raise UnclearError(message)
        scales = (*scales, *(1,) * (n - len(scales)))
    if len(scales) != n or n < 2 or not all(scales) or not all(shape):
        raise UnclearError(message)
    blocks = tuple(block_size(size, count) for size, count in zip(shape, scales, strict=True))
    if not all(blocks):
        raise UnclearError(message)
    return scales, blocks


def block_size(size: int, count: int) -> int:
    """Return the size of `count` blocks that cover `size` elements, or 0 if there is none.

    The last block may be shorter. Formats have blocks of 128 or of another power of two, of
    which at most one fits. Other sizes must divide the elements.
    """
    if count in (1, size):
        return size // count
    if count > size:
        return 0
    largest = (size - 1) // (count - 1)
    power = 1 << (largest.bit_length() - 1)
    if -(-size // power) == count:
        return power
    return 0 if size % count else size // count
