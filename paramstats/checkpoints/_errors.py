"""Define `CheckpointError` and the form of its messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CheckpointError(ValueError):
    """A file is not a checkpoint, or it is damaged; the message names the file and the reason."""


def unexpected(expected: str, got: object, path: object, remedy: str = "") -> CheckpointError:
    """Return the error "expected EXPECTED, got GOT: PATH; REMEDY"."""
    return CheckpointError(
        f"expected {expected}, got {got}: {path}{'; ' if remedy else ''}{remedy}"
    )


@contextmanager
def naming_errors(function: str) -> Iterator[None]:
    """Put "paramstats.checkpoints.FUNCTION: " before the message of a CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        error.args = (f"paramstats.checkpoints.{function}: {error}",)
        raise
