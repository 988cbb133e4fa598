"""Map the names of dtypes and of storage classes in pickles to dtypes."""

from __future__ import annotations

import torch

_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16},
        **{"BFloat16": torch.bfloat16, "Bool": torch.bool, "Byte": torch.uint8},
        **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8},
        **{"ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64},
        **{"QInt8": torch.qint8, "QInt32": torch.qint32, "QUInt8": torch.quint8},
        **{"QUInt4x2": torch.quint4x2, "QUInt2x4": torch.quint2x4},
    }.items()
}
UNTYPED = "torch.storage.UntypedStorage"
DTYPES = {
    **{f"torch.{name}": value for name, value in vars(torch).items() if type(value) is torch.dtype},
    **_STORAGES,
    **{name.replace("torch.", "torch.cuda.", 1): dtype for name, dtype in _STORAGES.items()},
    UNTYPED: torch.uint8,
}
"""dtypes by the names of dtypes and of storage classes in pickles."""

NUMPY_DTYPES = {
    **{"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "b1": torch.bool},
    **{"i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64},
    **{"u1": torch.uint8, "u2": torch.uint16, "u4": torch.uint32, "u8": torch.uint64},
    **{"c8": torch.complex64, "c16": torch.complex128},
    **{
        f"ml_dtypes.{name}": getattr(torch, name)
        for name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2")
        if hasattr(torch, name)
    },
}
"""dtypes by numpy's codes for them, and by the names of extension types."""
