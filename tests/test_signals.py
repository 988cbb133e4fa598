"""Signals during a call: KeyboardInterrupt propagates, and later calls are right."""

from __future__ import annotations

import gc
import signal
import warnings

import pytest
import torch
from torch import nn

import paramstats
from paramstats._history import reader, writer
from paramstats.checkpoints import compare_files, summarize_file
from paramstats.checkpoints._compare import differences
from paramstats.checkpoints._formats import torch_save
from paramstats.checkpoints._pickles import machine as pickles
from tests.test_inputs import Wrapper


class SignalsOnRead(Wrapper):
    """A tensor subclass that gets a signal while its elements are read."""

    number = signal.SIGINT

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        signal.raise_signal(cls.number)
        return super().__torch_dispatch__(func, types, args, kwargs)


class SignalsOnShape(SignalsOnRead):
    """A tensor subclass that gets a signal while its shape is read."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, dispatch_sizes_strides_policy="sizes"
        )


class SigtermOnRead(SignalsOnRead):
    number = signal.SIGTERM


class SignalsOnValues(dict):
    """A dictionary of child modules that gets a signal while it is iterated."""

    def values(self):
        signal.raise_signal(signal.SIGINT)
        return super().values()


class SignalsOnListing(nn.Linear):
    """A module that gets a signal while it lists its parameters."""

    def named_parameters(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return super().named_parameters(*args, **kwargs)


def module_with_signalling_children():
    model = nn.Linear(2, 2)
    model.__dict__["_modules"] = SignalsOnValues()
    return model


SOURCES = {
    "elements": lambda: {"w": SignalsOnRead(torch.randn(5))},
    "shape": lambda: {"w": SignalsOnShape(torch.randn(5))},
    "children": module_with_signalling_children,
    "named_parameters": lambda: SignalsOnListing(2, 2),
}


@pytest.fixture
def sigterm():
    """Sets a handler of SIGTERM; the previous one returns after the test."""
    before = signal.getsignal(signal.SIGTERM)
    yield lambda handler: signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("source", SOURCES)
def test_keyboard_interrupt_propagates_and_the_next_call_is_right(backend, source):
    with pytest.raises(KeyboardInterrupt):
        paramstats.summarize(SOURCES[source]())
    assert paramstats.summarize({"x": torch.ones(3)})["x"].mean == 1.0


INTERRUPTED = {
    "walk": lambda: nn.ModuleList([nn.Identity() for _ in range(20_000)]),
    "read": lambda: {str(i): torch.randn(1_500_000) for i in range(8)},
}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
@pytest.mark.parametrize("phase", INTERRUPTED)
def test_keyboard_interrupt_at_any_moment_of_a_phase(backend, phase):
    arrived = []

    def interrupt(number, frame):
        arrived.append(number)
        raise KeyboardInterrupt

    def summarize_until_interrupted(seconds):
        arrived.clear()
        signal.setitimer(signal.ITIMER_REAL, seconds)
        while not arrived:
            paramstats.summarize(source)

    source = INTERRUPTED[phase]()
    expected = paramstats.summarize(source)
    gc.disable()  # Python ignores exceptions raised in callbacks of the garbage collector
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for milliseconds in range(1, 16):
            with pytest.raises(KeyboardInterrupt):
                summarize_until_interrupted(milliseconds / 1000)
    finally:
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    assert paramstats.summarize(source) == expected


def test_a_signal_handler_may_call_summarize(backend, sigterm):
    results = []
    sigterm(lambda *_: results.append(paramstats.summarize({"y": torch.ones(2)})))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = paramstats.summarize({"x": torch.ones(3), "w": SigtermOnRead(torch.ones(5))})
    assert (summary["x"].mean, summary["w"].mean) == (1.0, 1.0)
    assert all(result["y"].mean == 1.0 for result in results) and results


def test_an_ordinary_exception_of_a_handler_counts_as_the_tensors_error(backend, sigterm):
    """docs/robustness.md describes this limit and its remedy."""

    def raise_timeout(*_):
        raise TimeoutError("out of time")

    sigterm(raise_timeout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summary = paramstats.summarize({"x": torch.ones(3), "w": SigtermOnRead(torch.ones(5))})
    assert summary["x"].mean == 1.0 and list(summary.skipped) == ["w"]


def append_to_history(path):
    with paramstats.History(path) as history:
        history.append(0, paramstats.summarize({"x": torch.ones(3)}))


def write_history(path):
    history = paramstats.History(path)
    yield writer.Writer, "_checked_size"
    history.append(0, paramstats.summarize({"x": torch.ones(3)}))


def read_history(path):
    append_to_history(path)
    yield reader.Reader, "_parse"
    paramstats.History.load(path)


def read_checkpoint(path, owner, attribute):
    torch.save({"x": torch.ones(3)}, path)
    yield owner, attribute
    summarize_file(path)


def compare_checkpoints(path):
    torch.save({"x": torch.ones(3)}, path)
    yield differences, "_states"
    compare_files(path, path)


FILES = {
    "write a history": write_history,
    "read a history": read_history,
    "read an archive": lambda path: read_checkpoint(path, torch_save, "_records"),
    "read a pickle": lambda path: read_checkpoint(path, pickles._Machine, "step"),
    "compare two checkpoints": compare_checkpoints,
}


@pytest.mark.parametrize("use", FILES)
def test_keyboard_interrupt_propagates_from_files(monkeypatch, tmp_path, use):
    """Each case prepares a file, yields the function to interrupt, and then calls it."""
    path = tmp_path / "file"
    case = FILES[use](path)
    owner, attribute = next(case)
    before = path.read_bytes()
    monkeypatch.setattr(owner, attribute, lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        next(case)
    assert path.read_bytes() == before
