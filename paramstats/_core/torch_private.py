"""Keeps torch.compile out of functions that it could only stumble through, and tracers from seeing
what a call does.

All of this takes names that torch does not promise to keep. Where one is gone, or wants to be
called in another way, what it did is gone, and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])

_GONE = (AttributeError, ImportError, TypeError)
"""What a name of another torch's raises."""

REASON = "paramstats reads values as they are now; call it outside of code with fullgraph=True"
"""What torch.compile says where the break is an error."""


def skip_dynamo(function: F) -> F:
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
    except _GONE:
        return torch.compiler.disable(function, reason=REASON)  # type: ignore[no-any-return]
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = REASON  # type: ignore[attr-defined]
    return function


@contextlib.contextmanager
def no_tracing() -> Iterator[None]:
    """Out of sight of what traces, counts, fakes or changes the operators that run: they are not
    the model's, and their results are wanted now."""
    with contextlib.ExitStack() as back:
        for hide in (_from_tracing, _from_function_modes, _from_dispatch_modes):
            with contextlib.suppress(*_GONE):
                hide(back)
        yield


def _from_tracing(back: contextlib.ExitStack) -> None:
    tracing = torch._C._get_tracing_state()
    if tracing is not None:
        resume = torch._C._set_tracing_state  # type: ignore[attr-defined]
        resume(None)
        back.callback(resume, tracing)


def _from_function_modes(back: contextlib.ExitStack) -> None:
    """Tensors' own __torch_function__ stays, for which DisableTorchFunction would not do."""
    for _ in range(torch._C._len_torch_function_stack()):
        back.enter_context(torch.overrides._pop_mode_temporarily())


def _from_dispatch_modes(back: contextlib.ExitStack) -> None:
    if torch._C._len_torch_dispatch_stack():
        from torch.utils._python_dispatch import _disable_current_modes

        back.enter_context(_disable_current_modes())


def unwrapped(x: torch.Tensor) -> torch.Tensor:
    """What a tensor inside torch.func.grad, jvp and the like stands for.

    Raises TypeError inside torch.vmap.
    """
    try:
        functorch = torch._C._functorch
        while functorch.is_gradtrackingtensor(x):
            x = functorch.get_unwrapped(x)
        is_one_of_many = functorch.is_batchedtensor(x)
    except _GONE:
        return x
    if is_one_of_many:
        raise TypeError("inside torch.vmap it stands for one of many; call summarize outside of it")
    return x
