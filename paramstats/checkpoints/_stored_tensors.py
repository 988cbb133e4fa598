"""Describe the tensors of a checkpoint: names, shapes, and where their elements are in files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import NamedTuple

import torch

from paramstats.checkpoints._errors import unexpected


class Part(NamedTuple):
    """A rectangular part of a tensor, stored in one file. Most tensors have a single part."""

    path: str
    offset: int
    """Position of the first element in the file, in bytes."""
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements, never negative."""
    starts: tuple[int, ...]
    """Index of the part's first element in the tensor."""


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint, whose elements have not been read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]
    """Cover every element once; empty if the elements cannot be read."""
    requires_grad: bool = False
    unread_reason: str | None = None
    """Why the elements cannot be read; None if they can."""
    aliases: tuple[str, ...] = ()
    is_conj: bool = False
    """Whether the tensor is the complex conjugate of the stored elements (torch's conj bit)."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, *self.aliases


def contiguous_part(path: str, offset: int, shape: tuple[int, ...]) -> Part:
    """Return the single part of a tensor that is stored contiguously."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return Part(path, offset, shape, tuple(reversed(strides)), (0,) * len(shape))


def span(sizes: Iterable[int], strides: Iterable[int]) -> int:
    """Return the distance in memory from the first to the last element, both included."""
    last = 0
    for size, stride in zip(sizes, strides, strict=True):
        if size == 0:
            return 0
        last += (size - 1) * stride
    return last + 1


def is_dense(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether the elements fill their memory without gaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def file_identities(tensors: Iterable[StoredTensor]) -> dict[str, tuple[int, ...]]:
    """Return device, inode, size and modification time of the tensors' files, by path."""
    paths = {part.path for tensor in tensors for part in tensor.parts}
    stats = {path: os.stat(path) for path in paths}
    return {path: (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for path, s in stats.items()}


def check_unchanged(tensors: Iterable[StoredTensor], before: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError if a file is another one than `before`, its `file_identities`."""
    for path, identity in file_identities(tensors).items():
        if identity != before[path]:
            raise unexpected("files that do not change while they are read", "a change", path)


def merge_files(
    files: Iterable[tuple[str, list[StoredTensor]]], checkpoint: str
) -> list[StoredTensor]:
    """Return the tensors of several files as one list; raise if a name is in two of the files."""
    file_of: dict[str, str] = {}
    merged: list[StoredTensor] = []
    for path, tensors in files:
        for tensor in tensors:
            for name in tensor.names:
                if name in file_of:
                    raise unexpected(
                        "every tensor in one file",
                        f"{name!r} in {file_of[name]} and in {path}",
                        checkpoint,
                        "pass the path of one of the files",
                    )
                file_of[name] = path
            merged.append(tensor)
    return merged


def check_parts(tensor: StoredTensor, path: str) -> None:
    """Raise CheckpointError unless the parts cover every element of the tensor exactly once."""
    elements = 0
    for part in tensor.parts:
        ranges = list(zip(part.starts, part.sizes, tensor.shape, strict=False))
        is_inside = all(0 <= begin <= full and 0 <= n <= full - begin for begin, n, full in ranges)
        if len(part.sizes) != len(tensor.shape) or not is_inside:
            box = f"{list(part.sizes)} at {list(part.starts)}"
            raise unexpected(f"parts of {tensor.name!r} inside {list(tensor.shape)}", box, path)
        elements += math.prod(part.sizes)
    overlap = _overlap([part for part in tensor.parts if math.prod(part.sizes)])
    if elements != math.prod(tensor.shape) or overlap:
        expected = f"parts with {math.prod(tensor.shape)} elements in all for {tensor.name!r}"
        got = f"{elements}, some of them twice" if overlap else elements
        raise unexpected(expected, got, path)


def _overlap(parts: list[Part]) -> bool:
    """Return whether two parts share an element, by a sweep along the first dimension."""
    if parts and not parts[0].sizes:
        return len(parts) > 1
    active: list[Part] = []
    for part in sorted(parts, key=lambda part: part.starts):
        active = [other for other in active if other.starts[0] + other.sizes[0] > part.starts[0]]
        for other in active:
            sides = zip(part.starts, part.sizes, other.starts, other.sizes, strict=True)
            if all(a < b + m and b < a + n for a, n, b, m in sides):
                return True
        active.append(part)
    return False
