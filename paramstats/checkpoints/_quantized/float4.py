"""Pairs of float4 in bytes, with a scale for each block: NVFP4 and MXFP4."""

from __future__ import annotations

import math

import torch

from paramstats.checkpoints._quantized.companions import UnclearError
from paramstats.checkpoints._quantized.decoders import ScaledCodes, in_order
from paramstats.checkpoints._quantized.grids import Grid
from paramstats.checkpoints._quantized.source import Source, decoded, unpacked_parts
from paramstats.checkpoints._stored_tensors import Part, StoredTensor

_E8M0 = torch.float8_e8m0fnu

_VALUES = torch.tensor(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6],
    dtype=torch.float32,
    device="cpu",
)
"""Values of float4_e2m1, by their bits."""


def decode_packed_float4(source: Source, tensor: StoredTensor, name: str) -> StoredTensor:
    """Decode NVFP4 or MXFP4 as compressed-tensors packs it: the first float4 in the low bits."""
    base = name.removesuffix("_packed")
    scale = source.need(f"{base}_scale", "scale", name)
    total = source.find(f"{base}_global_scale", "scale", name)
    if len(tensor.shape) < 2:
        raise UnclearError(f"the shape {list(tensor.shape)}")
    if total is None and scale.dtype in (torch.uint8, _E8M0):
        return _microscaled(source, tensor, tensor.parts, tensor.shape, scale, base)
    if scale.dtype != torch.float8_e4m3fn or total is None or math.prod(total.shape) != 1:
        raise UnclearError("no global scale found")
    shape = (*tensor.shape[:-1], 2 * tensor.shape[-1])
    _check_blocks(scale, shape, 16)
    load_total = source.companions.loader(total, lambda x: x.to(torch.float32).reshape(()))
    grid = Grid(
        source.companions.loader(scale, lambda x: x),
        (*(1,) * (len(shape) - 1), 16),
        convert=lambda x: x.to(torch.float32) / load_total(),
    )
    text = f"times {scale.name!r} / {total.name!r}"
    return _float4(tensor, tensor.parts, shape, grid, text, base)


def decode_gpt_oss(source: Source, tensor: StoredTensor, name: str) -> StoredTensor | None:
    """Decode MXFP4 as in gpt-oss: blocks [..., 16] of 32 values, scales are exponents."""
    base = name.removesuffix("_blocks")
    if f"{base}_scales" not in source.tensors:
        return None
    scale = source.need(f"{base}_scales", "scale", name)
    if len(tensor.shape) < 3 or tensor.shape[-1] != 16 or len(tensor.parts) != 1:
        raise UnclearError(f"blocks of shape {list(tensor.shape)}")
    part = tensor.parts[0]
    *strides, outer, inner = part.strides
    if part.sizes != tensor.shape or outer != 16 * inner:
        raise UnclearError("blocks in an unknown order")
    shape = (*tensor.shape[:-2], 16 * tensor.shape[-2])
    joined = Part(part.path, part.offset, shape, (*strides, inner), (0,) * len(shape))
    return _microscaled(source, tensor, (joined,), shape, scale, base)


def _microscaled(
    source: Source,
    tensor: StoredTensor,
    parts: tuple[Part, ...],
    packed: tuple[int, ...],
    scale: StoredTensor,
    weight_name: str,
) -> StoredTensor:
    """Decode MXFP4: blocks of 32 float4 with a power of two as scale."""
    shape = (*packed[:-1], 2 * packed[-1])
    if scale.dtype not in (torch.uint8, _E8M0):
        raise UnclearError(f"{scale.name!r} has the dtype {scale.dtype}")
    _check_blocks(scale, shape, 32)
    grid = Grid(
        source.companions.loader(scale, lambda x: x.view(torch.uint8)),
        (*(1,) * (len(shape) - 1), 32),
        convert=lambda x: x.contiguous().view(_E8M0).to(torch.float32),
    )
    moved = tensor._replace(shape=packed, parts=parts)
    return _float4(
        moved, parts, shape, grid, f"times the powers of two {scale.name!r}", weight_name
    )


def _float4(
    tensor: StoredTensor,
    parts: tuple[Part, ...],
    shape: tuple[int, ...],
    grid: Grid,
    text: str,
    weight_name: str,
) -> StoredTensor:
    packing, d = in_order(4, 8), len(shape) - 1
    parts = unpacked_parts(tensor._replace(parts=parts), shape, d, packing)
    decoder = ScaledCodes(torch.uint8, grid, 0, packing, d, _VALUES)
    return decoded(tensor, shape, parts, decoder, text, weight_name, "float4")


def _check_blocks(scale: StoredTensor, shape: tuple[int, ...], block: int) -> None:
    if scale.shape != (*shape[:-1], shape[-1] // block) or shape[-1] % block or not all(shape):
        raise UnclearError(f"a scale of shape {list(scale.shape)} does not fit {list(shape)}")
