"""List the tensors of files with a pickle, without executing it.

`torch.save` writes a zip archive of uncompressed records: `data.pkl` is the pickle of what was
saved and refers to storages by key, and `data/KEY` has the bytes of a storage. TorchScript archives
are the same, with more records. Before torch 1.6 it was a sequence of pickles and storages. A plain
pickle has the bytes in itself. https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import io
import os
import struct
import sys
from typing import IO, Any

from paramstats._core.format import one_line_name
from paramstats.checkpoints._checksums import crc_of_file
from paramstats.checkpoints._errors import CheckpointError, PickleError, unexpected
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._formats.zip_records import Record, find_record, read_directory
from paramstats.checkpoints._pickles import machine as pickles
from paramstats.checkpoints._pickles.listing import list_tensors
from paramstats.checkpoints._pickles.storages import LEGACY_PREFIX, load_legacy, read_storage
from paramstats.checkpoints._pickles.stored_bytes import Place, Source
from paramstats.checkpoints._stored_tensors import Checksum, Contents

__all__ = ["LEGACY_PREFIX", "is_pickle", "read", "read_legacy", "read_pickle"]

_DAMAGED = (
    *(ValueError, TypeError, LookupError, AttributeError, OverflowError, EOFError),
    *(RecursionError, MemoryError, struct.error),
)
"""What this module can raise on a file whose values have unexpected types."""

_PICKLE_SUFFIXES = (".pkl", ".pickle", ".p")
_READ = ("data.pkl", "data/", "constants.pkl", "constants/", "byteorder")
"""The records that are read."""


def read(
    file: IO[bytes], path: str, files: Files, begin: int = 0, size: int | None = None
) -> Contents:
    """Return the tensors of an archive: `size` bytes from `begin`, or all up to the file's end."""
    end = file.seek(0, io.SEEK_END) if size is None else begin + size
    records = _records(file, path, begin, end, size is None)
    order = _read_order(file, records, path)
    if order != sys.byteorder.encode():
        raise unexpected(f"{sys.byteorder}-endian data", repr(order), path)
    try:
        source, value = _load(file, path, files, records, "data")
        contents = list_tensors(value, source)
        if "constants.pkl" in records:  # the constants of TorchScript
            source, value = _load(file, path, files, records, "constants")
            constants = list_tensors({"constants": value}, source)
            known = {name for tensor in contents.tensors for name in tensor.names}
            contents.tensors.extend(t for t in constants.tensors if known.isdisjoint(t.names))
    except CheckpointError:
        raise
    except (PickleError, *_DAMAGED) as error:
        raise _no_tensors(path, error) from None
    checksums = (
        Checksum(path, record.begin, record.nbytes, record.crc, record.name)
        for name, record in records.items()
        if record.crc is not None and name.startswith(("data/", "constants/"))
    )
    return contents._replace(checksums=tuple(checksums))


def read_legacy(file: IO[bytes], path: str, files: Files) -> Contents:
    """Return the tensors of a file of torch before 1.6."""
    source = Source(files, path, file.seek(0, io.SEEK_END))
    file.seek(0)
    try:
        value, source.storages = load_legacy(file, source, path, source.size)
        return list_tensors(value, source)
    except (PickleError, *_DAMAGED) as error:
        raise _no_tensors(path, error) from None


def is_pickle(prefix: bytes, suffix: str) -> bool:
    """Return whether a file begins like a plain pickle. Protocols 0 and 1 have no signature."""
    if prefix[:1] == b"\x80":
        return prefix[1:2] in (b"\2", b"\3", b"\4", b"\5")
    return suffix in _PICKLE_SUFFIXES and prefix[:1] in (b"(", b"]", b"}", b"c")


def read_pickle(file: IO[bytes], path: str, files: Files) -> Contents:
    """Return the tensors and arrays of a file that Python's `pickle` wrote."""
    source = Source(files, path, file.seek(0, io.SEEK_END))
    file.seek(0)
    try:
        contents = list_tensors(pickles.load(file, files.budget, read_storage), source)
        end = file.seek(0, io.SEEK_CUR)
    except (PickleError, *_DAMAGED) as error:
        raise _no_tensors(path, error) from None
    rest = source.size - end
    notes = (f"not read: {rest:,} bytes after the first pickle of the file",) if rest else ()
    return contents._replace(notes=(*contents.notes, *notes))


def _records(file: IO[bytes], path: str, begin: int, end: int, is_whole: bool) -> dict[str, Record]:
    """Return the records of an archive, by name without the folder that contains them all."""
    infos = read_directory(file, path, begin, end)
    if is_whole and min((info.header_offset for info in infos), default=0) > 0:
        folder = os.path.dirname(path) or "."
        raise unexpected(
            "a torch.save file",
            "several archives in one file: part of a distributed checkpoint",
            path,
            f"pass the path of its folder {one_line_name(folder)}",
        )
    has_checksums = any(info.CRC for info in infos)
    records: dict[str, Record] = {}
    for info in infos:
        name = info.filename.partition("/")[2]
        if name in records:
            raise unexpected("every record once", f"{name!r} twice", path)
        if name.startswith(_READ):
            records[name] = find_record(file, info, begin, end, path, has_checksums)
    if "data.pkl" not in records:
        raise unexpected("a torch.save file", "another zip archive", path)
    if sum(record.nbytes for record in records.values()) > end - begin:
        raise unexpected("storages in different bytes", "some in the same bytes", path)
    return records


def _read_order(file: IO[bytes], records: dict[str, Record], path: str) -> bytes:
    """Return the byte order of an archive."""
    record = records.get("byteorder")
    if record is None:
        return sys.byteorder.encode()
    _check(file, record, path)
    file.seek(record.begin)
    return file.read(min(record.nbytes, 16)) or sys.byteorder.encode()


def _load(
    file: IO[bytes], path: str, files: Files, records: dict[str, Record], stem: str
) -> tuple[Source, Any]:
    """Return the value of a pickle of an archive, and where its storages are."""
    record = records[f"{stem}.pkl"]
    _check(file, record, path)
    prefix = f"{stem}/"
    storages = {
        name.removeprefix(prefix): Place(path, record.begin, record.nbytes)
        for name, record in records.items()
        if name.startswith(prefix)
    }
    size = sum(record.nbytes for record in records.values())
    file.seek(record.begin)
    value = pickles.load(file, files.budget, read_storage)
    if file.tell() > record.begin + record.nbytes:
        raise PickleError("a pickle that is longer than its record")
    return Source(files, path, size, storages), value


def _check(file: IO[bytes], record: Record, path: str) -> None:
    """Raise CheckpointError unless the bytes of a record have its checksum."""
    if record.crc not in (None, crc_of_file(file, record.begin, record.nbytes)):
        what = f"a damaged file: the CRC-32 of record {record.name!r} differs"
        raise unexpected("an undamaged torch.save file", what, path)


def _no_tensors(path: str, error: Exception) -> CheckpointError:
    reason = error if isinstance(error, PickleError) else f"a damaged file ({error!r})"
    return unexpected("a pickle with tensors", reason, path)
