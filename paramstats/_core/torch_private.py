"""Keep torch.compile, tracers and torch modes away from our own operators.

These functions use private names of torch. Where a torch version lacks one or has changed it, only
the protection that needs it is missing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from paramstats._core.denormals import flushes_denormals

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


_MAX_INTERRUPTIONS = 10

_Undo = list[Callable[[], object]]
"""Functions that restore what was hidden, the last one first; each may be called again."""


class _WithoutModes(contextlib.ContextDecorator):
    """The context manager and decorator that `without_modes` returns; enters at each call anew."""

    def __call__(self, function: F) -> F:
        guarded = super().__call__(function)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return (guarded if _has_mode() else function)(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    def _recreate_cm(self) -> _WithoutModes:
        return _WithoutModes()

    def __enter__(self) -> None:
        self._undo: _Undo = []
        if _has_mode():  # almost never, so that the common case is fast
            try:
                for hide in _HIDING:
                    with contextlib.suppress(*_MISSING):
                        hide(self._undo)
            except BaseException:  # Ctrl-C
                self.__exit__()
                raise

    def __exit__(self, *error: object) -> None:
        """Restore what was hidden, and only then raise what interrupted that (Ctrl-C)."""
        interruption = None
        for _ in range(_MAX_INTERRUPTIONS):
            try:
                while self._undo:
                    with contextlib.suppress(*_MISSING):
                        self._undo[-1]()
                    self._undo.pop()
                break
            except BaseException as error:  # whatever a signal handler raises
                interruption = error
        if interruption is not None:
            raise interruption


def without_modes() -> _WithoutModes:
    """Compute a `with` block as outside of any mode, unseen by modes and tracers.

    Every public function that calls torch operators does so in such a block. It hides the operators
    from function modes (a default device is one), dispatch modes, tracing and torch.func, and turns
    off autocast and flush-to-zero. All of these belong to the calling thread. Defaults of the whole
    process are not touched: every tensor that is made states its dtype and device.
    """
    return _WithoutModes()


def _has_mode() -> bool:
    """Return whether anything is to be hidden; True if this torch version cannot tell."""
    try:
        return (
            torch._C._get_tracing_state() is not None
            or torch._C._len_torch_function_stack() > 0
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._is_any_autocast_enabled()
            or torch.autograd.forward_ad._current_level >= 0
            or flushes_denormals()
        )
    except _MISSING:
        return True


def _hide_from_tracing(undo: _Undo) -> None:
    tracing = torch._C._get_tracing_state()
    if tracing is not None:
        resume = torch._C._set_tracing_state  # type: ignore[attr-defined]
        undo.append(lambda: resume(tracing))
        resume(None)


def _hide_from_transforms(undo: _Undo) -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

        _enter(temporarily_clear_interpreter_stack(), undo)


def _hide_from_function_modes(undo: _Undo) -> None:
    """Pop the modes. DisableTorchFunction would also disable tensors' own __torch_function__."""
    length, push = torch._C._len_torch_function_stack, torch._C._push_on_torch_function_stack
    modes = [torch._C._get_function_stack_at(i) for i in range(length())]
    undo.append(lambda: [push(mode) for mode in modes[length() :]])
    for _ in modes:
        torch._C._pop_torch_function_stack()


def _hide_from_dispatch_modes(undo: _Undo) -> None:
    if torch._ops._len_torch_dispatch_stack_pre_dispatch():
        from torch.utils._python_dispatch import _disable_current_modes

        _enter(_disable_current_modes(), undo)
        return
    length, push = torch._C._len_torch_dispatch_stack, torch._C._push_on_torch_dispatch_stack
    modes = [torch._C._get_dispatch_stack_at(i) for i in range(length())]
    undo.append(lambda: [push(mode) for mode in modes[length() :]])
    for _ in modes:
        torch._C._pop_torch_dispatch_stack(None)


def _without_autocast(undo: _Undo) -> None:
    if torch._C._is_any_autocast_enabled():
        guard = torch._C._DisableAutocast()
        undo.append(lambda: guard.__exit__(None, None, None))
        guard.__enter__()


def _without_forward_gradients(undo: _Undo) -> None:
    """Let operators ignore the tangents of dual tensors, which refuse `out=`."""
    if torch.autograd.forward_ad._current_level >= 0:
        _enter(torch.autograd.forward_ad._set_fwd_grad_enabled(False), undo)


def _with_denormals(undo: _Undo) -> None:
    if flushes_denormals():
        undo.append(lambda: torch.set_flush_denormal(True))
        torch.set_flush_denormal(False)


def _enter(context: contextlib.AbstractContextManager[object], undo: _Undo) -> None:
    context.__enter__()
    undo.append(lambda: context.__exit__(None, None, None))


_HIDING = (
    _hide_from_tracing,
    _hide_from_transforms,
    _hide_from_function_modes,
    _hide_from_dispatch_modes,
    _without_autocast,
    _without_forward_gradients,
    _with_denormals,
)


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
