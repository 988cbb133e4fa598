"""Exceptions that a signal's handler raised while something else was under way."""

from __future__ import annotations

import traceback
from types import FrameType


def is_of_a_handler(error: BaseException) -> bool:
    """Whether `error` came from a signal's handler, as a time limit's does: it is the caller's,
    whatever was being tried when the signal came.

    A handler is what was called with the frame that it interrupted. (Which handlers are in place
    tells less: many put the one before back and raise then.)
    """
    interrupted = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if interrupted is not None and _was_given(frame, interrupted):
            return True
        interrupted = frame
    return False


def _was_given(frame: FrameType, other: FrameType) -> bool:
    """Whether a function has a frame among its arguments, or in `*args`."""
    values = list(frame.f_locals.values())
    values += [part for value in values if type(value) is tuple for part in value]
    return any(value is other for value in values)
