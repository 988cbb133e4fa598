"""List the tensors of a file that `torch.save` wrote, without executing its pickle.

Such a file is a zip archive of uncompressed records: `data.pkl` is the pickle of what was saved and
refers to storages by key, and `data/KEY` has the bytes of a storage. Before torch 1.6 it was a
sequence of pickles and storages. https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from typing import IO, Any

from paramstats.checkpoints import _pickles as pickles
from paramstats.checkpoints import _torch_pickle as torch_pickle
from paramstats.checkpoints._budget import Budget
from paramstats.checkpoints._errors import CheckpointError, PickleError, unexpected
from paramstats.checkpoints._stored_tensors import Contents

_MAX_DIRECTORY_BYTES = 100 << 20
"""Longest directory of an archive: a million records."""

LEGACY_PREFIX = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The first bytes of a file of torch before 1.6: a pickled magic number."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Header of a zip record: signature, length of the name, length of the extra field."""

_DAMAGED = (
    *(ValueError, TypeError, LookupError, AttributeError, OverflowError, EOFError),
    *(RecursionError, MemoryError, struct.error),
)
"""What this module can raise on a file whose values have unexpected types."""


def read(
    file: IO[bytes], path: str, budget: Budget, begin: int = 0, size: int | None = None
) -> Contents:
    """Return the tensors of an archive: `size` bytes from `begin`, or all up to the file's end."""
    end = file.seek(0, io.SEEK_END) if size is None else begin + size
    window: Any = _Window(file, begin, end - begin)
    byte_order = sys.byteorder.encode()
    try:
        with zipfile.ZipFile(window) as archive:
            records = _records(archive, path)
            places = {
                key.removeprefix("data/"): _place(file, info, begin, end, path)
                for key, info in records.items()
                if key.startswith("data/")
            }
            position, length = _place(file, records["data.pkl"], begin, end, path)
            if "byteorder" in records:
                at, order_length = _place(file, records["byteorder"], begin, end, path)
                file.seek(at)
                byte_order = file.read(min(order_length, 16)) or byte_order
    except CheckpointError:
        raise
    except (*_DAMAGED, zipfile.BadZipFile, NotImplementedError) as error:
        if isinstance(error.__context__, OSError):  # zipfile takes it for damage
            raise error.__context__ from None
        raise unexpected(
            "a complete torch.save archive", f"a file that is not ({error})", path
        ) from None
    if sum(size for _, size in places.values()) > end - begin:
        raise unexpected("storages in different bytes", "some in the same bytes", path)
    if byte_order != sys.byteorder.encode():
        raise unexpected(f"{sys.byteorder}-endian data", repr(byte_order), path)
    file.seek(position)
    try:
        value = pickles.load(file, torch_pickle.ALLOWED, budget, torch_pickle.read_storage)
        if file.tell() > position + length:
            raise PickleError("a pickle that is longer than its record")
        return Contents(torch_pickle.list_tensors(value, places, path, budget))
    except (PickleError, *_DAMAGED) as error:
        raise _no_tensors(path, error) from None


def read_legacy(file: IO[bytes], path: str, budget: Budget) -> Contents:
    """Return the tensors of a file of torch before 1.6."""
    end = file.seek(0, io.SEEK_END)
    file.seek(len(LEGACY_PREFIX))
    itemsizes: dict[str, int] = {}

    def read_and_note_storage(reference: Any) -> torch_pickle.Storage:
        storage = torch_pickle.read_storage(reference)
        itemsizes[storage.key] = storage.dtype.itemsize
        return storage

    try:
        pickles.load(file, (), budget)  # the version of the format
        pickles.load(file, (), budget)  # the sizes of C types
        value = pickles.load(file, torch_pickle.ALLOWED, budget, read_and_note_storage)
        places: torch_pickle.Places = {}
        for key in pickles.load(file, (), budget):
            if type(key) is not str or key not in itemsizes:
                raise PickleError("a storage that no tensor needs")
            (elements,) = struct.unpack("<q", file.read(8))
            nbytes = elements * itemsizes[key]
            places[key] = (file.tell(), nbytes)
            if not 0 <= nbytes <= end - file.tell():
                raise PickleError(f"a file that ends within storage {key!r}")
            file.seek(nbytes, io.SEEK_CUR)
        return Contents(torch_pickle.list_tensors(value, places, path, budget))
    except (PickleError, *_DAMAGED) as error:
        raise _no_tensors(path, error) from None


class _Window:
    """A range of a file, with the methods of a file that zipfile needs."""

    def __init__(self, file: IO[bytes], begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._position = file, begin, size, 0

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_END: self._size}[whence]
        if self._position < 0:
            raise ValueError("it is too short")
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Read bytes; zipfile reads the whole directory at once, and makes objects of it."""
        if size > _MAX_DIRECTORY_BYTES:
            raise ValueError(f"a directory of {size:,} bytes")
        remaining = max(0, self._size - self._position)
        self._file.seek(self._begin + self._position)
        data = self._file.read(remaining if size < 0 else min(size, remaining))
        self._position += len(data)
        return data


def _records(archive: zipfile.ZipFile, path: str) -> dict[str, zipfile.ZipInfo]:
    """Return the records of an archive, by name without the folder that contains them all."""
    records: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        if name in records:
            raise unexpected("every record once", f"{name!r} twice", path)
        records[name] = info
    if "constants.pkl" in records:
        remedy = "load it with torch.jit.load and save its state_dict()"
        raise unexpected("a torch.save file", "a TorchScript archive", path, remedy)
    if "data.pkl" not in records:
        raise unexpected("a torch.save file", "another zip archive", path)
    return records


def _place(
    file: IO[bytes], info: zipfile.ZipInfo, begin: int, end: int, path: str
) -> tuple[int, int]:
    """Return where the bytes of a record begin in the file, and how many they are."""
    position = begin + max(info.header_offset, 0)
    file.seek(position)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) == _LOCAL_HEADER.size and info.compress_type == zipfile.ZIP_STORED:
        signature, name, extra = _LOCAL_HEADER.unpack(header)
        position += _LOCAL_HEADER.size + name + extra
        if signature == b"PK\3\4" and info.header_offset >= 0 and position + info.file_size <= end:
            return position, info.file_size
    expected = f"an uncompressed record {info.filename!r} within the file"
    raise unexpected(expected, "a damaged archive, or one that torch.save did not write", path)


def _no_tensors(path: str, error: Exception) -> CheckpointError:
    reason = error if isinstance(error, PickleError) else f"a damaged file ({error!r})"
    is_object = "refers to" in str(reason)
    remedy = "save the state_dict() instead of the model or trainer" if is_object else ""
    return unexpected("tensors and plain data", reason, path, remedy)
