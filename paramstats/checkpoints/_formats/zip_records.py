"""Find the records of a zip archive in a file, or in a range of one."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import IO, Any, NamedTuple

from paramstats.checkpoints._errors import unexpected

_MAX_DIRECTORY_BYTES = 100 << 20
"""Longest directory of an archive: a million records."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Header of a zip record: signature, length of the name, length of the extra field."""

_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, OverflowError, EOFError),
    *(MemoryError, struct.error, zipfile.BadZipFile, NotImplementedError),
)
"""What zipfile can raise on a damaged archive."""


class Record(NamedTuple):
    """An uncompressed record of an archive."""

    name: str
    begin: int
    nbytes: int
    crc: int | None
    """None if the archive has no checksums."""


def read_directory(file: IO[bytes], path: str, begin: int, end: int) -> list[zipfile.ZipInfo]:
    """Return the directory of the archive in a range of a file."""
    window: Any = _Window(file, begin, end - begin)
    try:
        with zipfile.ZipFile(window) as archive:
            return archive.infolist()
    except _ERRORS as error:
        if isinstance(error.__context__, OSError):  # zipfile takes it for damage
            raise error.__context__ from None
        raise unexpected(
            "a complete torch.save archive",
            f"a truncated or damaged one ({error})",
            path,
            "copy or download it again",
        ) from None


def find_record(
    file: IO[bytes], info: zipfile.ZipInfo, begin: int, end: int, path: str, has_checksums: bool
) -> Record:
    """Return the place of a record in the file."""
    position = begin + max(info.header_offset, 0)
    file.seek(position)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) == _LOCAL_HEADER.size and info.compress_type == zipfile.ZIP_STORED:
        signature, name, extra = _LOCAL_HEADER.unpack(header)
        position += _LOCAL_HEADER.size + name + extra
        if signature == b"PK\3\4" and info.header_offset >= 0 and position + info.file_size <= end:
            crc = info.CRC if has_checksums else None
            return Record(info.filename, position, info.file_size, crc)
    expected = f"an uncompressed record {info.filename!r} within the file"
    raise unexpected(expected, "a damaged archive, or one that torch.save did not write", path)


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
