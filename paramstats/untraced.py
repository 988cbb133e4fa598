"""Keeps torch.compile out of functions that it could only stumble through, and tracers from seeing
what a call does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

F = TypeVar("F", bound=Callable[..., object])

REASON = "paramstats reads values as they are now; call it outside of code with fullgraph=True"
"""What torch.compile says where the break is an error."""


def untraced(function: F) -> F:
    """Has compiled code break its graph at a call of `function` and run it, and all that it calls,
    as it is: one break, always the same, and nothing to compile again.

    `torch.compiler.disable` does so by a wrapper, and imports torch._dynamo for it: seconds that
    most programs would pay for nothing. Here the code object is marked instead, and a call costs no
    more than before. Where torch has no such mark any more, the wrapper it is.
    """
    try:
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    except AttributeError:
        return torch.compiler.disable(function, reason=REASON)  # type: ignore[no-any-return]
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = REASON  # type: ignore[attr-defined]
    return function


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Out of sight of what traces, counts or fakes the operators that run: they are not the
    model's, and their results are wanted now."""
    tracing = torch._C._get_tracing_state()
    if tracing is None and torch._C._len_torch_dispatch_stack() == 0:
        yield
        return
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
