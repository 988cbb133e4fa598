"""Integers of 1 to 8 bits that compressed-tensors packs in int32 (W4A16)."""

from __future__ import annotations

import torch

from paramstats.checkpoints._quantized.companions import Load, UnclearError
from paramstats.checkpoints._quantized.decoders import Packing, ScaledCodes, in_order
from paramstats.checkpoints._quantized.grids import Grid
from paramstats.checkpoints._quantized.source import Source, decoded, make_grid, unpacked_parts
from paramstats.checkpoints._stored_tensors import StoredTensor


def decode_packed_integers(source: Source, tensor: StoredTensor, name: str) -> StoredTensor:
    """Decode integers of 1 to 8 bits as compressed-tensors packs them along the last dimension."""
    base = name.removesuffix("_packed")
    scale = source.need(f"{base}_scale", "scale", name)
    shape = _shape(source, source.need(f"{base}_shape", "shape", name))
    if len(shape) != len(tensor.shape) or len(shape) < 2 or shape[:-1] != tensor.shape[:-1]:
        raise UnclearError(f"the shape {list(shape)} does not fit {list(tensor.shape)}")
    words, columns = tensor.shape[-1], shape[-1]
    fitting = [bits for bits in range(1, 9) if -(-columns * bits // 32) == words]
    if len(fitting) != 1:
        raise UnclearError("the number of bits is not clear")
    bits, d = fitting[0], len(shape) - 1
    packing = in_order(bits, 32)
    zero: Grid | int = 1 << (bits - 1)
    packed_zero = source.find(f"{base}_zero_point", "zero point", name)
    if packed_zero is not None:
        zero = _packed_zeros(source, packed_zero, packing, shape, scale)
    groups = _sorted_groups(source, f"{base}_g_idx", name, shape, scale)
    grid = make_grid(source, shape, scale, groups=groups)
    if isinstance(zero, Grid):
        zero = Grid(zero.load, grid.blocks, grid.groups)
    parts = unpacked_parts(tensor, shape, d, packing)
    decoder = ScaledCodes(torch.int32, grid, zero, packing, d)
    text = f"of {bits} bits times {scale.name!r}"
    return decoded(tensor, shape, parts, decoder, text, f"{base}")


def _packed_zeros(
    source: Source,
    tensor: StoredTensor,
    packing: Packing,
    shape: tuple[int, ...],
    scale: StoredTensor,
) -> Grid:
    """Return zero points, which are packed along the first dimension, with the codes' offset."""
    rows, columns = shape[0], scale.shape[-1] if scale.shape else 0
    expected = (-(-rows * packing.bits // 32), columns)
    if tensor.dtype != torch.int32 or len(shape) != 2 or tensor.shape != expected:
        raise UnclearError(f"{tensor.name!r} has the shape {list(tensor.shape)}")

    def unpack(x: torch.Tensor) -> torch.Tensor:
        return packing.unpack(x.t(), rows).t().to(torch.uint8)

    return Grid(source.companions.loader(tensor, unpack), (1, 1))


def _sorted_groups(
    source: Source, name: str, owner: str, shape: tuple[int, ...], scale: StoredTensor
) -> dict[int, Load]:
    """Return the group of each column: columns are sorted by g_idx, then grouped."""
    tensor = source.find(name, "group index", owner)
    d, n = len(shape) - 1, shape[-1]
    count = scale.shape[-1] if len(scale.shape) == len(shape) else 1
    if tensor is None or count <= 1:
        return {}
    if tensor.shape != (n,) or tensor.dtype not in (torch.int32, torch.int64) or n % count:
        raise UnclearError(f"{tensor.name!r} does not fit {list(shape)}")

    def groups(index: torch.Tensor) -> torch.Tensor:
        order = torch.arange(n, dtype=torch.int64, device="cpu")
        if not (index == -1).any():
            order = index.argsort(stable=True).argsort()
        return order // (n // count)

    return {d: source.companions.loader(tensor, groups)}


def _shape(source: Source, tensor: StoredTensor) -> tuple[int, ...]:
    """Return the shape that a tensor holds."""
    if tensor.dtype not in (torch.int64, torch.int32) or len(tensor.shape) != 1:
        raise UnclearError(f"{tensor.name!r} holds no shape")
    shape = tuple(source.companions.read(tensor, 512).tolist())
    if not all(0 < n < 1 << 40 for n in shape):
        raise UnclearError(f"the shape {list(shape)}")
    return shape
