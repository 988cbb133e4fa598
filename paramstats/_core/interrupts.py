"""Exceptions that a signal's handler raised while something else was under way."""

from __future__ import annotations

import functools
import inspect
import itertools
import signal
import traceback
from types import CodeType, FrameType
from typing import Any


def let_through(error: BaseException) -> None:
    """Raises `error` again if it came from a signal's handler, as a time limit's does: it is the
    caller's, whatever was being tried when the signal came.

    The first thing that an `except` does which takes whatever other people's code may raise.
    """
    if _is_of_a_handler(error):
        # Not `raise error`: this frame would come into the traceback, whose frames hold tensors,
        # and its `error` would hold the traceback.
        raise


def _is_of_a_handler(error: BaseException) -> bool:
    """Whether a signal's handler is among the frames that `error` came through.

    A handler is what was called with a number and the frame that it interrupted, or what is in
    place for a signal now. (Neither alone tells: many put the handler before back and raise then,
    and a handler may have let go of the frame.)

    Not told: a handler that did both; an exception that somebody's code made another one of; one
    that was raised without a handler's frame, by a handler in C or by another thread.
    """
    codes = [_code(signal.getsignal(number)) for number in signal.valid_signals()]
    interrupted = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code in codes:
            return True
        if interrupted is not None and _was_given(frame, interrupted):
            return True
        interrupted = frame
    return False


def _code(handler: Any) -> CodeType | None:
    """What runs for a function, a method, a partial or an object that is called."""
    if isinstance(handler, functools.partial):
        handler = handler.func
    if callable(handler) and not hasattr(handler, "__code__"):
        handler = handler.__call__
    return getattr(handler, "__code__", None)


def _was_given(frame: FrameType, other: FrameType) -> bool:
    """Whether a function has a signal's number and a frame among its arguments."""
    code = frame.f_code
    values = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
    if code.co_flags & inspect.CO_VARARGS:
        rest = frame.f_locals.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount])
        values += rest if isinstance(rest, tuple) else ()
    pairs = itertools.pairwise(values)
    return any(isinstance(number, int) and value is other for number, value in pairs)
