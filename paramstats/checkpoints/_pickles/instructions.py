"""Read the instructions of a pickle, without the bytes of long values."""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from paramstats.checkpoints._budget import Budget
from paramstats.checkpoints._errors import PickleError

LONGEST_IN_MEMORY = 1 << 12
"""A longer value stays in the file. A shorter one needs about the memory of a tensor's entry."""

_MAX_ARGUMENT_BYTES = 1 << 20
"""Longest number of a pickle."""

_MAX_LINE_BYTES = 1 << 16
"""Converting a longer line of digits to a number would take long."""

_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_LENGTHS = {
    **{"BINBYTES": "<I", "BINBYTES8": "<Q", "BYTEARRAY8": "<Q"},
    **{"BINSTRING": "<i", "BINUNICODE": "<I", "BINUNICODE8": "<Q"},
}
"""How the length of a value that may be long is stored, by instruction."""


@dataclass(eq=False, repr=False, slots=True)
class FileBytes:
    """A long value of a pickle, which was not read."""

    offset: int
    """Position in the file that the pickle was read from."""
    nbytes: int
    is_text: bool
    """Whether the bytes are text in UTF-8."""

    def __repr__(self) -> str:
        return f"a value of {self.nbytes:,} bytes"


def read_instructions(file: IO[bytes], budget: Budget) -> Iterator[tuple[str, Any]]:
    """Yield the name and the argument of each instruction, up to STOP."""
    limited: Any = _LimitedFile(file, budget)
    name = ""
    while name != "STOP":
        code = limited.read(1).decode("latin-1")
        opcode = _OPCODES.get(code)
        if opcode is None:
            raise PickleError(
                f"a damaged pickle (unknown instruction {code!r})"
                if code
                else "a damaged pickle (its end is missing)"
            )
        name = opcode.name
        if name in _LENGTHS:
            yield name, _read_value(limited, name)
        elif name in ("STRING", "UNICODE") and opcode.arg:
            line = limited.readline(is_text=True)
            yield (name, opcode.arg.reader(io.BytesIO(line))) if line else ("NONE", None)
        else:
            yield name, opcode.arg and opcode.arg.reader(limited)


def _read_value(file: _LimitedFile, name: str) -> Any:
    """Return bytes or text, or where they are in the file if they are long."""
    form = _LENGTHS[name]
    (nbytes,) = struct.unpack(form, file.read(struct.calcsize(form)))
    is_text = "UNICODE" in name
    if nbytes > LONGEST_IN_MEMORY:
        return FileBytes(file.skip(nbytes), nbytes, is_text)
    data = file.read(nbytes)
    if len(data) != nbytes:
        raise PickleError("a damaged pickle (its end is missing)")
    if name == "BYTEARRAY8":
        return bytearray(data)
    if is_text:
        return data.decode("utf-8", "surrogatepass")
    return data.decode("latin-1") if name == "BINSTRING" else data


class _LimitedFile:
    """A file that refuses to read more bytes at once than an argument may have."""

    def __init__(self, file: IO[bytes], budget: Budget) -> None:
        self._file, self._budget = file, budget

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_ARGUMENT_BYTES:
            raise PickleError(f"a pickle with a value of {size:,} bytes")
        data = self._file.read(size)
        self._budget.add(len(data))
        return data

    def readline(self, is_text: bool = False) -> bytes:
        """Return a line; nothing if it is a text that is too long."""
        data = self._file.readline(_MAX_LINE_BYTES)
        self._budget.add(len(data))
        if len(data) < _MAX_LINE_BYTES:
            return data
        if not is_text:
            raise PickleError(f"a pickle with a line of more than {_MAX_LINE_BYTES:,} bytes")
        while len(self._file.readline(_MAX_LINE_BYTES)) == _MAX_LINE_BYTES:
            pass
        return b""

    def skip(self, size: int) -> int:
        """Skip bytes and return their position."""
        offset = self._file.tell()
        if size > self._file.seek(0, io.SEEK_END) - offset:
            raise PickleError("a damaged pickle (its end is missing)")
        self._file.seek(offset + size)
        return offset
