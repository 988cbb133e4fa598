"""Define `CheckpointError` and the form of its messages."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

from paramstats._core.format import one_line_name


class CheckpointError(ValueError):
    """A file is not a checkpoint, or it is damaged; the message names the file and the reason."""


class PickleError(Exception):
    """A pickle is damaged or refused; the message continues "expected ..., got "."""


def unexpected(
    expected: str, got: object, path: str | os.PathLike[str], remedy: str = ""
) -> CheckpointError:
    """Return the error "expected EXPECTED, got GOT: PATH; REMEDY", in one printable line."""
    place = one_line_name(os.fspath(path))
    message = f"expected {expected}, got {got}: {place}{'; ' if remedy else ''}{remedy}"
    return CheckpointError(one_line_name(message))


_SHOWN = 4
"""Names that a message lists. The others are counted."""


def listed(names: list[str]) -> str:
    """Return names with commas between them, the first few and the number of the others."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    short = (name if len(name) < 200 else f"{name[:200]}..." for name in names[:_SHOWN])
    return ", ".join(short) + more


@contextmanager
def naming_errors(function: str) -> Iterator[None]:
    """Put "paramstats.checkpoints.FUNCTION: " before the message of a CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        error.args = (f"paramstats.checkpoints.{function}: {error}",)
        raise


_brief = reprlib.Repr()
_brief.maxlevel = 2
_brief.maxstring = _brief.maxother = _brief.maxlong = 200


def brief(value: object) -> str:
    """Return the repr of a value from a file, shortened: values can contain each other."""
    return _brief.repr(value)
