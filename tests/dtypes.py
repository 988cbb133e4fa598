"""The element types that the native kernels read."""

from __future__ import annotations

import torch

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FLOATS += [torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32]
INTEGERS += [torch.int64, torch.uint64, torch.bool]
DTYPES = FLOATS + INTEGERS
