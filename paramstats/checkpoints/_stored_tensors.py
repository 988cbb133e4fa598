"""Describe the tensors of a checkpoint: names, shapes, and where their elements are in files."""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol

import torch

from paramstats.checkpoints._errors import unexpected

_PRIME = (1 << 127) - 1

Group = Literal["model", "optimizer", "other"]
"""What a tensor of a checkpoint belongs to. Only those of the model are in the total."""


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""A rectangular range of a tensor: index of the first element, and sizes."""


class Decoder(Protocol):
    """Converts the stored codes of a quantized tensor to its values.

    Along the dimension `dim`, groups of `values` values are stored as `codes` codes. The last group
    may have fewer of both. Along other dimensions a value is stored as one code. Readers pass whole
    groups.
    """

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the codes."""

    @property
    def dim(self) -> int: ...

    @property
    def codes(self) -> int: ...

    @property
    def values(self) -> int: ...

    def decode(self, codes: torch.Tensor, box: Box) -> torch.Tensor:
        """Return the values in a box of the tensor as float32 or float64, given their codes.

        `codes` has any strides. It has the sizes of the box, except for the dimension `dim`. No
        codes may raise: NaN stands for a value that is not a number.
        """


class Part(NamedTuple):
    """A rectangular part of a tensor, stored in one file. Most tensors have a single part."""

    path: str
    offset: int
    """Position of the first element in the file, in bytes."""
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements, never negative. If the tensor has a decoder, these are distances of codes, while
    `sizes` and `starts` count values."""
    starts: tuple[int, ...]
    """Index of the part's first element in the tensor."""


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint, whose elements have not been read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the values, if there is a decoder."""
    parts: tuple[Part, ...]
    """Cover every element once; empty if the elements cannot be read."""
    requires_grad: bool = False
    unread_reason: str | None = None
    """Why the elements cannot be read; None if they can."""
    aliases: tuple[str, ...] = ()
    is_conj: bool = False
    """Whether the tensor is the complex conjugate of the stored elements (torch's conj bit)."""
    group: Group = "model"
    label: str = ""
    """What a reader must know of the elements, such as "rank 0's shard of [8, 4]"."""
    decoder: Decoder | None = None
    weight_name: str = ""
    """The name of this weight in a checkpoint that is not quantized, if it differs."""
    is_codes: bool = False
    """Whether the elements are codes of values that are not known. They cannot be compared."""

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype in the file."""
        return self.dtype if self.decoder is None else self.decoder.dtype

    @property
    def names(self) -> tuple[str, ...]:
        names = (self.name, *self.aliases)
        return (*names, self.weight_name) if self.weight_name else names


class Checksum(NamedTuple):
    """The CRC-32 of a range of a file."""

    path: str
    begin: int
    nbytes: int
    crc: int
    name: str
    """What messages call the range, such as "archive/data/3"."""


class Contents(NamedTuple):
    """What a checkpoint contains."""

    tensors: list[StoredTensor]
    notes: tuple[str, ...] = ()
    """Lines about what is not in the list, such as objects of unknown classes, and files."""
    checksums: tuple[Checksum, ...] = ()


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


def merge_files(files: Iterable[tuple[str, Contents]], checkpoint: str) -> Contents:
    """Return the contents of several files as one; raise if a name is in two of the files."""
    file_of: dict[str, str] = {}
    merged: list[StoredTensor] = []
    notes: list[str] = []
    checksums: list[Checksum] = []
    for path, contents in files:
        notes += contents.notes
        checksums += contents.checksums
        for tensor in contents.tensors:
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
    return Contents(merged, tuple(notes), tuple(checksums))


def check_parts(tensor: StoredTensor, path: str) -> None:
    """Raise CheckpointError unless the parts cover every element of the tensor exactly once."""
    elements = 0
    for part in tensor.parts:
        ranges = list(zip(part.starts, part.sizes, tensor.shape, strict=False))
        is_inside = all(0 <= begin <= full and 0 <= n <= full - begin for begin, n, full in ranges)
        if not len(part.starts) == len(part.sizes) == len(tensor.shape) or not is_inside:
            box = f"{list(part.sizes)} at {list(part.starts)}"
            raise unexpected(f"parts of {tensor.name!r} inside {list(tensor.shape)}", box, path)
        elements += math.prod(part.sizes)
    overlap = len(tensor.parts) > 1 and _overlap(tensor)
    if elements != math.prod(tensor.shape) or overlap:
        expected = f"parts with {math.prod(tensor.shape)} elements in all for {tensor.name!r}"
        got = f"{elements}, some of them twice" if overlap else elements
        raise unexpected(expected, got, path)


def _overlap(tensor: StoredTensor) -> bool:
    """Return whether parts with as many elements as a tensor do not cover each of them once.

    A box stands for the polynomial that has the term x^i y^j ... for each element (i, j, ...). The
    polynomials of parts that cover every element once add up to that of the tensor. This compares
    both at a random point, modulo a prime. Different polynomials are equal there with a probability
    below 2^-58 (Schwartz 1980). Searching for two parts that overlap can take quadratic time.
    """
    point = [secrets.randbelow(_PRIME) for _ in tensor.shape]
    power = functools.lru_cache(1 << 12)(lambda x, exponent: pow(x, exponent, _PRIME))

    def value(starts: tuple[int, ...], sizes: tuple[int, ...]) -> int:
        """Return the value of a box's polynomial, times (x - 1) (y - 1) ..."""
        product = 1
        for x, start, size in zip(point, starts, sizes, strict=True):
            product = product * (power(x, start + size) - power(x, start)) % _PRIME
        return product

    parts = sum(value(part.starts, part.sizes) for part in tensor.parts)
    return parts % _PRIME != value((0,) * len(point), tensor.shape)
