"""What a signal's handler raises in the midst of a call reaches the caller."""

from __future__ import annotations

import functools
import signal
import warnings

import pytest
import torch

import paramstats
from tests.test_inputs import Wrapper


class Interrupts(Wrapper):
    """A signal comes while its elements are asked for."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        signal.raise_signal(signal.SIGTERM)
        return super().__torch_dispatch__(func, types, args, kwargs)


class InterruptsSizes(Interrupts):
    """And while it tells its shape."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, dispatch_sizes_strides_policy="sizes"
        )


def out_of_time(*_):
    raise TimeoutError("out of time")


def once(number, frame):
    signal.signal(number, signal.SIG_IGN)
    out_of_time()


class Handler:
    def __call__(self, number, frame):
        out_of_time()

    def method(self, number, frame):
        self(number, frame)


HANDLERS = {
    "function": lambda number, frame: out_of_time(),
    "any arguments": out_of_time,
    "only once": once,
    "object": Handler(),
    "method": Handler().method,
    "partial": functools.partial(lambda limit, number, frame: out_of_time(), 3),
}


@pytest.fixture
def sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield functools.partial(signal.signal, signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("kind", [Interrupts, InterruptsSizes])
def test_an_exception_of_a_handler_is_not_a_tensors(engine, sigterm, handler, kind):
    odd = kind(torch.randn(5))
    sigterm(HANDLERS[handler])
    with pytest.raises(TimeoutError, match="out of time"):
        paramstats.summarize({"x": torch.ones(3), "w": odd})
    sigterm(signal.SIG_IGN)
    assert paramstats.summarize({"x": torch.ones(3)})["x"].mean == 1.0


def test_a_handler_that_returns_disturbs_nothing(engine, sigterm):
    came = []
    sigterm(lambda *_: came.append(paramstats.summarize({"y": torch.ones(2)})))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = paramstats.summarize({"x": torch.ones(3), "w": Interrupts(torch.ones(5))})
    assert (summary["x"].mean, summary["w"].mean) == (1.0, 1.0) and came
