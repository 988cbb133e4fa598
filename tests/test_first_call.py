"""A signal handler or a fork may meet a process's first call at any moment."""

from __future__ import annotations

import os

import pytest

from tests.conftest import run_python

FIRST_CALLS = """
import itertools, os, signal, sys, threading, torch, paramstats
from paramstats._core import backend as backends

def call():
    tensors = torch.nn.Linear(3, 3)
    tensors.weight.grad = torch.ones(3, 3)
    assert paramstats.summarize(tensors)["weight"].grad.norm == 3.0

def interrupted(event, interrupt):
    '''Make first calls, and interrupt each one at a later event, until one has no more of them.'''
    for wanted in itertools.count():
        remaining = itertools.count(wanted, -1)
        backends._active = None
        def trace(frame, found, argument):
            if "paramstats" not in frame.f_code.co_filename:
                return None
            frame.f_trace_opcodes = event == "opcode"
            if found == event and next(remaining) == 0:
                interrupt()
            return trace
        sys.settrace(trace)
        call()
        sys.settrace(None)
        if next(remaining) >= 0:
            return wanted

def fork():
    child = os.fork()
    if child == 0:
        sys.settrace(None)
        signal.alarm(20)
        try:
            call()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def fork_from_a_thread():
    failures = []
    threading.excepthook = failures.append
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    assert not failures, failures

if sys.argv[1] == "handler":
    events = interrupted("opcode", call)
else:
    events = interrupted("line", fork_from_a_thread)
assert events > 100, events
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("interruption", ["handler", "fork"])
def test_a_first_call_may_be_interrupted_by_another(interruption):
    """The call of the handler, or of the child that another thread forks, is the first one, too."""
    result = run_python("-c", FIRST_CALLS, interruption, PYTHONWARNINGS="ignore")
    assert result.returncode == 0, result.stderr
