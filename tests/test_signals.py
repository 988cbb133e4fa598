"""What a signal's handler raises in the midst of a call reaches the caller."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import signal
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn

import paramstats
from paramstats._history import file as history_file
from paramstats.checkpoints import _differences as differences
from paramstats.checkpoints import _pickles as pickles
from paramstats.checkpoints import _torch_save as torch_save
from paramstats.checkpoints import compare_files, summarize_file
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


def forgets(number, frame):
    del frame
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
    "lets go of the frame": forgets,
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
def test_an_exception_of_a_handler_is_not_a_tensors(backend, sigterm, handler, kind):
    odd = kind(torch.randn(5))
    sigterm(HANDLERS[handler])
    with pytest.raises(TimeoutError, match="out of time"):
        paramstats.summarize({"x": torch.ones(3), "w": odd})
    sigterm(signal.SIG_IGN)
    assert paramstats.summarize({"x": torch.ones(3)})["x"].mean == 1.0


def test_an_exception_of_a_handler_holds_no_tensors_once_it_was_caught(backend, sigterm):
    """No cycle of it and its traceback is left to the collector, which may come much later."""
    sigterm(out_of_time)
    tensor = torch.ones(3)
    alive = weakref.ref(tensor)
    gc.disable()
    try:
        with contextlib.suppress(TimeoutError):
            paramstats.summarize({"x": tensor, "w": Interrupts(torch.ones(5))})
        del tensor
        assert alive() is None
    finally:
        gc.enable()


def test_a_handler_that_returns_disturbs_nothing(backend, sigterm):
    came = []
    sigterm(lambda *_: came.append(paramstats.summarize({"y": torch.ones(2)})))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = paramstats.summarize({"x": torch.ones(3), "w": Interrupts(torch.ones(5))})
    assert (summary["x"].mean, summary["w"].mean) == (1.0, 1.0) and came


class Children(dict):
    """A signal comes while they are listed."""

    def values(self):
        signal.raise_signal(signal.SIGTERM)
        return super().values()


def children(monkeypatch):
    model = nn.Linear(2, 2)
    model.__dict__["_modules"] = Children()
    return model


def children_where_fsdp_is(monkeypatch):
    importlib.import_module("torch.distributed.fsdp")
    monkeypatch.setattr("paramstats._core.walk._few_paths", lambda module: True)
    model = children(monkeypatch)
    model.named_parameters = nn.Linear(2, 2).named_parameters
    return model


def listing(monkeypatch):
    class Lists(nn.Linear):
        def named_parameters(self, *args, **kwargs):
            signal.raise_signal(signal.SIGTERM)
            return super().named_parameters(*args, **kwargs)

    return Lists(2, 2)


@pytest.mark.parametrize("make", [children, children_where_fsdp_is, listing])
@pytest.mark.parametrize("kind", [TimeoutError, TypeError])
def test_an_exception_of_a_handler_is_not_a_modules(backend, sigterm, monkeypatch, make, kind):
    raised = []

    def handler(number, frame):
        if not raised:  # later ones would come out anyhow
            raised.append(kind("out of time"))
            raise raised[0]

    model = make(monkeypatch)
    sigterm(handler)
    with pytest.raises(kind, match="out of time"):
        paramstats.summarize(model)


def test_an_exception_of_a_handler_is_not_a_numbers(backend, sigterm):
    class Number:
        def __float__(self):
            signal.raise_signal(signal.SIGTERM)
            return 1.0

    def handler(number, frame):
        raise RuntimeError("out of time")

    sigterm(handler)
    with pytest.raises(RuntimeError, match="out of time"):
        paramstats.summarize({"x": torch.ones(3)}, correction=Number())


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_a_timer_in_the_midst_of_the_walk(backend):
    came = []

    def handler(number, frame):
        came.append(number)
        out_of_time()

    def until_it_comes(seconds):
        came.clear()
        signal.setitimer(signal.ITIMER_REAL, seconds)
        while not came:
            paramstats.summarize(model)

    model = nn.ModuleList([nn.Identity() for _ in range(20_000)])
    gc.disable()  # Python ignores what is raised in a callback of the collector's, such as pytest's
    before = signal.signal(signal.SIGALRM, handler)
    try:
        for milliseconds in range(1, 16):
            with pytest.raises(TimeoutError, match="out of time"):
                until_it_comes(milliseconds / 1000)
    finally:
        signal.signal(signal.SIGALRM, before)
        gc.enable()


def test_a_frame_among_the_locals_is_no_handlers(backend):
    def who_asks():
        caller = sys._getframe().f_back
        raise RuntimeError(f"not in {caller.f_code.co_name}")

    class Asks(Wrapper):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            who_asks()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summary = paramstats.summarize({"x": torch.ones(3), "w": Asks(torch.ones(3))})
    assert list(summary.skipped) == ["w"] and summary["x"].mean == 1.0


def summary():
    return paramstats.summarize({"x": torch.ones(3)})


def written(path):
    history = paramstats.History(path)
    yield history_file.Writer, "check"
    history.append(0, summary())


def opened(path):
    with paramstats.History(path) as history:
        history.append(0, summary())
    yield history_file.Reader, "_parse"
    paramstats.History(path)


def saved(path, where, name):
    torch.save({"x": torch.ones(3)}, path)
    yield where, name
    summarize_file(path)


def compared(path):
    torch.save({"x": torch.ones(3)}, path)
    yield differences, "_states"
    compare_files(path, path)


FILES = {
    "a history that is written": written,
    "a history that is opened": opened,
    "an archive": lambda path: saved(path, torch_save, "_records"),
    "a pickle": lambda path: saved(path, pickles._Machine, "step"),
    "two checkpoints": compared,
}


@pytest.mark.parametrize("kind", [TimeoutError, RuntimeError])
@pytest.mark.parametrize("use", FILES)
def test_an_exception_of_a_handler_is_not_a_files(sigterm, monkeypatch, tmp_path, use, kind):
    path = tmp_path / "file"
    steps = FILES[use](path)
    where, name = next(steps)
    before = path.read_bytes()

    def handler(number, frame):
        raise kind("out of time")

    sigterm(handler)
    monkeypatch.setattr(where, name, lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(kind, match="out of time"):
        next(steps)
    assert path.read_bytes() == before
