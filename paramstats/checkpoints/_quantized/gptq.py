"""GPTQ and AWQ: qweight, qzeros and scales."""

from __future__ import annotations

import torch

from paramstats.checkpoints._quantized.companions import Load, UnclearError
from paramstats.checkpoints._quantized.decoders import Packing, ScaledCodes, in_order
from paramstats.checkpoints._quantized.grids import FLOATS, Grid
from paramstats.checkpoints._quantized.source import Source, decoded, unpacked_parts
from paramstats.checkpoints._stored_tensors import Part, StoredTensor

_AWQ_ORDER = tuple(4 * i for i in (0, 4, 1, 5, 2, 6, 3, 7))
"""AutoAWQ stores the columns 0, 2, 4, 6, 1, 3, 5, 7 of a group from the lowest bits on."""


def decode_gptq_or_awq(source: Source, tensor: StoredTensor, name: str) -> StoredTensor:
    """Decode GPTQ, which packs the columns of the weight, or AWQ, which packs its rows.

    Both store the transposed weight. The result has the shape of the weight, [rows, columns].
    """
    module = name.removesuffix("qweight")
    scale = source.need(f"{module}scales", "scale", name)
    zeros = source.need(f"{module}qzeros", "zero point", name)
    index = source.find(f"{module}g_idx", "group index", name)
    shapes = (tensor.shape, scale.shape, zeros.shape)
    if any(len(shape) != 2 or not all(shape) for shape in shapes) or zeros.dtype != torch.int32:
        raise UnclearError(
            f"qweight, scales and qzeros of shapes {[list(shape) for shape in shapes]}"
        )
    (a, b), (count, rows) = tensor.shape, scale.shape
    bits, rest = divmod(32 * zeros.shape[1], rows)
    if (
        rest
        or bits not in (2, 3, 4, 8)
        or a * 32 % bits
        or zeros.shape[0] != count
        or scale.dtype not in FLOATS
    ):
        raise UnclearError(
            f"qweight, scales and qzeros of shapes {[list(shape) for shape in shapes]}"
        )
    method, form = source.config.quantization(tensor)
    is_awq = bits == 4 and b * 8 == rows and b != rows
    if is_awq and method in (None, "awq") and form in (None, "gemm"):
        packing, d, columns, plus = Packing(4, _AWQ_ORDER, 32), 0, a, 0
    elif b == rows and method in (None, "gptq") and form in (None, "gptq", "gptq_v2"):
        packing, d, columns = in_order(bits, 32), 1, a * 32 // bits
        plus = 0 if form == "gptq_v2" else 1
    else:
        raise UnclearError(
            f"quantization by {method or 'an unknown method'}, {form or 'no'} format"
        )
    shape = (rows, columns)
    groups: dict[int, Load] = {}
    if index is not None and index.shape != (0,):
        if is_awq or index.shape != (columns,) or index.dtype not in (torch.int32, torch.int64):
            raise UnclearError(f"a g_idx of shape {list(index.shape)}")
        low, high = (int(x) for x in source.companions.read(index).aminmax())
        if low < 0 or high >= count:
            raise UnclearError(f"a g_idx from {low} to {high} for {count} groups")
        groups = {1: source.companions.loader(index, lambda x: x.to(torch.int64))}
    elif columns % count:
        raise UnclearError(f"{count} groups of {columns} columns")
    zero_packing = packing if is_awq else in_order(bits, 32)

    def unpack(x: torch.Tensor) -> torch.Tensor:
        return (zero_packing.unpack(x, rows) + plus).to(torch.int16).t()

    blocks = (1, columns // count if not columns % count else 1)
    decoder = ScaledCodes(
        torch.int32,
        Grid(source.companions.loader(scale, lambda x: x.t()), blocks, groups),
        Grid(source.companions.loader(zeros, unpack), blocks, groups),
        packing,
        d,
    )
    transposed = tensor._replace(
        shape=(b, a),
        parts=tuple(
            Part(p.path, p.offset, p.sizes[::-1], p.strides[::-1], p.starts[::-1])
            for p in tensor.parts
        ),
    )
    parts = unpacked_parts(transposed, shape, d, packing)
    kind = "AWQ" if is_awq else "GPTQ v2" if plus == 0 else "GPTQ"
    text = f"of {bits} bits ({kind}) times {scale.name!r}, transposed"
    return decoded(tensor, shape, parts, decoder, text, f"{module}weight")
