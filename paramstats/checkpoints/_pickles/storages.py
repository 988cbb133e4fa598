"""Find the storages of tensors in pickles, and in files of torch before 1.6."""

from __future__ import annotations

import io
import struct
import sys
from dataclasses import dataclass
from typing import IO, Any

import torch

from paramstats.checkpoints._errors import PickleError
from paramstats.checkpoints._pickles import machine as pickles
from paramstats.checkpoints._pickles.dtypes import DTYPES, UNTYPED
from paramstats.checkpoints._pickles.machine import Global, RecordedCall
from paramstats.checkpoints._pickles.stored_bytes import Place, Source

LEGACY_PREFIX = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The first bytes of a file of torch before 1.6: a pickled magic number."""


@dataclass(eq=False, repr=False, slots=True)
class Storage:
    """A reference to a storage of the file."""

    key: str
    dtype: torch.dtype
    first: int
    """Index of its first element in the stored one: old files have storages that are views."""
    numel: int
    is_typed: bool


def read_storage(reference: Any) -> Storage | Global | None:
    """Convert a persistent id, which is ("storage", class, key, device, elements[, view]).

    Old files also have ("module", class, path, source). Returns None for other ids and for storages
    of an unknown type.
    """
    if type(reference) is not tuple or len(reference) not in (4, 5, 6):
        return None
    tag, kind, key, *more = reference
    if tag == "module" and isinstance(kind, Global):
        return kind
    if tag != "storage" or len(more) < 2 or not isinstance(kind, Global):
        return None
    view: Any = more[2] if len(more) == 3 else None
    is_view = type(view) is tuple and len(view) == 3
    first = view[1] if is_view else 0
    if kind.name not in DTYPES or type(key) is not str or type(more[1]) is not int:
        return None
    numel = view[2] if is_view else more[1]
    return Storage(key, DTYPES[kind.name], first, numel, kind.name != UNTYPED)


def load_legacy(
    file: IO[bytes], source: Source, path: str, end: int
) -> tuple[Any, dict[str, Place]]:
    """Return the value of a file of torch before 1.6, and the places of its storages.

    The file is at its beginning, and ends at `end`.
    """
    budget = source.files.budget
    itemsizes: dict[str, int] = {}

    def read_and_note_storage(reference: Any) -> Any:
        storage = read_storage(reference)
        if isinstance(storage, Storage):
            itemsizes[storage.key] = storage.dtype.itemsize
        return storage

    file.seek(len(LEGACY_PREFIX), io.SEEK_CUR)
    pickles.load(file, budget)  # the version of the format
    is_little = pickles.load(file, budget).get("little_endian", True)
    if is_little != (sys.byteorder == "little"):
        raise PickleError("data in the byte order of another machine")
    value = pickles.load(file, budget, read_and_note_storage)
    places: dict[str, Place] = {}
    for key in pickles.load(file, budget):
        if type(key) is not str or key not in itemsizes:
            raise PickleError("a storage that no tensor needs, or of unknown type")
        (elements,) = struct.unpack("<q", file.read(8))
        nbytes = elements * itemsizes[key]
        places[key] = Place(path, file.tell(), nbytes)
        if not 0 <= nbytes <= end - file.tell():
            raise PickleError(f"a file that ends within storage {key!r}")
        file.seek(nbytes, io.SEEK_CUR)
    return value, places


class Storages:
    """The storages of one source, and those that are files within its pickle."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._files: dict[tuple[str, int], Storage | None] = {}

    def find(self, value: Any) -> Storage | None:
        """Return the storage that a value stands for; None if it stands for none."""
        if isinstance(value, Storage):
            return value
        is_file = isinstance(value, RecordedCall) and len(value.args) == 1
        if not is_file or value.function != "torch.storage._load_from_bytes":
            return None
        place = self._source.place(value.args[0])
        if place is None:
            return None
        if place[:2] not in self._files:
            self._files[place[:2]] = self._load(place)
        return self._files[place[:2]]

    def place(self, storage: Storage) -> Place | None:
        return self._source.storages.get(storage.key)

    def _load(self, place: Place) -> Storage | None:
        """Return the storage in a file that `pickle` made of it."""
        with self._source.files.open(place.path) as file:
            file.seek(place.begin)
            if file.read(len(LEGACY_PREFIX)) != LEGACY_PREFIX:
                return None
            file.seek(place.begin)
            end = place.begin + place.nbytes
            value, places = load_legacy(file, self._source, place.path, end)
        if not isinstance(value, Storage) or value.key not in places:
            return None
        key = f"{value.key} at byte {place.begin} of {place.path}"
        self._source.storages[key] = places[value.key]
        return Storage(key, value.dtype, value.first, value.numel, value.is_typed)
