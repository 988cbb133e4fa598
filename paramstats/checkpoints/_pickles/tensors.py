"""Find the tensors that calls in pickles stand for.

The named functions are defined in torch/_utils.py and torch/_tensor.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from paramstats._core.format import dtype_name
from paramstats.checkpoints._errors import PickleError
from paramstats.checkpoints._notes import shorten
from paramstats.checkpoints._pickles.arrays import array
from paramstats.checkpoints._pickles.dtypes import DTYPES
from paramstats.checkpoints._pickles.machine import Global, RecordedCall
from paramstats.checkpoints._pickles.sizes import MAX_DIMENSIONS, are_sizes, check_size
from paramstats.checkpoints._pickles.storages import Storage, Storages
from paramstats.checkpoints._pickles.stored_bytes import Source
from paramstats.checkpoints._stored_tensors import Part, StoredTensor, contiguous_part, span

_MAX_ARGUMENTS = 8
"""Arguments of a call that can tell the shape of a tensor that is not dense."""

_SLOT = 8
MAX_REPEATS = 16
"""A view with more than this many times the stored elements is an expanded tensor and is not read:
a file of a few bytes could ask for more elements than can ever be read."""

SMALL_BYTES = 1 << 27
"""Views of up to this many bytes in a file are read even if they repeat elements."""

_DENSE = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
_PARAMETERS = {f"torch._utils._rebuild_parameter{suffix}" for suffix in ("", "_with_state")}
_OF_TYPE = {f"torch._tensor._rebuild_from_type{suffix}" for suffix in ("", "_v2")}
_WRAPPER = "torch._utils._rebuild_wrapper_subclass"
HAVE_ATTRIBUTES = {"torch._utils._rebuild_parameter_with_state", *_OF_TYPE}
"""Functions whose fourth argument has the attributes of a tensor."""

_UNREAD = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has no elements",
    _WRAPPER: "a tensor subclass",
}
"""Tensors whose elements are not stored as a plain array, by the function that rebuilds them. They
are listed but not read."""

_CONVERTED = {
    f"torch._utils._rebuild_{name}"
    for name in ("device_tensor_from_numpy", "device_tensor_from_cpu_tensor", "xla_tensor")
}
"""Functions that move a tensor or an array to a device: (data, dtype, device, requires_grad)."""

_PLAIN_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}


class Inside(NamedTuple):
    """Values inside a tensor subclass, which are listed in its place."""

    children: tuple[tuple[str | None, Any], ...]
    """Words for their names (None: the name of the tensor), and values."""
    label: str = ""


class Tensors:
    """Find tensors in the values of one source."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._storages = Storages(source)

    def find(self, name: str, value: Any) -> StoredTensor | Inside | None:
        """Return the tensor that a value stands for, or what is inside of it; None for others.

        Raises PickleError if it is damaged.
        """
        storage = self._storages.find(value)
        if storage is not None:
            return self._whole_storage(name, storage)
        if not isinstance(value, RecordedCall):
            return None
        function, args = value.function, value.args
        if function in _PARAMETERS and len(args) > 1:
            tensor = self._plain_tensor(name, args[0])
            if tensor is not None:
                return tensor._replace(requires_grad=args[1] is True)
            return Inside(((None, args[0]),))
        if function in _CONVERTED and len(args) == 4:
            return self._converted(name, *args)
        if function in _OF_TYPE and len(args) > 3 and all(isinstance(a, Global) for a in args[:2]):
            return self._of_type(name, *args[:4])
        return self._plain_tensor(name, value)

    def _plain_tensor(self, name: str, call: Any) -> StoredTensor | None:
        """Return the tensor that a call makes without the help of another such function."""
        if not isinstance(call, RecordedCall):
            return None
        if call.function in _DENSE:
            return self._dense_tensor(name, call)
        if call.function in _UNREAD:
            return _unread(StoredTensor(name, *_guess_shape(call.args), ()), _UNREAD[call.function])
        return array(name, call, self._source)

    def _converted(
        self, name: str, data: Any, dtype: Any, device: Any, requires_grad: Any
    ) -> StoredTensor | Inside:
        """Return a tensor that was saved as a tensor or an array of another device or dtype."""
        tensor = self._plain_tensor(name, data)
        if tensor is None:
            return Inside(((None, data),))
        kind = DTYPES.get(dtype.name) if isinstance(dtype, Global) else None
        label = "" if kind in (None, tensor.dtype) else f"{dtype_name(kind)} in a wider dtype"
        return tensor._replace(requires_grad=requires_grad is True, label=label)

    def _of_type(
        self, name: str, function: Global, kind: Global, args: Any, state: Any
    ) -> StoredTensor | Inside | None:
        """Return a tensor of a subclass, or a plain one with attributes."""
        if type(args) is not tuple:
            return None
        if function.name != _WRAPPER:
            is_parameter = function.name in _PARAMETERS
            make = self.find if is_parameter else self._plain_tensor
            tensor = make(name, RecordedCall(function.name, args))
            if not isinstance(tensor, StoredTensor) or kind.name in _PLAIN_TYPES:
                return tensor
            return tensor._replace(label=f"subclass {_class_name(kind)}")
        sizes, dtype = _guess_shape(args)
        attributes = _attributes(state)
        self._source.files.budget.charge(_SLOT * sum(map(len, attributes)))
        local, spec = _find(attributes, "_local_tensor"), _find(attributes, "_spec")
        if kind.name.endswith(".DTensor") and local is not None:
            return Inside(((None, local),), _dtensor_label(spec, sizes, local))
        if kind.name.endswith(".ShardedTensor") and type(state) is tuple and state:
            shards = state[0] if type(state[0]) is list else []
            self._source.files.budget.charge(_SLOT * len(shards))
            return _local_shards(shards, sizes)
        inner = [(str(k), x) for of in attributes for k, x in of.items() if _may_be_tensor(x)]
        if inner:
            return Inside(tuple(inner), f"inside subclass {_class_name(kind)} {list(sizes)}")
        reason = f"a tensor of subclass {shorten(kind.name)}, which holds no tensor"
        return _unread(StoredTensor(name, sizes, dtype, ()), reason)

    def _whole_storage(self, name: str, storage: Storage) -> StoredTensor:
        """Return a storage that was saved as such, as a tensor of one dimension."""
        if not are_sizes((storage.numel, storage.first)):
            raise PickleError("a storage with an invalid number of elements")
        tensor = StoredTensor(name, (storage.numel,), storage.dtype, (), label="a storage")
        if not storage.is_typed:
            return tensor._replace(unread_reason="a storage without a dtype", label="")
        if not storage.numel:
            return tensor
        part = contiguous_part("", 0, tensor.shape)
        return self._placed(tensor, storage, storage.first, part.strides)

    def _dense_tensor(self, name: str, call: RecordedCall) -> StoredTensor:
        """Return a strided tensor: (storage, offset, sizes, strides, requires_grad, hooks, ...)."""
        if not 4 <= len(call.args) <= 8:
            raise PickleError("a tensor without a storage")
        reference, offset, sizes, strides, *optional = call.args
        storage = self._storages.find(reference)
        if storage is None and isinstance(reference, RecordedCall):
            tensor = StoredTensor(name, *_guess_shape(call.args), ())
            return _unread(tensor, "a tensor with a storage of unknown type")
        if storage is None:
            raise PickleError("a tensor without a storage")
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
        is_conj = bool(flags.get("conj"))
        tensor = StoredTensor(name, sizes, dtype, (), requires_grad, is_conj=is_conj)
        if flags.get("neg"):
            return _unread(tensor, "a tensor whose sign is stored separately (torch's neg bit)")
        return self._placed(tensor, storage, offset + storage.first, strides)

    def _placed(
        self, tensor: StoredTensor, storage: Storage, first: int, strides: tuple[int, ...]
    ) -> StoredTensor:
        """Return a tensor with its place in a storage: index of the first element, and strides."""
        sizes, itemsize = tensor.shape, tensor.dtype.itemsize
        check_size(sizes)
        place = self._storages.place(storage)
        if place is None:
            raise PickleError(f"no storage {storage.key!r}, which {tensor.name!r} needs")
        nbytes = math.prod(sizes) * itemsize
        if nbytes > SMALL_BYTES and nbytes > MAX_REPEATS * place.nbytes:
            return tensor._replace(unread_reason="an expanded tensor, which repeats its elements")
        if (first + span(sizes, strides)) * itemsize > place.nbytes:
            raise PickleError(
                f"{place.nbytes} bytes in storage {storage.key!r}, too few for {tensor.name!r}"
            )
        starts = (0,) * len(sizes)
        part = Part(place.path, place.begin + first * itemsize, sizes, strides, starts)
        return tensor._replace(parts=(part,))


