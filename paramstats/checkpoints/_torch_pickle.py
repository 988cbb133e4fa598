"""Find the tensors in the pickle of a torch.save file.

`_pickles.load` executes none of the pickle's calls. It returns their names and arguments
(`RecordedCall`), from which this module derives what tensors they would have made. The named
functions are defined in torch/_utils.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from paramstats.checkpoints._budget import Budget
from paramstats.checkpoints._errors import PickleError
from paramstats.checkpoints._pickles import Global, Key, RecordedCall
from paramstats.checkpoints._stored_tensors import Part, StoredTensor, span

_MAX_DEPTH = 1000
_MAX_NAME_LENGTH = 100_000
_MAX_WORD_LENGTH = 1000

_SLOT = 8
_TENSOR = 1000
"""Bytes of memory that a tensor needs until its statistics are returned."""

_NAME = 150
"""Bytes of memory of a name of a tensor or container, beyond those of the text."""

_MAX_DIMENSIONS = 64
"""torch's own limit."""

_MAX_SIZE = 1 << 62
_MAX_ARGUMENTS = 8
"""Arguments of a call that can tell the shape of a tensor that is not dense."""


_MAX_REPEATS = 16
"""A view with more than this many times the stored elements is an expanded tensor and is not read:
a file of a few bytes could ask for more elements than can ever be read."""

_SMALL_BYTES = 1 << 27
"""Views of up to this many bytes in a file are read even if they repeat elements."""

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
DTYPES = {
    **{f"torch.{name}": value for name, value in vars(torch).items() if type(value) is torch.dtype},
    **_STORAGES,
    **{name.replace("torch.", "torch.cuda.", 1): dtype for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
}
"""dtypes by the names of dtypes and of storage classes in pickles."""

_DENSE = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
_PARAMETERS = {f"torch._utils._rebuild_parameter{suffix}" for suffix in ("", "_with_state")}
_UNREAD = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has no elements",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor stored as a numpy array",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a custom device",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
    "torch._tensor._rebuild_from_type_v2": "a tensor subclass",
}
"""Tensors whose elements are not stored as a plain array, by the function that rebuilds them. They
are listed but not read."""

_PLAIN = {
    *("collections.OrderedDict", "collections.defaultdict", "collections.Counter"),
    *("torch.Size", "torch.device", "torch.serialization._get_layout", "_codecs.encode"),
    *("torch.Tensor", "torch.nn.parameter.Parameter", "argparse.Namespace"),
    *(f"torch.per_{scheme}" for scheme in ("tensor_affine", "channel_affine", "tensor_symmetric")),
    *(f"torch.per_channel_{scheme}" for scheme in ("symmetric", "affine_float_qparams")),
    *(f"{module}.PosixPath" for module in ("pathlib", "pathlib._local")),
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
    *("numpy.dtype", "numpy.ndarray"),
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "complex", "bytearray", "list", "dict", "int", "float")
    ),
}
ALLOWED = frozenset({*DTYPES, *_DENSE, *_PARAMETERS, *_UNREAD, *_PLAIN})
"""The names that the pickle of a checkpoint may contain. None of them is ever called."""


class Storage(NamedTuple):
    """A reference to a storage of the file."""

    key: str
    dtype: torch.dtype
    first: int
    """Index of its first element in the stored one: old files have storages that are views."""


Places = dict[str, tuple[int, int]]
"""Position in the file and size of every storage, in bytes, by its key."""


def read_storage(reference: Any) -> Storage:
    """Convert a persistent id, which is ("storage", class, key, device, elements[, view])."""
    if not isinstance(reference, tuple) or len(reference) not in (5, 6):
        raise PickleError("a reference to something other than a storage")
    tag, kind, key, _, _, *view = reference
    if tag != "storage" or not isinstance(kind, Global) or not isinstance(key, str):
        raise PickleError("a reference to something other than a storage")
    dtype = DTYPES.get(kind.name)
    if dtype is None:
        raise PickleError(f"a storage of unknown type {kind.name!r}")
    first = view[0][1] if view and view[0] is not None else 0
    return Storage(key, dtype, first)


