"""List the tensors of a GGUF file, the format of llama.cpp.

Such a file is a header with pairs of keys and values, then the name, shape, type and place of every
tensor, then the elements: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import io
import itertools
import math
import struct
from dataclasses import dataclass
from typing import IO, Any, ClassVar

import torch

from paramstats.checkpoints._errors import CheckpointError, unexpected
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._stored_tensors import Contents, StoredTensor, contiguous_part

_MAX_HEADER_BYTES = 64 << 20
"""The words of a tokenizer are in the header: 10 MB are common."""

_MIN_ENTRY = 13
"""Bytes that a key or a tensor takes at least."""

_MAX_TEXT_BYTES = 1 << 16
_MAX_DIMENSIONS = 8
_TENSOR = 2000
"""Bytes of memory that a tensor needs."""

_DTYPES = {
    **{0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16},
    **{24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64},
}
_BLOCKS = {
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24)},
    **{8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110)},
    **{12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210)},
    **{15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74)},
    **{18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18)},
    **{21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136)},
    **{29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66)},
    **{39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18)},
}
"""Names of quantized types, and how many values a block of how many bytes has."""

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the types of values: integers of 8 to 32 bits, float, bool, and those of 64 bits."""

_Q8_0 = 8

_UINT32, _TEXT, _ARRAY = 4, 8, 9


class _Header:
    """Reads a header, which must end within the file and within a limit."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        self._file, self._path = file, path
        self.end = file.seek(0, io.SEEK_END)
        self._left = min(self.end, _MAX_HEADER_BYTES)
        file.seek(0)

    def skip(self, size: int) -> None:
        self._take(size)
        self._file.seek(size, io.SEEK_CUR)

    def bytes(self, size: int) -> bytes:
        self._take(size)
        return self._file.read(size)

    def number(self, size: int = 8) -> int:
        return int.from_bytes(self.bytes(size), "little")

    def text(self) -> str:
        size = self.number()
        if size > _MAX_TEXT_BYTES:
            raise self.error(f"a name of at most {_MAX_TEXT_BYTES:,} bytes", f"{size:,}")
        return self.bytes(size).decode(errors="backslashreplace")

    def skip_value(self, kind: int) -> None:
        """Skip a value. Arrays have no arrays in them in any file; such a file is refused."""
        count = 1
        if kind == _ARRAY:
            kind, count = self.number(4), self.number()
        if kind == _TEXT:
            self._take(8 * count)
            self._left += 8 * count  # a count that does not fit ends here, not in the loop
            for _ in range(count):
                self.skip(self.number())
        elif kind in _SIZES:
            self.skip(count * _SIZES[kind])
        else:
            raise self.error("values of a known type", f"type {kind}")

    def error(self, expected: str, got: object) -> CheckpointError:
        return unexpected(f"a GGUF file with {expected}", got, self._path)

    def _take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            reason = "the file is truncated or damaged"
            expected = f"a GGUF header of at most {min(self.end, _MAX_HEADER_BYTES):,} bytes"
            raise unexpected(expected, "a longer one", self._path, reason)


def read(file: IO[bytes], path: str, files: Files) -> Contents:
    """Return the tensors of a file, in its order. Shapes are those of torch: the last size is that
    of neighboring elements.
    """
    header = _Header(file, path)
    header.skip(4)
    version = header.number(4)
    if version not in (2, 3):
        is_big = version in (2 << 24, 3 << 24)
        raise header.error("version 2 or 3", "big-endian numbers" if is_big else version)
    count, pairs = header.number(), header.number()
    if max(count, pairs) > header.end // _MIN_ENTRY:
        got = f"{count:,} and {pairs:,}"
        raise header.error(f"tensors and keys that fit in {header.end:,} bytes", got)
    alignment = 32
    for _ in range(pairs):
        key, kind = header.text(), header.number(4)
        if key == "general.alignment" and kind == _UINT32:
            alignment = header.number(4)
        else:
            header.skip_value(kind)
    if alignment <= 0 or alignment & (alignment - 1):
        raise header.error("a power of two as general.alignment", alignment)
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name, dimensions = header.text(), header.number(4)
        if dimensions > _MAX_DIMENSIONS:
            raise header.error(f"at most {_MAX_DIMENSIONS} dimensions of {name!r}", dimensions)
        sizes = struct.unpack(f"<{dimensions}Q", header.bytes(8 * dimensions))
        if name in found:
            raise header.error("every name once", f"{name!r} twice")
        if math.prod(sizes) >> 62:
            raise header.error(f"a shape of {name!r}", "more elements than can be counted")
        found[name] = sizes[::-1], header.number(4), header.number()
        files.budget.add(len(name) + 24 + 8 * dimensions)
        files.budget.charge(_TENSOR)
    begin = -(-file.tell() // alignment) * alignment
    tensors, ranges = [], []
    for name, (shape, kind, offset) in found.items():
        tensor, nbytes = _tensor(name, shape, kind, begin + offset, path)
        if offset % alignment or begin + offset + nbytes > header.end:
            got = f"{nbytes:,} bytes at byte {begin + offset:,} of {header.end:,}"
            reason = "the file is truncated or damaged"
            raise unexpected(f"the elements of {name!r} in the file", got, path, reason)
        tensors.append(tensor)
        ranges.append((begin + offset, begin + offset + nbytes))
    ranges.sort()
    if any(first < past for (_, past), (first, _) in itertools.pairwise(ranges)):
        raise header.error("tensors in different bytes", "some in the same bytes")
    return Contents(tensors)


def _tensor(
    name: str, shape: tuple[int, ...], kind: int, begin: int, path: str
) -> tuple[StoredTensor, int]:
    """Return a tensor and its size in the file; 0 if its type is not known."""
    if kind in _DTYPES:
        dtype = _DTYPES[kind]
        tensor = StoredTensor(name, shape, dtype, (contiguous_part(path, begin, shape),))
        return tensor, math.prod(shape) * dtype.itemsize
    type_name, values, nbytes = _BLOCKS.get(kind, (f"type {kind}", 1, 0))
    if math.prod(shape[-1:]) % values:
        raise unexpected(f"rows of {name!r} in blocks of {values}", list(shape), path)
    size = math.prod(shape) // values * nbytes
    if kind == _Q8_0:
        decoder: Any = Q8Blocks(len(shape) - 1)
        codes = (*shape[:-1], shape[-1] // values * nbytes)
        part = contiguous_part(path, begin, codes)._replace(sizes=shape)
        label = "values of Q8_0 blocks"
        return StoredTensor(name, shape, torch.float32, (part,), label=label, decoder=decoder), size
    return StoredTensor(
        *(name, shape, torch.bits8, ()),
        unread_reason=f"{type_name} blocks, which paramstats does not decode",
        label=f"{type_name} codes",
    ), size


@dataclass(frozen=True)
class Q8Blocks:
    """Converts Q8_0 to values: blocks of a factor in float16 and 32 integers of 8 bits."""

    dim: int
    """The last dimension, along which a block lies."""
    dtype: ClassVar[torch.dtype] = torch.uint8
    codes: ClassVar[int] = 34
    values: ClassVar[int] = 32

    def decode(self, codes: torch.Tensor, _: object) -> torch.Tensor:
        """Return the values of whole blocks, given their bytes."""
        blocks = codes.unflatten(-1, (-1, self.codes))
        factors = blocks[..., :2].contiguous().view(torch.float16).float()
        integers = blocks[..., 2:].contiguous().view(torch.int8).float()
        values: torch.Tensor = (integers * factors).flatten(-2)
        return values