def _local_shards(shards: list[Any], sizes: tuple[int, ...]) -> Inside:
    """Return the shards of a ShardedTensor that this rank has."""
    tensors = [_find(_attributes(shard), "tensor") for shard in shards]
    children = tuple((None if len(tensors) == 1 else str(i), x) for i, x in enumerate(tensors))
    return Inside(children, f"this rank's shard of {list(sizes)}")


def _dtensor_label(spec: Any, sizes: tuple[int, ...], local: Any) -> str:
    """Return what a reader must know of the local tensor of a DTensor."""
    placements = _find(_attributes(spec), "placements")
    placements = placements[:MAX_DIMENSIONS] if type(placements) is tuple else ()
    kinds = [x.function.rpartition(".")[2] for x in placements if isinstance(x, RecordedCall)]
    if any("Partial" in kind for kind in kinds):
        return f"this rank's summand of {list(sizes)}"
    if isinstance(local, RecordedCall) and _guess_shape(local.args)[0] == sizes:
        return ""  # replicated, or of a single rank: the whole tensor
    return f"this rank's shard of {list(sizes)}"


def _attributes(value: Any) -> list[dict[Any, Any]]:
    """Return the attributes of an object, or those in a state: a dict, or one for slots too."""
    state = value.state if isinstance(value, RecordedCall) else value
    return [x for x in (state[:2] if type(state) is tuple else (state,)) if type(x) is dict]


def _find(attributes: list[dict[Any, Any]], name: str) -> Any:
    return next((some[name] for some in attributes if name in some), None)


def _may_be_tensor(value: Any) -> bool:
    names = ("torch._utils._rebuild_", "torch._tensor._rebuild_", "numpy.")
    return isinstance(value, RecordedCall) and value.function.startswith(names)


def _class_name(kind: Global) -> str:
    return shorten(kind.name.rpartition(".")[2])


def _unread(tensor: StoredTensor, reason: str) -> StoredTensor:
    check_size(tensor.shape)
    remedy = "load it and pass it to paramstats.summarize"
    return tensor._replace(unread_reason=f"{reason}; {remedy}")


def _guess_shape(args: tuple[Any, ...]) -> tuple[tuple[int, ...], torch.dtype]:
    """Return the shape and dtype of a tensor, as far as the arguments of a call tell."""
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