def list_tensors(value: Any, places: Places, path: str, budget: Budget) -> list[StoredTensor]:
    """Return the tensors in a value that was saved, under dotted names.

    Tensors with the same elements become one entry with aliases.
    """
    left = _MAX_REPEATS * sum(size for _, size in places.values()) + _SMALL_BYTES
    tensors: dict[str, StoredTensor] = {}
    names: dict[str, list[str]] = {}
    for name, call in _find_calls(value, budget):
        tensor = _tensor(name, call, places, path)
        if tensor is not None:
            has_elements = math.prod(tensor.shape) and tensor.parts
            # The repr, because a file can hold many tensors whose sizes have one hash.
            key = repr((tensor.parts, tensor.dtype, tensor.is_conj)) if has_elements else name
            if key not in tensors:
                budget.charge(_TENSOR)
                left -= math.prod(tensor.shape) * tensor.dtype.itemsize if tensor.parts else 0
                if left < 0:
                    raise PickleError(
                        f"tensors that repeat elements more than {_MAX_REPEATS} times"
                    )
                tensors[key] = tensor
            names.setdefault(key, []).append(name)
    all_names = [name for group in names.values() for name in group]
    if len(set(all_names)) < len(all_names):
        raise PickleError("two tensors with the same name")
    return [tensor._replace(aliases=tuple(names[key][1:])) for key, tensor in tensors.items()]


def _find_calls(value: Any, budget: Budget) -> Iterator[tuple[str, RecordedCall]]:
    """Yield the calls in nested dicts, lists and tuples, in order, with their dotted names."""
    stack: list[tuple[str, int, Any]] = [("", 0, value)]
    while stack:
        name, depth, value = stack.pop()
        if isinstance(value, RecordedCall):
            yield name or "tensor", value
            continue
        if not isinstance(value, (dict, list, tuple)):
            continue
        if depth > _MAX_DEPTH or len(name) > _MAX_NAME_LENGTH:
            raise PickleError("lists in lists without end")
        budget.charge(_SLOT * len(value))
        nested = []
        for i, (key, item) in enumerate(value.items() if type(value) is dict else enumerate(value)):
            if isinstance(item, RecordedCall) or (item and isinstance(item, (dict, list, tuple))):
                word = _word(key, i)
                inner = f"{name}.{word}" if name else word
                budget.charge(_NAME + sys.getsizeof(inner))
                nested.append((inner, depth + 1, item))
        stack += reversed(nested)


def _word(key: Any, position: int) -> str:
    """Return the word in a tensor's name for a key of a dict or a list, or for its position."""
    value = key.value if isinstance(key, Key) else key
    if isinstance(value, Global):
        return value.name
    if isinstance(value, str):
        return value
    items = value if type(value) is tuple else (value,)
    is_short = len(items) <= _MAX_DIMENSIONS and all(_is_word(item) for item in items)
    return str(value if is_short else position)


def _is_word(value: Any) -> bool:
    """Return whether the repr of a value needs little memory and time."""
    if isinstance(value, int):
        return abs(value) < _MAX_SIZE
    if isinstance(value, (str, bytes)):
        return len(value) <= _MAX_WORD_LENGTH
    return value is None or isinstance(value, float)


def _tensor(name: str, call: RecordedCall, places: Places, path: str) -> StoredTensor | None:
    """Return the tensor that a call would have made, or None for any other object."""
    if call.function in _PARAMETERS:
        data = call.args[0] if call.args else None
        if not isinstance(data, RecordedCall) or data.function in _PARAMETERS:
            return None
        tensor = _tensor(name, data, places, path)
        return tensor and tensor._replace(requires_grad=call.args[1] is True)
    if call.function == "torch._tensor._rebuild_from_type_v2" and len(call.args) > 2:
        function, kind, args = call.args[:3]
        if kind.name in _PLAIN and function.name in _DENSE:  # a plain tensor with attributes
            return _dense_tensor(name, RecordedCall(function.name, args), places, path)
    if call.function in _UNREAD:
        sizes, dtype = _guess_shape(call.args)
        return _unread(StoredTensor(name, sizes, dtype, ()), _UNREAD[call.function])
    if call.function in _DENSE:
        return _dense_tensor(name, call, places, path)
    return None


