"""NF4 and FP4 of bitsandbytes: absmax, quant_map and a quant_state in JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from paramstats.checkpoints._quantized.companions import Load, UnclearError
from paramstats.checkpoints._quantized.decoders import Packing, ScaledCodes
from paramstats.checkpoints._quantized.grids import FLOATS, FlatBlocks, Grid, Numbers
from paramstats.checkpoints._quantized.source import Source, decoded
from paramstats.checkpoints._stored_tensors import StoredTensor, contiguous_part, is_dense

_HIGH_FIRST = Packing(4, (4, 0), 8)
_BLOCK_SIZES = frozenset({32, 64, 128, 256, 512, 1024, 2048, 4096})
_MAX_STATE = 1 << 16
"""Bytes of a quant_state."""

_CHUNK = 1 << 20
"""Scales that are dequantized at a time."""


def decode_bitsandbytes(source: Source, tensor: StoredTensor, name: str) -> StoredTensor:
    """Decode NF4 or FP4 of bitsandbytes: two codes a byte, the first one high, flattened."""
    absmax = source.need(f"{name}.absmax", "scale", name)
    table = source.need(f"{name}.quant_map", "map", name)
    nested = source.find(f"{name}.nested_absmax", "scale", name)
    nested_table = source.find(f"{name}.nested_quant_map", "map", name)
    states = [
        state
        for kind in ("nf4", "fp4")
        if (state := source.find(f"{name}.quant_state.bitsandbytes__{kind}", "state", name))
    ]
    if len(states) != 1 or states[0].dtype != torch.uint8 or len(states[0].shape) != 1:
        raise UnclearError("no quant_state found")
    info = _json(source.companions.read(states[0], _MAX_STATE))
    shape, block = info.get("shape"), info.get("blocksize")
    if (
        not isinstance(shape, list)
        or not 0 < len(shape) < 9
        or not all(type(n) is int and n > 0 for n in shape)
    ):
        raise UnclearError("no shape in the quant_state")
    if type(block) is not int or block not in _BLOCK_SIZES:
        raise UnclearError("no block size in the quant_state")
    shape, count = tuple(shape), math.prod(shape)
    nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
    if count % 2 or shape[-1] % 2 or 2 * nbytes != count or len(tensor.parts) != 1:
        raise UnclearError(f"{nbytes:,} bytes for the shape {list(shape)}")
    part = tensor.parts[0]
    if part.strides != contiguous_part("", 0, tensor.shape).strides and not (
        is_dense(part.sizes, part.strides) and tensor.shape.count(1) >= len(tensor.shape) - 1
    ):
        raise UnclearError("codes that are not contiguous")
    blocks = -(-count // block)
    if absmax.shape != (blocks,) or table.shape != (16,) or table.dtype not in FLOATS:
        raise UnclearError(f"absmax and quant_map of shapes {[*absmax.shape]}, {[*table.shape]}")
    if nested is None and absmax.dtype == torch.float32:
        load = source.companions.loader(absmax, lambda x: x)
    elif nested is not None and nested_table is not None and absmax.dtype == torch.uint8:
        load = _nested(source, absmax, nested, nested_table, info)
    else:
        raise UnclearError(f"absmax of the dtype {absmax.dtype}")
    scale: Numbers = FlatBlocks(load, block, shape)
    if shape[-1] % block == 0:
        grid = (*shape[:-1], shape[-1] // block)
        scale = Grid(lambda: load().view(grid), (*(1,) * (len(shape) - 1), block))
    numbers = source.companions.read(table).to(torch.float32)
    decoder = ScaledCodes(torch.uint8, scale, 0, _HIGH_FIRST, len(shape) - 1, numbers)
    packed = contiguous_part(part.path, part.offset, (*shape[:-1], shape[-1] // 2))
    parts = (packed._replace(sizes=shape),)
    return decoded(tensor, shape, parts, decoder, f"times {absmax.name!r}", "", "4-bit")


def _nested(
    source: Source,
    absmax: StoredTensor,
    nested: StoredTensor,
    table: StoredTensor,
    state: dict[str, Any],
) -> Load:
    """Return a function that returns scales, which are quantized themselves, in blocks."""
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(block) is not int or block < 1 or not isinstance(offset, (int, float)):
        raise UnclearError("no nested block size and offset in the quant_state")
    expected = -(-absmax.shape[0] // block)
    if nested.dtype != torch.float32 or nested.shape != (expected,) or table.shape != (256,):
        raise UnclearError(f"nested_absmax of shape {list(nested.shape)}")
    scales = source.companions.loader(nested, lambda x: x)
    values = source.companions.read(table).to(torch.float32)

    def dequantize(codes: torch.Tensor) -> torch.Tensor:
        out = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
        for first in range(0, len(codes), _CHUNK):
            end = min(first + _CHUNK, len(codes))
            blocks = torch.arange(first, end, dtype=torch.int64, device="cpu") // block
            out[first:end] = values[codes[first:end].long()] * scales()[blocks] + offset
        return out

    return source.companions.loader(absmax, dequantize)


def _json(data: torch.Tensor) -> dict[str, Any]:
    """Return the JSON object in a tensor of bytes."""
    try:
        state = json.loads(bytes(data.tolist()).decode())
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise UnclearError("no JSON in the quant_state")
    return state
