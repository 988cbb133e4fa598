"""Keeps torch.compile out of functions that it could only stumble through."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

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
