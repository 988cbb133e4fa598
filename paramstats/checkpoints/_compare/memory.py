"""List the tensors of a model or a mapping in memory like those of a file, without copying them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedIOBase
from typing import Any, cast

import torch

from paramstats._core import walk as python_walk
from paramstats._core.elements import check_storage, elements
from paramstats._core.layout import Layout
from paramstats._core.options import Pattern
from paramstats._core.shard import children, is_dtensor, is_zero_parameter
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._groups import assign_groups
from paramstats.checkpoints._selection import select_names
from paramstats.checkpoints._stored_tensors import Contents, Part, StoredTensor

Source = torch.nn.Module | Mapping[str, Any]
"""A model, or names and tensors; mappings may be nested, as in a checkpoint."""

_NO_GATHERING = "gather it first, e.g. with a full state dict; a comparison never communicates"


class _StorageFile:
    """The bytes of a storage; of one on a GPU, only those that are read are copied to the host."""

    def __init__(self, path: str, storage: torch.UntypedStorage) -> None:
        self.name = path
        self._data = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self._position = 0

    def seek(self, position: int) -> None:
        self._position = position

    def readinto(self, buffer: memoryview) -> int:
        """Copy bytes into a buffer and return their number."""
        data = self._data[self._position : self._position + len(buffer)]
        if len(data):
            torch.frombuffer(buffer, dtype=torch.uint8)[: len(data)].copy_(data)
        return len(data)

    def close(self) -> None:
        del self._data


def list_memory(
    files: Files,
    source: Source,
    include: Pattern | Iterable[Pattern] | None,
    exclude: Pattern | Iterable[Pattern] | None,
) -> Contents:
    """Return the tensors of a source whose names `include` and `exclude` let pass.

    These are a module's parameters and its persistent buffers, under their names without wrappers.
    Values of a mapping that are no tensors are left out, as those of a file. Tensors that cannot be
    read have an `unread_reason`.
    """
    left_out: set[int] = set()
    if isinstance(source, torch.nn.Module):
        layout, tensors = python_walk.walk(source, True, Layout.of)
        names, aliases = layout.names, layout.aliases
        left_out = _not_persistent(source)
    elif isinstance(source, Mapping):
        (names, aliases), tensors = python_walk.walk_named(_flat(source), None, (), _names)
    else:
        raise TypeError(
            f"paramstats.checkpoints.compare: expected a path, a module or a mapping of "
            f"tensors, got {type(source).__name__}"
        )
    rows = zip(names, aliases, tensors, strict=True)
    stored = [_stored(files, *row) for row in rows if id(row[2]) not in left_out]
    for device in {x.device for x in tensors if x.is_cuda}:  # streams that still write to them
        torch.cuda.current_stream(device).synchronize()
    contents = Contents(assign_groups(stored))
    return select_names(contents, include, exclude, type(source).__qualname__, stacklevel=3)


def _names(source: object, names: Any, aliases: Any, *others: object) -> tuple[Any, Any]:
    """Return what a layout is made of: a mapping keeps its names, those of wrappers included."""
    return names, aliases


def _not_persistent(module: torch.nn.Module) -> set[int]:
    """Return the ids of buffers that a state_dict leaves out."""
    found: set[int] = set()
    seen, remaining = {id(module)}, [module]
    while remaining:
        current = remaining.pop()
        names = getattr(current, "_non_persistent_buffers_set", ())
        found |= {id(current._buffers.get(name)) for name in names}
        new = [child for child in children(current) if id(child) not in seen]
        seen.update(map(id, new))
        remaining += new
    return found


def _flat(source: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors of nested mappings and lists, with dotted names."""
    names: set[str] = set()
    remaining: list[tuple[str, Any, tuple[int, ...]]] = [("", source, ())]
    while remaining:
        name, value, containers = remaining.pop()
        if isinstance(value, torch.Tensor):
            if name in names:
                raise ValueError(
                    f"paramstats.checkpoints.compare: expected every name once, got {name!r} twice"
                )
            names.add(name)
            yield name, value
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in containers:
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            inside = (*containers, id(value))
            named = [(f"{name}.{key}" if name else str(key), x, inside) for key, x in items]
            remaining += reversed(named)


def _stored(files: Files, name: str, aliases: tuple[str, ...], x: torch.Tensor) -> StoredTensor:
    stored = StoredTensor(name, (), x.dtype, (), x.requires_grad, aliases=aliases)
    try:
        stored = stored._replace(shape=tuple(int(size) for size in x.shape))
        return _readable(files, stored, x)
    except Exception as error:  # a subclass may raise anything
        return stored._replace(unread_reason=str(error).partition("\n")[0] or repr(error))


def _readable(files: Files, stored: StoredTensor, x: torch.Tensor) -> StoredTensor:
    """Return where the elements are; raise an error that says why they cannot be read."""
    if is_zero_parameter(x) or getattr(x, "_fsdp_flattened", False):
        raise TypeError(f"sharded by ZeRO-3 or FSDP; {_NO_GATHERING}")
    starts = (0,) * x.dim()
    if is_dtensor(x):
        x, starts = _local_part(x)
        if x.shape != stored.shape:
            label = f"this rank's {x.numel():,} of {math.prod(stored.shape):,} elements"
            stored = stored._replace(label=label)
    if x.is_meta:
        raise TypeError("a meta tensor has no elements")
    if x.layout is not torch.strided or x.is_quantized or x.is_nested:
        raise TypeError("only dense tensors are compared; pass x.to_dense() or x.dequantize()")
    if type(x).__torch_dispatch__ != torch.Tensor.__torch_dispatch__:
        raise TypeError(f"{type(x).__qualname__} hides its elements; pass plain tensors")
    is_conj = x.is_conj()
    x, _ = elements(x.detach().conj() if is_conj else x.detach())
    check_storage(x)
    storage = x.untyped_storage()
    path = f"memory:{storage.device}:{storage._cdata}"
    files.add_view(path, lambda: cast(BufferedIOBase, _StorageFile(path, storage)))
    offset = int(x.storage_offset()) * x.itemsize
    part = Part(path, offset, tuple(x.shape), x.stride(), starts)
    return stored._replace(dtype=x.dtype, parts=(part,), is_conj=is_conj)


def _local_part(x: Any) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return this rank's elements of a DTensor, and the index of the first in the whole tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not all(p.is_replicate() or p.is_shard() for p in x.placements):
        raise TypeError(f"a DTensor placed as {tuple(x.placements)}; {_NO_GATHERING}")
    sizes, starts = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    local: torch.Tensor = x._local_tensor
    if tuple(sizes) != tuple(local.shape):
        raise TypeError(f"a DTensor with local elements of {list(local.shape)}; {_NO_GATHERING}")
    return local, tuple(starts)
