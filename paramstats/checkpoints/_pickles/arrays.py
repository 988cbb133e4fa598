"""Find the tensors that numpy arrays in pickles stand for."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from paramstats.checkpoints._errors import PickleError
from paramstats.checkpoints._pickles.dtypes import NUMPY_DTYPES
from paramstats.checkpoints._pickles.machine import Global, RecordedCall
from paramstats.checkpoints._pickles.sizes import are_sizes, check_size
from paramstats.checkpoints._pickles.stored_bytes import Place, Source
from paramstats.checkpoints._stored_tensors import Part, StoredTensor, contiguous_part

_MODULES = ("numpy.core", "numpy._core")
_MASKED = "numpy.ma.core._mareconstruct"
_RECONSTRUCT = (*(f"{module}.multiarray._reconstruct" for module in _MODULES), _MASKED)
_STATES = {4: slice(0, 4), 5: slice(1, 5), 7: slice(1, 5)}
"""Where shape, dtype, order and data are in a state, by its length."""

_FROM_BUFFER = tuple(f"{module}.numeric._frombuffer" for module in _MODULES)
_BYTE_ORDER = {"little": ("<", "|", "="), "big": (">", "|", "=")}[sys.byteorder]


def array(name: str, call: RecordedCall, source: Source) -> StoredTensor | None:
    """Return the tensor that an array stands for; None if the call makes no array.

    Raises PickleError if the array has too few elements.
    """
    if call.function in _FROM_BUFFER and len(call.args) == 4:
        data, dtype, shape, order = call.args
        is_fortran = order == "F"
    elif call.function in _RECONSTRUCT and type(call.state) is tuple and len(call.state) in _STATES:
        shape, dtype, is_fortran, data = call.state[_STATES[len(call.state)]]
    else:
        return None
    if not are_sizes(shape):
        raise PickleError("an array with an invalid shape")
    check_size(shape)
    code, order = _dtype(dtype)
    if code not in NUMPY_DTYPES or order not in _BYTE_ORDER:
        kind = {"O8": "objects", "O": "objects"}.get(code, f"dtype {code!r}")
        reason = (
            "a numpy array in the byte order of another machine"
            if code in NUMPY_DTYPES
            else f"a numpy array of {kind}, for which torch has no dtype"
        )
        return StoredTensor(name, shape, torch.uint8, (), unread_reason=reason)
    label = "all elements of a masked array" if call.function == _MASKED else ""
    tensor = StoredTensor(name, shape, NUMPY_DTYPES[code], (), label=label)
    nbytes = math.prod(shape) * tensor.dtype.itemsize
    place = source.place(data, nbytes) if nbytes else Place(source.path, 0, 0)
    if place is None:
        reason = "a numpy array whose bytes are stored in an unknown form"
        return tensor._replace(unread_reason=reason)
    return tensor._replace(parts=(_part(place.path, place.begin, shape, bool(is_fortran)),))


def _part(path: str, begin: int, shape: tuple[int, ...], is_fortran: bool) -> Part:
    if not is_fortran:
        return contiguous_part(path, begin, shape)
    part = contiguous_part(path, begin, shape[::-1])
    return part._replace(sizes=shape, strides=part.strides[::-1])


def _dtype(value: Any) -> tuple[str, str]:
    """Return numpy's code of a dtype, such as "f4", and its byte order."""
    if not isinstance(value, RecordedCall) or value.function != "numpy.dtype" or not value.args:
        return "unknown", ""
    kind = value.args[0]
    code = kind.name if isinstance(kind, Global) else kind[:20] if isinstance(kind, str) else ""
    order = value.state[1] if type(value.state) is tuple and len(value.state) > 1 else "="
    return code, order if isinstance(order, str) else ""
