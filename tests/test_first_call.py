"""The import and the first call of a process: at any moment, and under any mode of torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_python
from tests.modes.conditions import CONDITIONS

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


IMPORTS = """
import json, os, sys, traceback, warnings, torch
torch.set_num_threads(1)  # no threads that the children would lack
sys.path.append(sys.argv[1])  # the last one: paramstats is the one that is installed
from tests.modes.conditions import CONDITIONS

warnings.simplefilter("error", RuntimeWarning)
model = torch.nn.Linear(4, 2)
model.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 3.0**0.5]])
model.weight.grad = torch.full((2, 4), 3.0)
assert "paramstats" not in sys.modules

def call():
    import paramstats
    weight = paramstats.summarize(model)["weight"]
    return [weight.max, weight.zero_count, weight.grad.mean, weight.grad.std]

def compiled(call):
    results = []
    def function(x):
        y = x * 2
        results.append(call())
        return y + 1
    assert torch.compile(function, backend="eager")(torch.ones(3)).tolist() == [3.0] * 3
    return results[0]

def import_under(condition):
    values = condition(call)
    import paramstats
    backend = paramstats.backend()
    return [backend.cpu, backend.missing, *values]

outcomes = {}
for name, condition in {**CONDITIONS, "torch.compile": compiled}.items():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            outcome = import_under(condition)
        except BaseException:
            outcome = traceback.format_exc()
        os.write(write, json.dumps(outcome).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        outcomes[name] = json.loads(pipe.read() or '"crashed"')
    os.waitpid(child, 0)
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """What a new process found under each condition of tests/modes."""
    result = run_python("-c", IMPORTS, str(Path(__file__).parents[1]))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("condition", [*CONDITIONS, "torch.compile"])
def test_an_import_under_a_mode_connects_the_native_module(native, outcomes, condition):
    """What the import creates to compare the module with torch is not changed, nor seen."""
    assert outcomes[condition] == ["native", None, 7.0, 0, 3.0, 0.0]
