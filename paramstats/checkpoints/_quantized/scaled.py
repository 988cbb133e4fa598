"""Float8 and int8 weights with scales: DeepSeek, compressed-tensors, ComfyUI, torchao, LLM.int8."""

from __future__ import annotations

import torch

from paramstats.checkpoints._quantized.companions import UnclearError
from paramstats.checkpoints._quantized.decoders import ScaledCodes
from paramstats.checkpoints._quantized.grids import to_float
from paramstats.checkpoints._quantized.source import Source, decoded, make_grid
from paramstats.checkpoints._stored_tensors import StoredTensor

FLOAT8 = frozenset(
    {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
)
_FLOAT8_VALUES = {
    dtype: torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).to(torch.float32)
    for dtype in FLOAT8
}
"""The values of all codes."""


def decode_scaled(source: Source, tensor: StoredTensor, name: str) -> StoredTensor | None:
    """Decode float8 or int8 codes, which all libraries multiply with the scale.

    This includes DeepSeek's weight_scale_inv, which is the inverse of the factor that was used to
    quantize. LLM.int8 multiplies with SCB / 127.
    """
    base = name.removesuffix("_qdata").removesuffix("._data")  # torchao, quanto
    names = [f"{base}_scale_inv", f"{base}_scale"]
    if name.endswith("._data"):
        names = [f"{base}._scale"]
    module = name.removesuffix("weight")
    if module != name:
        names.append(f"{module}scale_weight")
        names.append(f"{module}scale" if tensor.dtype in FLOAT8 else f"{module}SCB")
    found = [n for n in names if n in source.tensors]
    if not found:
        return None
    scale, *others = [source.need(n, "scale", name) for n in found]
    if others:
        raise UnclearError(f"more than one scale: {', '.join(found)}")
    if source.find(f"{base}_scale_2", "scale", name) is not None:
        raise UnclearError("more than one scale")
    convert = to_float
    if found[0] == f"{module}SCB":
        form = source.find(f"{module}weight_format", "format", name)
        if form is not None and source.companions.read(form, 64).any():
            raise UnclearError("an unknown weight_format")
        if scale.shape != tensor.shape[:1]:
            raise UnclearError(f"an SCB of shape {list(scale.shape)}")

        def convert(x: torch.Tensor) -> torch.Tensor:
            return to_float(x) / 127

    zero = source.find(f"{base}_zero_point", "zero point", name)
    decoder = ScaledCodes(
        torch.uint8 if tensor.dtype in FLOAT8 else tensor.dtype,
        make_grid(source, tensor.shape, scale, convert=convert),
        0 if zero is None else make_grid(source, tensor.shape, zero, like=scale),
        table=_FLOAT8_VALUES.get(tensor.dtype),
    )
    return decoded(tensor, tensor.shape, tensor.parts, decoder, f"times {scale.name!r}")
