"""Exceptions that a signal's handler raised while something else was under way."""

from __future__ import annotations

import signal
import traceback
from types import CodeType


def is_of_a_handler(error: BaseException) -> bool:
    """Whether `error` came from a signal's handler, as a timeout by SIGALRM does: it is the
    caller's, whatever was being tried when the signal came."""
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    return any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__))


def _code(handler: object) -> CodeType | None:
    """What runs: of a function or method, or of an object that can be called."""
    call = handler if hasattr(handler, "__code__") else getattr(type(handler), "__call__", None)
    return getattr(call, "__code__", None)
