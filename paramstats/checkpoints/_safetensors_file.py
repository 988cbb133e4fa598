"""Files of the safetensors format: the header says what they hold, and where.

Eight bytes with the header's length, the header in JSON, the elements of all tensors without gaps:
https://huggingface.co/docs/safetensors. The header is taken at its word only where all of it holds.
"""

from __future__ import annotations

import io
import json
import math
from typing import IO, Any

import torch

from paramstats.checkpoints._stored import CheckpointError, Stored, whole

_LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""

_MOST_DIMENSIONS = 64
"""Of a tensor of torch's."""

_BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "BOOL": 8},
    **{f"{kind}{bits}": bits for kind in "IU" for bits in (64, 32, 16, 8)},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
_MOST_BRACKETS = 1_000_000
"""Beside those of tensors: JSON makes some 60 bytes of each, gigabytes of a header full of them."""

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"C64": torch.complex64, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
    "F8_E8M0": torch.float8_e8m0fnu,
}


def read(file: IO[bytes], path: str) -> list[Stored]:
    """The tensors of a file, in the order of its header."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise CheckpointError(
            f"paramstats: expected a safetensors file with a header of at most "
            f"{max(0, min(size - 8, _LONGEST_HEADER))} bytes, got {length} in {path}: it is cut "
            "off, or not safetensors"
        )
    header = file.read(length)
    if header.count(b"[") + header.count(b"{") > 4 * header.count(b"data_offsets") + _MOST_BRACKETS:
        raise CheckpointError(
            f"paramstats: expected a safetensors header of tensors, got lists in lists in {path}"
        )
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"paramstats: expected a safetensors header in JSON, got {error} in {path}"
        ) from None
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"paramstats: expected a safetensors header with an object, got "
            f"{type(entries).__name__} in {path}"
        )
    about = entries.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise CheckpointError(f"paramstats: expected texts as __metadata__, got others in {path}")
    if "DCP_SHARDING_INFO" in about:
        raise CheckpointError(
            f"paramstats: expected whole tensors, got one process's parts of them in {path}; "
            "consolidate the checkpoint (torch.distributed.checkpoint.HuggingFaceStorageWriter "
            "with enable_consolidation=True)"
        )
    begin = 8 + length
    tensors = [_tensor(name, entry, begin, path) for name, entry in entries.items()]
    end = begin
    for first, past, name in sorted((*_extent(e, begin), n) for n, e in entries.items()):
        if first != end:
            raise CheckpointError(
                f"paramstats: expected tensors one after another, got {name!r} at byte {first} "
                f"instead of {end} in {path}"
            )
        end = past
    if end != size:
        what = "it is cut off" if size < end else "there is something after its end"
        raise CheckpointError(f"paramstats: expected {end} bytes, got {size} in {path}: {what}")
    return tensors


def _extent(entry: Any, begin: int) -> tuple[int, int]:
    first, past = entry["data_offsets"]
    return begin + first, begin + past


def _tensor(name: str, entry: Any, begin: int, path: str) -> Stored:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"paramstats: expected dtype, shape and data_offsets, got {_short(entry)} for "
            f"{name!r} in {path}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise CheckpointError(
            f"paramstats: expected a dtype out of {', '.join(_BITS)}, got {_short(dtype)} for "
            f"{name!r} in {path}"
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"paramstats: expected a shape and two offsets, got {_short(shape)} and "
            f"{_short(offsets)} for {name!r} in {path}"
        )
    nbytes, odd = divmod(math.prod(shape) * bits, 8)
    if odd or nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"paramstats: expected {nbytes} bytes of {dtype} {_short(shape)}, got "
            f"{offsets[1] - offsets[0]} for {name!r} in {path}"
        )
    known = _DTYPES.get(dtype)
    if known is None:
        reason = f"torch has no operators for {dtype}"
        return Stored(name, tuple(shape), torch.bits8, (), unread=reason)
    part = whole(path, begin + offsets[0], tuple(shape))
    return Stored(name, tuple(shape), known, (part,))


def _are_sizes(values: Any) -> bool:
    if not isinstance(values, list) or len(values) > _MOST_DIMENSIONS:
        return False
    return all(type(n) is int and 0 <= n < 1 << 62 for n in values)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name that stands twice")
    return entries


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:76]} ..."
