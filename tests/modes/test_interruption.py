"""Ctrl-C while modes are hidden or restored leaves them as they were."""

from __future__ import annotations

import itertools
import sys
from contextlib import ExitStack

import torch

import paramstats
from paramstats._core import torch_private
from tests.modes.conditions import (
    OTHERS,
    RecordingDispatchMode,
    RecordingFunctionMode,
    settings,
)

TENSORS = {"complex": torch.ones(3, dtype=torch.cfloat)}


def is_interrupted(line: int) -> bool:
    """Call summarize, with Ctrl-C before the n-th line that torch_private.py runs, if there is one.

    Lines of `__exit__` do not count: Python has no protection at the beginning of a function.
    """
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename != torch_private.__file__:
            return None
        if event == "line" and frame.f_code.co_name != "__exit__":
            lines += 1
            if lines == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        paramstats.summarize(TENSORS)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_ctrl_c_leaves_modes_as_they_are(native):
    with ExitStack() as stack:
        for mode in (RecordingFunctionMode(), RecordingDispatchMode()):
            stack.enter_context(mode)
        for other in OTHERS:
            stack.enter_context(other())
        before = settings()
        for line in itertools.count(1):
            if not is_interrupted(line):
                break
            assert settings() == before, line
    assert line > 50
