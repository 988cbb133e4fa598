"""The tensors that a `torch.save` pickle speaks of, from what its calls would have made.

`pickles.load` makes none of these calls: it hands over their names and arguments (`Made`), and here
is what they mean. torch/_utils.py has the functions that are named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from paramstats.checkpoints._pickles import Global, Made, PickleError
from paramstats.checkpoints._stored import Part, Stored, span

_MOST_VISITS = 1_000_000
"""Containers and tensors in one file: lists within lists can refer to each other without end."""

_DEEPEST = 1000
_LONGEST_NAME = 100_000

_MOST_DIMENSIONS = 64
"""As torch's own limit."""

_REPEATS = 16
"""A view of so many times the elements that are stored is an expanded one, and not read: a file of
a few bytes can ask for more than can ever be read. Small ones, of up to _FEW elements, are."""

_FEW = 1 << 24

_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.QInt8Storage": torch.qint8,
    "torch.QInt32Storage": torch.qint32,
    "torch.QUInt8Storage": torch.quint8,
    "torch.QUInt4x2Storage": torch.quint4x2,
    "torch.QUInt2x4Storage": torch.quint2x4,
    "torch.storage.UntypedStorage": torch.uint8,
}
DTYPES = {
    **{f"torch.{name}": value for name, value in vars(torch).items() if type(value) is torch.dtype},
    **_STORAGES,
    **{name.replace("torch.", "torch.cuda.", 1): dtype for name, dtype in _STORAGES.items()},
}
"""By the names that pickles call them: types of elements, and of the storages that hold them."""

_DENSE = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
_PARAMETERS = {f"torch._utils._rebuild_parameter{suffix}" for suffix in ("", "_with_state")}
_OTHERS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has no elements",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor kept as a numpy array",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a foreign device",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
    "torch._tensor._rebuild_from_type_v2": "a tensor subclass",
}
"""What has no elements of its own in the file as they are: listed and not read."""

_PLAIN = {
    *("collections.OrderedDict", "collections.defaultdict", "collections.Counter"),
    *("torch.Size", "torch.device", "torch.serialization._get_layout", "_codecs.encode"),
    *("torch.Tensor", "torch.nn.parameter.Parameter", "argparse.Namespace"),
    *(f"torch.per_{what}" for what in ("tensor_affine", "channel_affine", "tensor_symmetric")),
    *(f"torch.per_channel_{what}" for what in ("symmetric", "affine_float_qparams")),
    *(f"{module}.PosixPath" for module in ("pathlib", "pathlib._local")),
    *(f"numpy.{core}.multiarray.{f}" for core in ("core", "_core") for f in ("scalar",)),
    *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
    *("numpy.dtype", "numpy.ndarray"),
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "complex", "bytearray", "list", "dict", "int", "float")
    ),
}
ALLOWED = frozenset({*DTYPES, *_DENSE, *_PARAMETERS, *_OTHERS, *_PLAIN})
"""All that a checkpoint's pickle may name. None of it is called, whatever the pickle says."""


class Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    first: int
    """Elements of the stored one before it: an old storage may be a view of another."""


class _Tensor(NamedTuple):
    storage: Storage
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    unread: str | None = None
    conj: bool = False


Places = dict[str, tuple[int, int]]
"""Of storages by key: where they begin, and their bytes."""


def storage(reference: Any) -> Storage:
    """What a persistent id stands for: ("storage", type, key, device, elements[, view])."""
    if not isinstance(reference, tuple) or len(reference) not in (5, 6):
        raise PickleError("a reference to something other than a storage")
    word, kind, key, _, _, *view = reference
    if word != "storage" or not isinstance(kind, Global) or not isinstance(key, str):
        raise PickleError("a reference to something other than a storage")
    dtype = DTYPES.get(kind.name)
    if dtype is None:
        raise PickleError(f"a storage of unknown type {kind.name!r}")
    first = view[0][1] if view and view[0] is not None else 0
    return Storage(key, dtype, first)


def listed(value: Any, places: Places, path: str) -> list[Stored]:
    """The tensors in what was saved, under dotted names; those that are one and the same, once."""
    rows: dict[Any, Stored] = {}
    names: dict[Any, list[str]] = {}
    for name, tensor in _tensors(value):
        stored = _stored(name, tensor, places, path)
        key = (
            (stored.parts, stored.dtype, stored.conj)
            if math.prod(stored.shape) and stored.parts
            else name
        )
        rows.setdefault(key, stored)
        names.setdefault(key, []).append(name)
    every = [name for several in names.values() for name in several]
    if len(set(every)) < len(every):
        raise PickleError("two tensors of one name")
    return [row._replace(aliases=tuple(names[key][1:])) for key, row in rows.items()]


