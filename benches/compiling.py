"""The first call of what torch.compile made, which may fail, and may take minutes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch

MOST_SECONDS = 60.0
"""For one model; a compiler that takes longer is no way to look at a training."""


class TooLongError(BaseException):
    """No Exception, which torch's compiler catches on its way."""


def why_not_compiled(call: Callable[[], Any], seconds: float) -> str | None:
    """Calls once, so that a next call finds it compiled; or says why there will be none."""
    torch.compiler.reset()  # graphs of other models, whose number is limited
    try:
        with _alarm(seconds):
            call()
    except TooLongError:
        _stop_workers()
        return f"torch.compile took more than {seconds:.0f} s"
    except Exception as error:  # the compiler's, the C++ compiler's, Triton's
        text = " ".join(str(error).split())[:200]
        return f"torch.compile failed ({type(error).__name__}: {text})"
    return None


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _stop_workers() -> None:
    """They would go on in other processes, beside what is measured next."""
    torch.compiler.reset()
    with suppress(Exception):  # not a public function
        from torch._inductor.async_compile import shutdown_compile_workers

        shutdown_compile_workers()
