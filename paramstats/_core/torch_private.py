"""Keep torch.compile, tracers and torch modes away from our own operators.

These functions use private names of torch. Where a torch version lacks one or has changed it, only
the protection that needs it is missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])

_MISSING = (AttributeError, ImportError, TypeError)
"""Exceptions raised if a private name of torch is missing or has changed."""

REASON = "paramstats reads the current values; call it outside of code compiled with fullgraph=True"
"""The reason that torch.compile shows where a graph break is an error."""


def skip_dynamo(function: F) -> F:
    """Make torch.compile break its graph at a call of `function` and run the call uncompiled.

    There is one graph break per call and no recompilation. `torch.compiler.disable` has the same
    effect, but wraps the function and imports torch._dynamo, which takes seconds. Here the code
    object is marked instead, at no cost per call. `torch.compiler.disable` is the fallback.
    """
    try:
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    except _MISSING:
        return torch.compiler.disable(function, reason=REASON)  # type: ignore[no-any-return]
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = REASON  # type: ignore[attr-defined]
    return function


class _NoTracing(contextlib.ContextDecorator):
    """The context manager and decorator that `no_tracing` returns; enters at each call anew."""

    def _recreate_cm(self) -> _NoTracing:
        return _NoTracing()

    def __enter__(self) -> None:
        self._stack: contextlib.ExitStack | None = None
        if _is_traced():  # almost never, so that the common case is fast
            self._stack = contextlib.ExitStack()
            for hide in (_hide_from_tracing, _hide_from_function_modes, _hide_from_dispatch_modes):
                with contextlib.suppress(*_MISSING):
                    hide(self._stack)

    def __exit__(self, *error: Any) -> None:
        if self._stack is not None:
            self._stack.__exit__(*error)


def no_tracing() -> _NoTracing:
    """Hide the operators in a `with` block from tracing, function modes and dispatch modes."""
    return _NoTracing()


def _is_traced() -> bool:
    """Return whether anything traces operators; True if this torch version cannot tell."""
    try:
        return (
            torch._C._get_tracing_state() is not None
            or torch._C._len_torch_function_stack() > 0
            or torch._C._len_torch_dispatch_stack() > 0
        )
    except _MISSING:
        return True


def _hide_from_tracing(stack: contextlib.ExitStack) -> None:
    tracing = torch._C._get_tracing_state()
    if tracing is not None:
        resume = torch._C._set_tracing_state  # type: ignore[attr-defined]
        resume(None)
        stack.callback(resume, tracing)


def _hide_from_function_modes(stack: contextlib.ExitStack) -> None:
    """Pop the modes. DisableTorchFunction would also disable tensors' own __torch_function__."""
    for _ in range(torch._C._len_torch_function_stack()):
        stack.enter_context(torch.overrides._pop_mode_temporarily())


def _hide_from_dispatch_modes(stack: contextlib.ExitStack) -> None:
    if torch._C._len_torch_dispatch_stack():
        from torch.utils._python_dispatch import _disable_current_modes

        stack.enter_context(_disable_current_modes())


def unwrapped(x: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor behind one that torch.func.grad, jvp or the like has wrapped.

    Raises TypeError inside torch.vmap, where one tensor represents many.
    """
    try:
        functorch = torch._C._functorch
        while functorch.is_gradtrackingtensor(x):
            x = functorch.get_unwrapped(x)
        is_one_of_many = functorch.is_batchedtensor(x)
    except _MISSING:
        return x
    if is_one_of_many:
        raise TypeError("a tensor inside torch.vmap represents many; call summarize outside of it")
    return x
