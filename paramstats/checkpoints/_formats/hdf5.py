"""List the datasets of an HDF5 file, such as the weights of Keras.

h5py reads the structure of the file. The elements are read from their place in the file, as those
of all formats. So HDF5's filters, which can be plugins, are never used. Links are read, but never
followed to other files, and datasets whose elements are in other files are listed with the reason.
"""

from __future__ import annotations

import math
from typing import IO, Any

import torch

from paramstats._core.optional import import_optional
from paramstats.checkpoints._budget import Budget
from paramstats.checkpoints._errors import CheckpointError, listed, unexpected
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._formats.numpy_files import element_type
from paramstats.checkpoints._stored_tensors import (
    Contents,
    Part,
    StoredTensor,
    check_parts,
    contiguous_part,
)

_TENSOR, _PART, _LINK = 2000, 500, 200
"""Bytes of memory that a dataset, a chunk of it and a name need."""

_CHUNK_ENTRY = 24
"""Bytes of a file that list a chunk, at least."""


def read(file: IO[bytes], path: str, files: Files) -> Contents:
    """Return the datasets of a file. Their names have dots between groups."""
    try:
        h5py = import_optional("h5py", "reading an HDF5 file")
    except ImportError as error:
        remedy = "pip install h5py"
        raise unexpected("h5py, which reads HDF5 files", error, path, remedy) from None
    try:
        with h5py.File(file, "r") as opened:
            return _Reader(h5py, path, files.budget).read(opened.id)
    except (*(OSError, RuntimeError, ValueError, LookupError, TypeError), MemoryError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise unexpected("a complete HDF5 file", f"a damaged one ({error})", path) from None


class _Reader:
    """Lists the datasets of one file with the low-level functions of h5py, which open no other."""

    def __init__(self, h5py: Any, path: str, budget: Budget) -> None:
        self._h5py, self._path, self._budget = h5py, path, budget
        self._tensors: dict[int, StoredTensor] = {}
        """By the position in the file: a dataset can have several names."""
        self._links: list[str] = []
        self._elsewhere: list[str] = []

    def read(self, root: Any) -> Contents:
        """Return the datasets below a group, in the order of the file."""
        groups = [("", root)]
        seen = {self._h5py.h5o.get_info(root).addr}
        while groups:
            prefix, group = groups.pop()
            inner = []
            for link in group:
                self._budget.add(len(link) + 16)
                self._budget.charge(_LINK + len(prefix) + len(link))
                name = f"{prefix}{link.decode(errors='backslashreplace')}"
                if b"/" in link or group.links.get_info(link).type != self._h5py.h5l.TYPE_HARD:
                    self._links.append(name)
                    continue
                info = self._h5py.h5o.get_info(group, link)
                if info.type == self._h5py.h5o.TYPE_DATASET:
                    self._add(name, info.addr, group, link)
                elif info.type == self._h5py.h5o.TYPE_GROUP and info.addr not in seen:
                    seen.add(info.addr)
                    inner.append((f"{name}.", self._h5py.h5g.open(group, link)))
            groups += reversed(inner)
        notes = []
        if self._links:
            notes.append(f"not read: {listed(self._links)} (links, which are not followed)")
        if self._elsewhere:
            notes.append(f"not read: {listed(self._elsewhere)} (made of other datasets or files)")
        return Contents(list(self._tensors.values()), tuple(notes))

    def _add(self, name: str, address: int, group: Any, link: bytes) -> None:
        if (tensor := self._tensors.get(address)) is not None:
            self._tensors[address] = tensor._replace(aliases=(*tensor.aliases, name))
            return
        self._budget.charge(_TENSOR)
        dataset = self._h5py.h5d.open(group, link)
        properties = dataset.get_create_plist()
        if properties.get_layout() == self._h5py.h5d.VIRTUAL or properties.get_external_count():
            self._elsewhere.append(name)  # even its shape can depend on another file
            return
        shape = tuple(dataset.shape or ())
        if math.prod(shape) >> 62:
            raise unexpected(
                f"a shape of {name!r}", "more elements than can be counted", self._path
            )
        dtype, reason = self._element_type(dataset)
        parts: tuple[Part, ...] = ()
        if reason is None:
            parts, reason = self._parts(dataset, properties, shape, dtype)
        first = name.partition(".")[0]
        is_optimizer = first in ("optimizer", "optimizer_weights")  # names that Keras gives
        tensor = StoredTensor(
            *(name, shape, dtype, parts),
            unread_reason=reason,
            group="optimizer" if is_optimizer else "model",
        )
        if parts:
            check_parts(tensor, self._path)
        self._tensors[address] = tensor

    def _element_type(self, dataset: Any) -> tuple[torch.dtype, str | None]:
        """Return the dtype of a dataset, and why its elements cannot be read."""
        stored = dataset.get_type()
        try:
            dtype = dataset.dtype
            is_exact = stored.equal(self._h5py.h5t.py_create(dtype, logical=True))
        except (TypeError, ValueError):
            return torch.bits8, "elements of a type that numpy does not have"
        if dtype.kind not in "biufc" or dtype.subdtype is not None:
            return torch.bits8, "elements that are not numbers"
        if not is_exact:
            return torch.bits8, "numbers in a format that numpy does not have"
        return element_type(dtype.str)

    def _parts(
        self, dataset: Any, properties: Any, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[tuple[Part, ...], str | None]:
        """Return where the elements are in the file, or why they cannot be read."""
        if 0 in shape or dataset.shape is None:
            return (), None if 0 in shape else "no elements (a null dataset)"
        layout = properties.get_layout()
        if properties.get_nfilters():
            return (), "compressed elements; write the file again without compression"
        if layout == self._h5py.h5d.CHUNKED:
            return self._chunks(dataset, properties.get_chunk(), shape, dtype)
        offset = dataset.get_offset() if layout == self._h5py.h5d.CONTIGUOUS else None
        if offset is None:
            return (), "no place in the file for its elements"
        if dataset.get_storage_size() != math.prod(shape) * dtype.itemsize:
            got = f"{dataset.get_storage_size():,} bytes"
            raise unexpected(f"the elements of {list(shape)}", got, self._path)
        return (contiguous_part(self._path, offset, shape),), None

    def _chunks(
        self, dataset: Any, sizes: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[tuple[Part, ...], str | None]:
        """Return the chunks of a dataset as parts. The last ones can extend beyond the shape."""
        grid = [-(-full // size) for full, size in zip(shape, sizes, strict=True)]
        if dataset.get_num_chunks() != math.prod(grid):
            return (), "chunks that were never written"
        self._budget.add(_CHUNK_ENTRY * math.prod(grid))
        self._budget.charge(_PART * math.prod(grid))
        parts: list[Part] = []

        def add(chunk: Any) -> None:
            part = contiguous_part(self._path, chunk.byte_offset, sizes)
            left = (full - at for full, at in zip(shape, chunk.chunk_offset, strict=True))
            clipped = tuple(map(min, sizes, left))
            parts.append(part._replace(sizes=clipped, starts=tuple(chunk.chunk_offset)))
            if chunk.size != math.prod(sizes) * dtype.itemsize:
                raise unexpected(f"chunks of {sizes}", f"one of {chunk.size:,} bytes", self._path)

        dataset.chunk_iter(add)
        return tuple(parts), None
