"""Everything that changes what torch operators do, or that watches them: modes, defaults, traces.

A condition is a function that makes a call under it and returns the call's result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

Call = Callable[[], Any]
Condition = Callable[[Call], Any]

_SMALLEST_NORMAL = torch.finfo(torch.float64).smallest_normal

torch.zeros(1 << 20).sum()  # starts torch's threads, which inherit set_flush_denormal


class RecordingFunctionMode(TorchFunctionMode):
    """A user's mode that sees calls of torch functions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class RecordingDispatchMode(TorchDispatchMode):
    """A user's mode that sees operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@contextmanager
def recording(mode: Any, *others: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Fail if a mode of the user sees an operator; `others` are active, too."""
    with ExitStack() as stack:
        stack.enter_context(mode)
        for other in others:
            stack.enter_context(other())
        mode.seen.clear()
        yield
        assert mode.seen == []
        torch.ones(2)
        assert mode.seen, "the mode is active again"


@contextmanager
def set_to(
    value: Any, setter: Callable[[Any], object], getter: Callable[[], Any]
) -> Iterator[None]:
    """Change a setting of torch for a while."""
    before = getter()
    setter(value)
    try:
        yield
    finally:
        setter(before)


def default_device(name: str) -> AbstractContextManager[None]:
    return set_to(name, torch.set_default_device, lambda: None)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return set_to(dtype, torch.set_default_dtype, torch.get_default_dtype)


def deterministic() -> AbstractContextManager[None]:
    return set_to(
        True, torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled
    )


def one_thread() -> AbstractContextManager[None]:
    return set_to(1, torch.set_num_threads, torch.get_num_threads)


def low_precision() -> AbstractContextManager[None]:
    get, set_ = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    return set_to("medium", set_, get)


def flushes_subnormals() -> bool:
    return _SMALLEST_NORMAL / 2 == 0


def flush_denormal() -> AbstractContextManager[None]:
    return set_to(True, torch.set_flush_denormal, flushes_subnormals)


@contextmanager
def profiler() -> Iterator[None]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        yield


OTHERS: tuple[Callable[[], AbstractContextManager[Any]], ...] = (
    lambda: torch.device("meta"),
    lambda: default_dtype(torch.float16),
    deterministic,
    flush_denormal,
    torch.inference_mode,
    lambda: torch.autocast("cpu", torch.bfloat16),
)

CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "function mode": lambda: recording(RecordingFunctionMode()),
    "dispatch mode": lambda: recording(RecordingDispatchMode()),
    "fake tensors": FakeTensorMode,
    "device meta": lambda: torch.device("meta"),
    "device cuda": lambda: torch.device("cuda"),
    "default device meta": lambda: default_device("meta"),
    "default device cuda": lambda: default_device("cuda"),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "low matmul precision": low_precision,
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "grad off": lambda: torch.set_grad_enabled(False),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "saved tensors": torch.autograd.graph.save_on_cpu,
    "mutation": torch.autograd.graph.allow_mutation_on_saved_tensors,
    "forward mode": forward_ad.dual_level,
    "profiler": profiler,
    "one thread": one_thread,
    "flush denormal": flush_denormal,
    "function mode and others": lambda: recording(RecordingFunctionMode(), *OTHERS),
    "dispatch mode and others": lambda: recording(RecordingDispatchMode(), *OTHERS),
}


def within(context: Callable[[], AbstractContextManager[Any]]) -> Condition:
    def condition(call: Call) -> Any:
        with context():
            return call()

    return condition


def inside(transform: Callable[[Callable[[Any], Any]], Any]) -> Condition:
    """Make the call within a function of a tensor that torch traces or transforms."""

    def condition(call: Call) -> Any:
        results = []

        def function(x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            results.append(call())
            return (y + 1).sum()

        def function_alone(x: torch.Tensor) -> torch.Tensor:
            return (x * 2 + 1).sum()

        nodes = transform(function)
        assert nodes == transform(function_alone), "the trace has an operator of the call"
        return results[0]

    return condition


def jit_trace(function: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "`torch.jit.trace", FutureWarning)
        traced = torch.jit.trace(function, torch.ones(3), check_trace=False)
    return [node.kind() for node in traced.graph.nodes()]


def fx_trace(function: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> list[str]:
    return [str(node.target) for node in make_fx(function, **options)(torch.ones(3)).graph.nodes]


def in_backward(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda grad: function(grad) * grad)
    x.sum().backward()


def in_function_mode(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return function(torch.ones(3))

    with torch.device("cpu"), Mode():
        torch.ones(3)


def in_dispatch_mode(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return function(torch.ones(3))

    with RecordingDispatchMode(), Mode():
        torch.ones(3)


def in_recomputation(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    context = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mul.Tensor])
    x = torch.ones(3, requires_grad=True)
    checkpoint(function, x, use_reentrant=False, context_fn=context).backward()


def transformed(transform: Callable[[Any], Any]) -> Callable[[Any], None]:
    def run(function: Any) -> None:
        transform(function)(torch.ones(2, 3))

    return run


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "jit.trace": jit_trace,
    "make_fx": fx_trace,
    "make_fx of fake tensors": lambda f: fx_trace(f, tracing_mode="fake"),
    "make_fx before dispatch": lambda f: fx_trace(f, pre_dispatch=True),
    "fx.symbolic_trace": lambda f: [str(node.target) for node in symbolic_trace(f).graph.nodes],
    "func.grad": transformed(torch.func.grad),
    "func.vmap": transformed(torch.func.vmap),
    "func.jvp": lambda f: torch.func.jvp(f, (torch.ones(3),), (torch.ones(3),)) and None,
    "func.functionalize": transformed(torch.func.functionalize),
    "backward hook": in_backward,
    "activation checkpoint": in_recomputation,
    "within a function mode": in_function_mode,
    "within a dispatch mode": in_dispatch_mode,
}

CONDITIONS: dict[str, Condition] = {
    **{name: within(context) for name, context in CONTEXTS.items()},
    **{name: inside(transform) for name, transform in TRANSFORMS.items()},
}

FEW = (
    *("function mode and others", "dispatch mode and others", "fake tensors", "device cuda"),
    *("default device meta", "default dtype float64", "flush denormal", "jit.trace", "func.grad"),
)
"""Conditions that together change everything that a call may depend on."""


def settings() -> dict[str, Any]:
    """Return everything that a call must leave as it is."""
    return {
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "tracing": torch._C._get_tracing_state(),
        "functorch": len(retrieve_all_functorch_interpreters()),
        "excluded keys": str(torch._C._dispatch_tls_local_exclude_set()),
        "included keys": str(torch._C._dispatch_tls_local_include_set()),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills memory": torch.utils.deterministic.fill_uninitialized_memory,
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "flush denormal": flushes_subnormals(),
    }
