"""Files that `torch.save` wrote: what tensors they hold, and where; their pickle is never run.

Such a file is a zip archive of uncompressed records: `data.pkl`, which says what was saved and
refers to storages by key, and `data/KEY` for each storage. Before torch 1.6 it was pickles and
storages one after another. https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from typing import IO, Any

from paramstats.checkpoints import _pickles as pickles
from paramstats.checkpoints._pickles import PickleError
from paramstats.checkpoints._rebuilding import ALLOWED, Places, Storage, listed, storage
from paramstats.checkpoints._stored import CheckpointError, Stored

LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file of torch before 1.6 begins: its magic number, pickled."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a zip record: signature, length of the name, length of what follows it."""

_BROKEN = (
    struct.error,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    EOFError,
    RecursionError,
    MemoryError,
)
"""What a file whose values are not of the types they should be can make this reader raise."""


def read(file: IO[bytes], path: str, begin: int = 0, size: int | None = None) -> list[Stored]:
    """The tensors of an archive that is `size` bytes from `begin` of a file (None: all of it)."""
    end = file.seek(0, io.SEEK_END) if size is None else begin + size
    window = file if size is None else io.BufferedReader(_Window(file, begin, size))
    try:
        with zipfile.ZipFile(window) as archive:
            records = _records(archive, path)
            places = {
                key.removeprefix("data/"): _place(file, info, begin, end, path)
                for key, info in records.items()
                if key.startswith("data/")
            }
            where, length = _place(file, records["data.pkl"], begin, end, path)
            order = b""
            if "byteorder" in records:
                order_at, order_length = _place(file, records["byteorder"], begin, end, path)
                file.seek(order_at)
                order = file.read(min(order_length, 16))
    except CheckpointError:
        raise
    except (*_BROKEN, zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise CheckpointError(
            f"paramstats: expected a whole torch.save archive, got {path}: {error}"
        ) from None
    if order and order != sys.byteorder.encode():
        raise CheckpointError(f"paramstats: expected {sys.byteorder}-endian, got {order!r}: {path}")
    file.seek(where)
    try:
        value = pickles.load(file, ALLOWED, storage)
        if file.tell() > where + length:
            raise PickleError("a pickle that is longer than its record")
        return listed(value, places, path)
    except (PickleError, *_BROKEN) as error:
        raise _refusal(path, error) from None


def read_legacy(file: IO[bytes], path: str) -> list[Stored]:
    """The tensors of a file of torch before 1.6."""
    end = file.seek(0, io.SEEK_END)
    file.seek(len(LEGACY))
    used: dict[str, int] = {}

    def counted(reference: Any) -> Storage:
        made = storage(reference)
        used[made.key] = made.dtype.itemsize
        return made

    try:
        for _ in ("protocol", "system"):
            pickles.load(file, ())
        value = pickles.load(file, ALLOWED, counted)
        places: Places = {}
        for key in pickles.load(file, ()):
            (elements,) = struct.unpack("<q", file.read(8))
            places[key] = (file.tell(), elements * used[key])
            if not 0 <= elements * used[key] <= end - file.tell():
                raise PickleError(f"a file that ends within storage {key!r}")
            file.seek(elements * used[key], io.SEEK_CUR)
        return listed(value, places, path)
    except (PickleError, *_BROKEN) as error:
        raise _refusal(path, error) from None


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: IO[bytes], begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence, self._size)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._begin + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _records(archive: zipfile.ZipFile, path: str) -> dict[str, zipfile.ZipInfo]:
    """What is in the archive, by name without the folder that everything is in."""
    records: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        if name in records:
            raise CheckpointError(f"paramstats: expected every record once, got {name!r}: {path}")
        records[name] = info
    if "constants.pkl" in records:
        raise CheckpointError(
            f"paramstats: expected a file of torch.save, got a TorchScript archive: {path}; save "
            "the state_dict() of what torch.jit.load gives"
        )
    if "data.pkl" not in records:
        raise CheckpointError(
            f"paramstats: expected a file of torch.save, got another zip archive: {path}"
        )
    return records


def _place(
    file: IO[bytes], info: zipfile.ZipInfo, begin: int, end: int, path: str
) -> tuple[int, int]:
    """Where a record's bytes begin in the file, and how many they are."""
    at = begin + max(info.header_offset, 0)
    file.seek(at)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) == _LOCAL_HEADER.size and info.compress_type == zipfile.ZIP_STORED:
        signature, name, extra = _LOCAL_HEADER.unpack(header)
        at += _LOCAL_HEADER.size + name + extra
        if signature == b"PK\3\4" and info.header_offset >= 0 and at + info.file_size <= end:
            return at, info.file_size
    raise CheckpointError(
        f"paramstats: expected an uncompressed record {info.filename!r} within the file, got a "
        f"broken or foreign archive: {path}"
    )


def _refusal(path: str, error: Exception) -> CheckpointError:
    reason = error if isinstance(error, PickleError) else f"a broken file ({error!r})"
    remedy = ""
    if "refers to" in str(reason):
        remedy = "; of a whole model or trainer save the state_dict()"
    return CheckpointError(f"paramstats: expected tensors in {path}, got {reason}{remedy}")
