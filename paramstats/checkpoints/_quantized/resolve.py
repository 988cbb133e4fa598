"""Find the quantized tensors of a checkpoint, and give them decoders or labels."""

from __future__ import annotations

import math

import torch

from paramstats.checkpoints._errors import CheckpointError
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._quantized.bitsandbytes import decode_bitsandbytes
from paramstats.checkpoints._quantized.companions import Companions, UnclearError
from paramstats.checkpoints._quantized.config import Config
from paramstats.checkpoints._quantized.float4 import decode_gpt_oss, decode_packed_float4
from paramstats.checkpoints._quantized.gptq import decode_gptq_or_awq
from paramstats.checkpoints._quantized.packed_integers import decode_packed_integers
from paramstats.checkpoints._quantized.scaled import FLOAT8, decode_scaled
from paramstats.checkpoints._quantized.source import Source
from paramstats.checkpoints._reading import split_groups
from paramstats.checkpoints._stored_tensors import Contents, Part, StoredTensor, is_dense

_BY_SUFFIX = (
    ("weight_packed", torch.int32, decode_packed_integers),
    ("weight_packed", torch.uint8, decode_packed_float4),
    ("qweight", torch.int32, decode_gptq_or_awq),
    ("_blocks", torch.uint8, decode_gpt_oss),
)
_CODES = frozenset({torch.int8, torch.uint8, torch.int32})
_NAMES_OF_CODES = frozenset({"weight", "qweight", "weight_packed", "q_weight", "W_q"})
_NAMES_NEXT_TO_CODES = (
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "scale_weight"),
    *("weight_zero_point", "weight_shape", "weight_g_idx", "g_idx", "scales", "qzeros", "SCB"),
    *("weight_format", "comfy_quant", "input_scale", "scale_input", "input_global_scale"),
    *("input_zero_point", "k_scale", "v_scale", "weight.quant_map", "weight.nested_absmax"),
    "weight.nested_quant_map",
)
_SAMPLE = 1 << 16
"""Elements of a float8 tensor that are read to see whether they look like codes."""


def resolve(contents: Contents, files: Files) -> Contents:
    """Return a checkpoint's contents with decoders for quantized weights whose scale is clear.

    Weights whose codes cannot be decoded go to the group "other", and so do scales. Labels say what
    these tensors are. Tensors that are not the model's stay as they are.
    """
    of_model = [t for t in contents.tensors if t.group == "model"]
    tensors = [t for t in of_model if t.unread_reason is None]
    if not any(t.dtype in FLOAT8 or t.dtype in _CODES for t in tensors):
        return contents
    by_name = {name: t for t in of_model for name in t.names}
    source = Source(dict(by_name), Companions(files), Config(files))
    resolved: dict[str, StoredTensor] = {}
    for tensor in tensors:
        if tensor.decoder is None:
            found = _resolve(source, tensor)
            if found is not None:
                resolved[tensor.name] = found
    _label_float8(source, tensors, resolved)
    for tensor in resolved.values():
        if tensor.decoder is not None or tensor.is_codes:
            module = tensor.name[: tensor.name.rfind(".") + 1]
            for name in _NAMES_NEXT_TO_CODES:
                if (companion := by_name.get(module + name)) is not None:
                    source.used.setdefault(companion.name, f"belongs to {tensor.name!r}")
    for name, label in source.used.items():
        if name not in resolved or resolved[name].decoder is None:
            resolved[name] = by_name[name]._replace(group="other", label=label)
    return contents._replace(tensors=[resolved.get(t.name, t) for t in contents.tensors])


def _resolve(source: Source, tensor: StoredTensor) -> StoredTensor | None:
    """Return a tensor with a decoder, or as codes; None if nothing says that it has codes."""
    try:
        for name in tensor.names:
            decoded = _decode(source, tensor, name)
            if decoded is not None:
                return _checked(source, decoded)
    except UnclearError as error:
        return _as_codes(tensor, str(error))
    is_named = tensor.dtype in _CODES and tensor.name.rpartition(".")[2] in _NAMES_OF_CODES
    return _as_codes(tensor, "no scale found") if is_named else None


def _decode(source: Source, tensor: StoredTensor, name: str) -> StoredTensor | None:
    for suffix, dtype, decode in _BY_SUFFIX:
        if name.endswith(suffix) and tensor.dtype == dtype:
            return decode(source, tensor, name)
    if name in source.bitsandbytes:
        return decode_bitsandbytes(source, tensor, name)
    if tensor.dtype in FLOAT8 or tensor.dtype == torch.int8:
        return decode_scaled(source, tensor, name)
    return None


def _checked(source: Source, tensor: StoredTensor) -> StoredTensor:
    """Return a decoded tensor; raise UnclearError if its parts cannot be read in whole groups."""
    try:
        for part in tensor.parts:
            side = (part, tensor.stored_dtype, tensor.decoder)
            next(split_groups((part.starts, part.sizes), [side]), None)
    except CheckpointError:
        raise UnclearError("groups of codes that are too far from each other") from None
    if source.tensors.setdefault(tensor.weight_name or tensor.name, tensor).name != tensor.name:
        return tensor._replace(weight_name="")  # another tensor has it
    return tensor


def _as_codes(tensor: StoredTensor, reason: str) -> StoredTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return tensor._replace(group="other", label=f"{dtype} codes: {reason}", is_codes=True)


def _label_float8(
    source: Source, tensors: list[StoredTensor], resolved: dict[str, StoredTensor]
) -> None:
    """Decide whether float8 tensors without a scale hold values or codes.

    Many checkpoints are cast to float8 without a scale; their elements are the values. Codes fill
    the range of the dtype. Without any scale in the checkpoint, elements are therefore values if
    all tensors stay below an eighth of the largest float8 number (56 for float8_e4m3fn): weights of
    a model that works are smaller.
    """
    plain = [
        t
        for t in tensors
        if t.dtype in FLOAT8 and t.name not in resolved and t.name not in source.used
    ]
    has_scales = any(t.decoder is not None or t.is_codes for t in resolved.values())
    marked = any(name.rpartition(".")[2] == "scaled_fp8" for name in source.tensors)
    are_codes = has_scales or marked or any(_fills_range(source, t) for t in plain)
    for tensor in plain:
        if are_codes:
            resolved[tensor.name] = _as_codes(tensor, "no scale found")
        else:
            resolved[tensor.name] = tensor._replace(label="float8 values; no scale found")


def _fills_range(source: Source, tensor: StoredTensor) -> bool:
    """Return whether one of the first elements is above an eighth of the dtype's maximum."""
    for part in tensor.parts[:1]:
        sizes, strides = part.sizes[-1:], part.strides[-1:]
        if is_dense(part.sizes, part.strides):
            sizes, strides = (math.prod(part.sizes),), (1,)
        sizes = tuple(min(n, _SAMPLE) for n in sizes)
        sample = Part(part.path, part.offset, sizes, strides, (0,) * len(sizes))
        first = StoredTensor(tensor.name, sizes, tensor.dtype, (sample,))
        try:
            values = source.companions.read(first).to(torch.float32)
        except UnclearError:  # elements that are far from each other
            return True
        return bool((values.abs() > torch.finfo(tensor.dtype).max / 8).any())
    return False
