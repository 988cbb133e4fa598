"""Read the header of a safetensors file: which tensors it holds, and where.

Such a file is the length of its header (8 bytes), the header in JSON, and the elements of all
tensors without gaps: https://huggingface.co/docs/safetensors. The whole header is validated before
any of it is used.
"""

from __future__ import annotations

import io
import json
import math
import reprlib
from typing import IO, Any

import torch

from paramstats.checkpoints._errors import unexpected
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._stored_tensors import Contents, StoredTensor, contiguous_part

_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_MAX_DIMENSIONS = 64
"""torch's own limit."""

_MAX_EXTRA_BRACKETS = 1_000_000
"""Brackets beyond those of tensors. JSON needs some 60 bytes of memory for each, so a header full
of brackets would take gigabytes."""

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"C64": torch.complex64, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
    "F8_E8M0": torch.float8_e8m0fnu,
}
_BITS = {
    **{name: 8 * dtype.itemsize for name, dtype in _DTYPES.items()},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},  # torch has no operators for these
}


def read(file: IO[bytes], path: str, _: Files) -> Contents:
    """Return the tensors of a file, in the order of its header."""
    size = file.seek(0, io.SEEK_END)
    entries, begin = _header(file, size, path)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # null is allowed
    if not isinstance(metadata, dict):
        raise unexpected("__metadata__ of names and strings", reprlib.repr(metadata), path)
    for name, value in metadata.items():
        if not isinstance(value, str):
            got = f"{reprlib.repr(value)} for {reprlib.repr(name)}"
            raise unexpected("strings in __metadata__", got, path)
    if "DCP_SHARDING_INFO" in metadata:
        raise unexpected(
            "whole tensors",
            "one rank's shards of them",
            path,
            "consolidate the checkpoint (torch.distributed.checkpoint.HuggingFaceStorageWriter "
            "with enable_consolidation=True)",
        )
    tensors = [_tensor(name, entry, begin, path) for name, entry in entries.items()]
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        first, past = (begin + offset for offset in entry["data_offsets"])
        if first != end:
            got = f"{name!r} at byte {first} instead of {end}"
            raise unexpected("tensors without gaps and overlaps", got, path)
        end = past
    if end != size:
        reason = (
            "the file is truncated: copy or download it again"
            if size < end
            else "there is data after the last tensor"
        )
        raise unexpected(f"{end} bytes", size, path, reason)
    return Contents(tensors)


def _header(file: IO[bytes], size: int, path: str) -> tuple[dict[str, Any], int]:
    """Return the header of a file of `size` bytes, and the position of the first element."""
    file.seek(0)
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    limit = min(size - 8, _MAX_HEADER_BYTES)
    if len(prefix) < 8 or length > limit:
        reason = "the file is truncated, or not a safetensors file"
        expected = f"a safetensors header of at most {max(0, limit)} bytes"
        raise unexpected(expected, length, path, reason)
    text = file.read(length)
    brackets = text.count(b"[") + text.count(b"{")
    if brackets > 4 * text.count(b"data_offsets") + _MAX_EXTRA_BRACKETS:
        raise unexpected("a safetensors header", "deeply nested lists", path)
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise unexpected("a safetensors header in JSON", error, path) from None
    if not isinstance(entries, dict):
        raise unexpected("a JSON object as safetensors header", type(entries).__name__, path)
    return entries, 8 + length


def _tensor(name: str, entry: Any, begin: int, path: str) -> StoredTensor:
    """Return the tensor that an entry of the header describes; its offsets count from `begin`."""
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise unexpected(f"dtype, shape and data_offsets of {name!r}", reprlib.repr(entry), path)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise unexpected(
            f"a dtype out of {', '.join(_BITS)}", f"{reprlib.repr(dtype)} for {name!r}", path
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        got = f"{reprlib.repr(shape)} and {reprlib.repr(offsets)}"
        raise unexpected(f"a shape and two offsets of {name!r}", got, path)
    nbytes, remainder = divmod(math.prod(shape) * bits, 8)
    if remainder or nbytes != offsets[1] - offsets[0]:
        expected = f"{nbytes} bytes of {dtype} {reprlib.repr(shape)} for {name!r}"
        raise unexpected(expected, offsets[1] - offsets[0], path)
    shape = tuple(shape)
    if dtype not in _DTYPES:
        reason = f"torch has no operators for {dtype}"
        return StoredTensor(name, shape, torch.bits8, (), unread_reason=reason)
    part = contiguous_part(path, begin + offsets[0], shape)
    return StoredTensor(name, shape, _DTYPES[dtype], (part,))


def _are_sizes(values: Any) -> bool:
    if not isinstance(values, list) or len(values) > _MAX_DIMENSIONS:
        return False
    return all(type(n) is int and 0 <= n < 1 << 62 for n in values)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict; raise ValueError if a name repeats."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name that occurs twice")
    return entries