def _dense_tensor(name: str, call: RecordedCall, places: Places, path: str) -> StoredTensor:
    """Return a strided tensor: (storage, offset, sizes, strides, requires_grad, hooks, ...)."""
    if not 4 <= len(call.args) <= 8 or not isinstance(call.args[0], Storage):
        raise PickleError("a tensor without a storage")
    storage, offset, sizes, strides, *optional = call.args
    dtype = storage.dtype
    rest = optional[2:]
    if call.function.endswith("_v3"):
        kind = rest.pop(0) if rest else None
        if not isinstance(kind, Global) or kind.name not in DTYPES:
            raise PickleError("a tensor of unknown dtype")
        dtype = DTYPES[kind.name]
    is_valid = are_sizes(sizes) and are_sizes(strides) and are_sizes((offset, storage.first))
    if not is_valid or len(sizes) != len(strides):
        raise PickleError("a tensor with invalid sizes or strides")
    requires_grad = bool(optional) and optional[0] is True
    flags = rest[0] if rest and isinstance(rest[0], dict) else {}
    tensor = StoredTensor(name, sizes, dtype, (), requires_grad, is_conj=bool(flags.get("conj")))
    if flags.get("neg"):
        return _unread(tensor, "a tensor whose sign is stored separately (torch's neg bit)")
    check_size(sizes)
    if storage.key not in places:
        raise PickleError(f"no storage {storage.key!r}, which {name!r} needs")
    begin, size = places[storage.key]
    numel = math.prod(sizes)
    nbytes = numel * dtype.itemsize
    if nbytes > _SMALL_BYTES and nbytes > _MAX_REPEATS * size:
        return tensor._replace(unread_reason="an expanded tensor, which repeats its elements")
    first = (offset + storage.first) * dtype.itemsize
    if first + span(sizes, strides) * dtype.itemsize > size:
        raise PickleError(f"{size} bytes in storage {storage.key!r}, too few for {name!r}")
    part = Part(path, begin + first, sizes, strides, (0,) * len(sizes))
    return tensor._replace(parts=(part,))


def _unread(tensor: StoredTensor, reason: str) -> StoredTensor:
    check_size(tensor.shape)
    remedy = "load it and pass it to paramstats.summarize"
    return tensor._replace(unread_reason=f"{reason}; {remedy}")


def are_sizes(values: Any) -> bool:
    """Return whether values from a pickle can be the sizes, strides or offsets of a tensor."""
    if type(values) is not tuple or len(values) > _MAX_DIMENSIONS:
        return False
    return all(type(n) is int and 0 <= n < _MAX_SIZE for n in values)


def check_size(sizes: tuple[int, ...]) -> None:
    """Raise PickleError if a tensor of these sizes cannot exist."""
    if math.prod(sizes) >= _MAX_SIZE:
        raise PickleError("a tensor with more elements than can be counted")


def _guess_shape(args: tuple[Any, ...]) -> tuple[tuple[int, ...], torch.dtype]:
    """Return the shape and dtype of a tensor that is not dense, as far as its arguments tell."""
    sizes: tuple[int, ...] = (0,)
    dtype = torch.float32
    args = args[:_MAX_ARGUMENTS]
    nested = [a for arg in args if type(arg) is tuple for a in arg[:_MAX_ARGUMENTS]]
    for arg in (*reversed(args), *reversed(nested)):
        if are_sizes(arg):
            sizes = arg
    for arg in (*args, *nested):
        if isinstance(arg, Global) and arg.name in DTYPES:
            dtype = DTYPES[arg.name]
        elif isinstance(arg, Storage):
            dtype = arg.dtype
        elif isinstance(arg, RecordedCall) and arg.function in _DENSE and arg.args:
            dtype = getattr(arg.args[0], "dtype", dtype)  # no recursion: nesting may be endless
    return sizes, dtype
