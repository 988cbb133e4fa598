"""Find the bytes of values in pickles, so that they are read like any other elements.

Protocol 2 has no bytes. It stores them as text, in which a byte of 128 or more takes two.
"""

from __future__ import annotations

import bisect
import io
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from paramstats.checkpoints._errors import PickleError, unexpected
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._pickles.instructions import FileBytes
from paramstats.checkpoints._pickles.machine import RecordedCall

_CHUNK = 1 << 20
_LATIN = (("latin1",), ("latin-1",), ("iso-8859-1",))
_CONVERSIONS = (
    "builtins.bytearray",
    "__builtin__.bytearray",
    "builtins.bytes",
    "__builtin__.bytes",
)


class Place(NamedTuple):
    """A byte range of a file."""

    path: str
    begin: int
    nbytes: int


@dataclass
class Source:
    """A file with pickles, and where the bytes are that its values refer to."""

    files: Files
    path: str
    size: int
    """Bytes of the file or archive."""
    storages: dict[str, Place] = field(default_factory=dict)
    """Places of torch's storages, by their keys."""
    _views: dict[int, Place] = field(default_factory=dict)

    def place(self, value: Any, nbytes: int | None = None) -> Place | None:
        """Return where the bytes are that a value stands for; None if it stands for none.

        They must be `nbytes` if that is given; else the place of text may be too long.
        """
        value = _unwrap(value)
        if isinstance(value, FileBytes) and value.is_text:
            shortest = (value.nbytes + 1) // 2
            is_possible = nbytes is None or shortest <= nbytes <= value.nbytes
            place = self._view(value, nbytes) if is_possible else Place("", 0, value.nbytes)
        elif isinstance(value, FileBytes):
            place = Place(self.path, value.offset, value.nbytes)
        elif isinstance(value, (bytes, bytearray, str)):
            place = self._view(value, nbytes)
        else:
            return None
        if nbytes is not None and place.nbytes != nbytes:
            raise PickleError(f"{place.nbytes:,} bytes of a value that needs {nbytes:,}")
        return place

    def _view(self, value: FileBytes | bytes | bytearray | str, nbytes: int | None) -> Place:
        """Return a place in a file that exists only in this process."""
        key = id(value)  # which the pickle's values keep alive
        if key in self._views:
            return self._views[key]
        if isinstance(value, FileBytes):
            name = f"{self.path} (text at byte {value.offset})"
            self.files.add_view(
                name, lambda: io.BufferedReader(_TextBytes(self, value, name, nbytes))
            )
            size = value.nbytes if nbytes is None else nbytes
        else:
            data = value.encode("latin-1") if isinstance(value, str) else bytes(value)
            name, size = f"{self.path} (value {len(self._views)})", len(data)
            self.files.add_view(name, lambda: _NamedBytes(data, name))
        return self._views.setdefault(key, Place(name, 0, size))


def _unwrap(value: Any) -> Any:
    """Return the bytes or text in a call that only converts them to bytes."""
    while isinstance(value, RecordedCall):
        is_latin = value.function == "_codecs.encode" and value.args[1:] in _LATIN
        if not value.args or not (is_latin or value.function in _CONVERSIONS):
            return None
        value = value.args[0]
    return value


class _NamedBytes(io.BytesIO):
    """Bytes with the name that errors show."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


class _TextBytes(io.RawIOBase):
    """The bytes that a text in UTF-8 stands for: one for each of its characters.

    The text is decoded in chunks. An index has the position of each chunk, for going back.
    """

    def __init__(self, source: Source, text: FileBytes, name: str, nbytes: int | None) -> None:
        self.name = name
        self._file = source.files.open(source.path)
        self._text, self._nbytes = text, nbytes
        self._index = [(0, 0)]
        """Positions of chunks: in the bytes, and in the text."""
        self._current, self._chunk = -1, b""
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Copy bytes from the current position on; return how many."""
        while self._position >= self._index[-1][0] and self._index[-1][1] < self._text.nbytes:
            self._load(len(self._index) - 1)
        number = bisect.bisect_right(self._index, self._position, key=lambda item: item[0]) - 1
        if number == len(self._index) - 1:
            return 0
        self._load(number)
        begin = self._position - self._index[number][0]
        data = self._chunk[begin : begin + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _load(self, number: int) -> None:
        """Decode a chunk, unless it is the current one; note where the next one begins."""
        if self._current == number:
            return
        begin, at = self._index[number]
        self._file.seek(self._text.offset + at)
        data = self._file.read(min(_CHUNK, self._text.nbytes - at))
        if at + len(data) < self._text.nbytes and data[-1:] >= b"\xc0":  # half a character
            data = data[:-1]
        try:
            self._chunk = data.decode().encode("latin-1")
        except UnicodeError:
            self._chunk = b""
        if not self._chunk:
            raise unexpected("text that stands for bytes", "other text", self.name)
        self._current = number
        if number == len(self._index) - 1:
            end, at = begin + len(self._chunk), at + len(data)
            self._index.append((end, at))
            is_end = at == self._text.nbytes
            if self._nbytes is not None and (end > self._nbytes or (is_end and end < self._nbytes)):
                raise unexpected(f"text of {self._nbytes:,} bytes", f"{end:,} or more", self.name)