def _tensors(value: Any) -> Iterator[tuple[str, _Tensor]]:
    """What is a tensor in nested dicts, lists and tuples, in their order."""
    waiting: list[tuple[str, Any]] = [("", value)]
    for _ in range(_MOST_VISITS):
        if not waiting:
            return
        name, value = waiting.pop()
        inner: list[tuple[Any, Any]] = []
        if isinstance(value, dict):
            inner = list(value.items())
        elif isinstance(value, (list, tuple)):
            inner = list(enumerate(value))
        elif isinstance(value, Made):
            tensor = _tensor(value)
            if tensor is not None:
                yield name or "tensor", tensor
        for key, v in reversed(inner):
            if isinstance(v, (dict, list, tuple, Made)):
                waiting.append((f"{name}.{key}" if name else str(key), v))
        if name.count(".") > _DEEPEST or len(name) > _LONGEST_NAME:
            break
    raise PickleError("lists within lists without end")


def _tensor(made: Made) -> _Tensor | None:
    """The tensor that would have been made; None of anything else."""
    if made.kind in _PARAMETERS:
        data = made.args[0] if made.args else None
        if not isinstance(data, Made) or data.kind in _PARAMETERS:
            return None
        tensor = _tensor(data)
        return tensor and tensor._replace(requires_grad=made.args[1] is True)
    if made.kind == "torch._tensor._rebuild_from_type_v2" and len(made.args) > 2:
        function, kind, args = made.args[:3]
        if kind.name in _PLAIN and function.name in _DENSE:
            return _tensor(Made(function.name, args))  # plain, with attributes of its own
    if made.kind in _OTHERS:
        sizes, dtype = _looks(made.args)
        return _Tensor(Storage("", dtype, 0), 0, sizes, (), dtype, False, _OTHERS[made.kind])
    if made.kind not in _DENSE:
        return None
    storage, offset, sizes, strides, *more = made.args
    if not isinstance(storage, Storage) or len(more) > 4:
        raise PickleError("a tensor without a storage")
    dtype = storage.dtype
    rest = more[2:]
    if made.kind.endswith("_v3"):
        kind = rest.pop(0) if rest else None
        if not isinstance(kind, Global) or kind.name not in DTYPES:
            raise PickleError("a tensor of unknown type")
        dtype = DTYPES[kind.name]
    numbers = (offset, storage.first, *sizes, *strides)
    if len(sizes) != len(strides) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise PickleError("a tensor of sizes and strides that are none")
    unread = None
    flags = rest[0] if rest and isinstance(rest[0], dict) else {}
    if flags.get("neg"):
        unread = "a tensor with its sign kept apart (torch's negative bit)"
    requires_grad = bool(more) and more[0] is True
    sizes, strides, conj = tuple(sizes), tuple(strides), bool(flags.get("conj"))
    return _Tensor(storage, offset, sizes, strides, dtype, requires_grad, unread, conj)


def _looks(args: tuple[Any, ...]) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and type of a tensor that is not dense, as far as what it is made of says."""
    sizes: tuple[int, ...] = (0,)
    dtype = torch.float32
    flat = [a for arg in args for a in (arg if type(arg) is tuple else ()) if type(a) is not int]
    for arg in (*reversed(args), *reversed(flat)):
        if type(arg) is tuple and all(type(n) is int and n >= 0 for n in arg):
            sizes = arg
    for arg in (*args, *flat):
        if isinstance(arg, Global) and arg.name in DTYPES:
            dtype = DTYPES[arg.name]
        elif isinstance(arg, Storage):
            dtype = arg.dtype
        elif isinstance(arg, Made) and arg.kind in _DENSE and arg.args:
            dtype = getattr(arg.args[0], "dtype", dtype)  # no deeper: such can be nested for ever
    return sizes, dtype


def _stored(name: str, tensor: _Tensor, places: Places, path: str) -> Stored:
    if len(tensor.sizes) > _MOST_DIMENSIONS or math.prod(tensor.sizes) >= 1 << 62:
        raise PickleError("a tensor of more elements than can be counted")
    if tensor.unread:
        reason = f"{tensor.unread}; load it and pass it to paramstats.summarize"
        return Stored(name, tensor.sizes, tensor.dtype, (), tensor.requires_grad, reason)
    place = places.get(tensor.storage.key)
    if place is None:
        raise PickleError(f"no storage {tensor.storage.key!r}, which {name!r} needs")
    begin, size = place
    itemsize = tensor.dtype.itemsize
    first = (tensor.offset + tensor.storage.first) * itemsize
    numel = math.prod(tensor.sizes)
    if numel > _FEW and numel * itemsize > _REPEATS * size:
        reason = "an expanded tensor, which repeats its elements"
        return Stored(name, tensor.sizes, tensor.dtype, (), tensor.requires_grad, reason)
    if first + span(tensor.sizes, tensor.strides) * itemsize > size:
        raise PickleError(f"{size} bytes in storage {tensor.storage.key!r}, too few for {name!r}")
    starts = (0,) * len(tensor.sizes)
    part = Part(path, begin + first, tensor.sizes, tensor.strides, starts)
    row = Stored(name, tensor.sizes, tensor.dtype, (part,), tensor.requires_grad)
    return row._replace(conj=tensor.conj)
