"""What a checkpoint holds: tensors by name, and where their elements lie; nothing is read yet."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch


class CheckpointError(ValueError):
    """A file that is no checkpoint, or a broken one; the message names it."""


class Part(NamedTuple):
    """A box of a tensor's elements as it lies in a file; most tensors are one such part."""

    path: str
    offset: int
    """Bytes before the first element."""
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements, as a tensor's; never negative."""
    starts: tuple[int, ...]
    """Where the box begins in the tensor."""


class Stored(NamedTuple):
    """A tensor in a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]
    """All elements, none twice; none where `unread` says why not."""
    requires_grad: bool = False
    unread: str | None = None
    aliases: tuple[str, ...] = ()
    conj: bool = False
    """Whether the elements are the conjugates of what is stored (torch's conjugate bit)."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, *self.aliases


def whole(path: str, offset: int, shape: tuple[int, ...]) -> Part:
    """The part that is a whole tensor, row by row."""
    return Part(path, offset, shape, row_major(shape), (0,) * len(shape))


def row_major(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides: list[int] = []
    step = 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def span(sizes: Iterable[int], strides: Iterable[int]) -> int:
    """Elements from the first to the last in memory, those between included."""
    last = 0
    for size, stride in zip(sizes, strides, strict=True):
        if size == 0:
            return 0
        last += (size - 1) * stride
    return last + 1


def is_dense(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements lie side by side, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


Identity = tuple[int, int, int, int]


def identities(tensors: Iterable[Stored]) -> dict[str, Identity]:
    """Which files these tensors are in, as they are now."""
    return {path: _identity(path) for path in {part.path for t in tensors for part in t.parts}}


def check_unchanged(before: dict[str, Identity]) -> None:
    """Refuses statistics of files that were written or replaced while they were read."""
    for path, identity in before.items():
        if _identity(path) != identity:
            raise CheckpointError(
                f"paramstats: expected a file that stays as it is while it is read, got {path}, "
                "which has changed"
            )


def _identity(path: str) -> Identity:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def together(shards: Iterable[tuple[str, list[Stored]]], source: str) -> list[Stored]:
    """The tensors of several files as one checkpoint; a name must not be in two of them."""
    found: dict[str, str] = {}
    tensors: list[Stored] = []
    for path, here in shards:
        for tensor in here:
            for name in tensor.names:
                if name in found:
                    raise CheckpointError(
                        f"paramstats: expected every tensor in one file of {source}, got {name!r} "
                        f"in {found[name]} and in {path}; name one of the files"
                    )
                found[name] = path
            tensors.append(tensor)
    return tensors


def check_total(tensor: Stored, source: str) -> None:
    """Refuses parts that are outside their tensor, or do not add up to it."""
    elements = 0
    for part in tensor.parts:
        if len(part.sizes) != len(tensor.shape) or not all(_inside(part, tensor.shape)):
            raise CheckpointError(
                f"paramstats: expected parts of {tensor.name!r} inside {list(tensor.shape)}, got "
                f"{list(part.sizes)} at {list(part.starts)} in {source}"
            )
        elements += math.prod(part.sizes)
    doubled = _overlap([part for part in tensor.parts if math.prod(part.sizes)])
    if elements != math.prod(tensor.shape) or doubled:
        raise CheckpointError(
            f"paramstats: expected parts with {math.prod(tensor.shape)} elements in all for "
            f"{tensor.name!r}, got {elements}{', some twice' if doubled else ''} in {source}"
        )


def _overlap(parts: list[Part]) -> bool:
    """Whether two of them have an element in common: a sweep along the first dimension."""
    if parts and not parts[0].sizes:
        return len(parts) > 1
    open_: list[Part] = []
    for part in sorted(parts, key=lambda part: part.starts):
        open_ = [other for other in open_ if other.starts[0] + other.sizes[0] > part.starts[0]]
        for other in open_:
            sides = zip(part.starts, part.sizes, other.starts, other.sizes, strict=True)
            if all(a < b + m and b < a + n for a, n, b, m in sides):
                return True
        open_.append(part)
    return False


def _inside(part: Part, shape: tuple[int, ...]) -> Iterator[bool]:
    for start, size, full in zip(part.starts, part.sizes, shape, strict=True):
        yield 0 <= start <= full and 0 <= size <= full - start
