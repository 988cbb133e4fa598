"""List the arrays of `.npy` and `.npz` files, without numpy and without its pickles.

A `.npy` file is a header in text and the elements: numpy.lib.format describes it. A `.npz` file is
a zip archive of them.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import re
import struct
import zipfile
import zlib
from typing import IO, NamedTuple

import torch

from paramstats.checkpoints._errors import listed, unexpected
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._stored_tensors import Contents, StoredTensor, contiguous_part

_SIGNATURE = b"\x93NUMPY"
_MAX_HEADER_BYTES = 10_000
"""numpy's own limit."""

_MAX_DIMENSIONS = 64
"""numpy's own limit."""

_MAX_DIRECTORY_BYTES = 16 << 20
_RECORDS = "records of several fields; save each field as an array"
_COMPRESSED = "compressed elements; save them with numpy.savez, not savez_compressed"
_TENSOR = 2000
"""Bytes of memory that an array of an archive needs."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Header of a zip record: signature, length of the name, length of the extra field."""

_DTYPES = {
    **{"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "b1": torch.bool},
    **{"i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64},
    **{"u1": torch.uint8, "u2": torch.uint16, "u4": torch.uint32, "u8": torch.uint64},
    **{"c8": torch.complex64, "c16": torch.complex128},
}
_DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError)
"""What zipfile raises on a damaged archive, and on an encrypted one."""

_KINDS = {
    **{"O": "Python objects, which only a pickle could read", "S": "text", "U": "text"},
    "V": "elements without a type (arrays of ml_dtypes, such as bfloat16, are saved like this)",
}


class _Header(NamedTuple):
    dtype: torch.dtype
    unread_reason: str | None
    shape: tuple[int, ...]
    is_fortran: bool
    length: int
    """Bytes from the beginning of the file to the first element."""

    def end(self) -> int:
        """Return the bytes from the beginning of the file to the end of the last element."""
        return self.length + math.prod(self.shape) * self.dtype.itemsize


def is_npz(prefix: bytes) -> bool:
    """Return whether the first bytes are those of a zip archive that begins with a `.npy` file."""
    if len(prefix) < 30 or not prefix.startswith(b"PK\3\4"):
        return False
    return prefix[30 : 30 + int.from_bytes(prefix[26:28], "little")].endswith(b".npy")


def element_type(text: str) -> tuple[torch.dtype, str | None]:
    """Return the dtype that numpy writes as a text such as "<f4", and why it cannot be read."""
    order, kind, size = text[:1], text[1:2], text[2:]
    dtype = _DTYPES.get(kind + size)
    if dtype is None:
        return torch.bits8, _KINDS.get(kind, f"numpy's dtype {text}, which torch does not have")
    is_big = order == ">" and dtype.itemsize > 1
    return dtype, "big-endian elements; convert them with numpy" if is_big else None


def read_npy(file: IO[bytes], path: str, _: Files) -> Contents:
    """Return the array of a `.npy` file. It has no name there, and is listed as "tensor"."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    header = _header(file, path)
    past = size if header.unread_reason else header.end()
    if past > size:
        raise unexpected(f"{past} bytes", size, path, "the file is truncated: copy it again")
    notes = (f"not read: {size - past:,} bytes after the array",) if past < size else ()
    return Contents([_tensor("tensor", header, path, 0)], notes)


def read_npz(file: IO[bytes], path: str, files: Files) -> Contents:
    """Return the arrays of a `.npz` file by name. Compressed ones are listed with the reason."""
    try:
        with zipfile.ZipFile(_Bounded(file)) as archive:
            return _read_records(archive, file, path, files)
    except _DAMAGED as error:
        if isinstance(error.__context__, OSError):  # zipfile takes it for damage
            raise error.__context__ from None
        raise unexpected("a complete .npz file", f"a damaged one ({error})", path) from None


class _Bounded:
    """A file with the methods that zipfile needs. zipfile reads the whole directory at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.seek, self.tell, self.seekable = file, file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of {size:,} bytes")
        return self._file.read(size if size >= 0 else _MAX_DIRECTORY_BYTES)


def _read_records(archive: zipfile.ZipFile, file: IO[bytes], path: str, files: Files) -> Contents:
    tensors: dict[str, StoredTensor] = {}
    ranges: list[tuple[int, int]] = []
    others = []
    end = file.seek(0, io.SEEK_END)
    for info in archive.infolist():
        files.budget.add(len(info.filename) + _LOCAL_HEADER.size)
        files.budget.charge(_TENSOR)
        name, extension = os.path.splitext(info.filename)
        if extension != ".npy":
            others.append(info.filename)
            continue
        if name in tensors:
            raise unexpected("every array once", f"{name!r} twice", path)
        record = f"{path}/{info.filename}"
        if info.compress_type == zipfile.ZIP_DEFLATED:
            begin = 0
            with archive.open(info) as compressed:
                header = _header(compressed, record)._replace(unread_reason=_COMPRESSED)
        elif info.compress_type == zipfile.ZIP_STORED:
            begin = _begin(file, info, path)
            past = begin + info.file_size
            file.seek(begin)
            header = _header(file, record)
            if past > end or (not header.unread_reason and header.end() != info.file_size):
                expected = f"{header.end()} bytes within the file"
                raise unexpected(expected, f"{info.file_size} at byte {begin}", record)
            ranges.append((begin, past))
        else:
            raise unexpected("a record without compression", info.compress_type, record)
        tensors[name] = _tensor(name, header, path, begin)
    ranges.sort()
    if any(begin < past for (_, past), (begin, _) in itertools.pairwise(ranges)):
        raise unexpected("arrays in different bytes", "some in the same bytes", path)
    notes = (f"not read: {listed(others)} (not an array)",) if others else ()
    return Contents(list(tensors.values()), notes)


def _begin(file: IO[bytes], info: zipfile.ZipInfo, path: str) -> int:
    """Return where the bytes of a record that is not compressed begin."""
    file.seek(max(info.header_offset, 0))
    header = file.read(_LOCAL_HEADER.size)
    is_complete = len(header) == _LOCAL_HEADER.size and header.startswith(b"PK\3\4")
    if not is_complete or info.header_offset < 0:
        raise unexpected(f"a record {info.filename!r}", "a damaged archive", path)
    _, name, extra = _LOCAL_HEADER.unpack(header)
    return info.header_offset + _LOCAL_HEADER.size + int(name) + int(extra)


def _header(file: IO[bytes], path: str) -> _Header:
    """Read the header of an array, without evaluating it."""
    start = file.read(10)
    length, more = (2, 0) if start[6:7] == b"\1" else (4, 2)
    size = start[8:] + file.read(more)
    if not start.startswith(_SIGNATURE) or start[6] not in (1, 2, 3) or len(size) < length:
        raise unexpected("an array of numpy, version 1 to 3", repr(start), path)
    nbytes = int.from_bytes(size, "little")
    if nbytes > _MAX_HEADER_BYTES:
        raise unexpected(f"a header of at most {_MAX_HEADER_BYTES:,} bytes", nbytes, path)
    text = file.read(nbytes).decode("utf-8" if start[6] == 3 else "latin1", errors="replace")
    descr = re.search(r"'descr': *(?:'([^']{1,20})'|\[)", text)
    order = re.search(r"'fortran_order': *(True|False)", text)
    sizes = re.search(r"'shape': *\(([0-9, ]*)\)", text)
    if len(text) < nbytes or not (descr and order and sizes):
        raise unexpected("a header of an array of numpy", repr(text[:100]), path)
    numbers = [number.strip() for number in sizes[1].split(",") if number.strip()]
    if len(numbers) > _MAX_DIMENSIONS or any(len(number) > 18 for number in numbers):
        raise unexpected("the shape of an array", sizes[0][:100], path)
    shape = tuple(map(int, numbers))
    if math.prod(shape) >> 62:
        raise unexpected("a shape", "more elements than can be counted", path)
    dtype, reason = element_type(descr[1]) if descr[1] else (torch.bits8, _RECORDS)
    is_fortran = order[1] == "True"
    return _Header(dtype, reason, shape, is_fortran, len(start) + more + nbytes)


def _tensor(name: str, header: _Header, path: str, begin: int) -> StoredTensor:
    """Return the tensor of an array whose file begins at a byte of another file, or at 0."""
    if header.unread_reason:
        reason = header.unread_reason
        return StoredTensor(name, header.shape, header.dtype, (), unread_reason=reason)
    part = contiguous_part(path, begin + header.length, header.shape)
    if header.is_fortran:
        reverse = contiguous_part(path, part.offset, header.shape[::-1])
        part = part._replace(strides=reverse.strides[::-1])
    return StoredTensor(name, header.shape, header.dtype, (part,))
