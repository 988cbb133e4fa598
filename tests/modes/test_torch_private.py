"""Without a private name of torch that hides operators from modes, a call still works."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch

import paramstats
from tests.modes.conditions import RecordingDispatchMode, RecordingFunctionMode

PRIVATE = [
    "_C._get_tracing_state",
    "_C._set_tracing_state",
    "_C._len_torch_function_stack",
    "_C._get_function_stack_at",
    "_C._pop_torch_function_stack",
    "_C._len_torch_dispatch_stack",
    "_C._get_dispatch_stack_at",
    "_C._pop_torch_dispatch_stack",
    "_ops._len_torch_dispatch_stack_pre_dispatch",
    "utils._python_dispatch._disable_current_modes",
    "_functorch.pyfunctorch.temporarily_clear_interpreter_stack",
    "_C._is_any_autocast_enabled",
    "_C._DisableAutocast",
    "_C._functorch.peek_interpreter_stack",
    "_C._functorch.is_gradtrackingtensor",
    "_C._functorch.get_unwrapped",
    "_C._functorch.is_batchedtensor",
    "_C._functorch",
]


@pytest.mark.parametrize("change", ["removed", "other arguments"])
@pytest.mark.parametrize("name", PRIVATE)
def test_without_a_private_name_of_torch_a_call_still_works(backend, monkeypatch, name, change):
    tensors = {"x": torch.ones(3), "complex": torch.ones(3, dtype=torch.cfloat)}
    place, _, last = f"torch.{name}".rpartition(".")
    place = functools.reduce(getattr, place.split(".")[1:], torch)
    with RecordingFunctionMode(), RecordingDispatchMode(), monkeypatch.context() as patch:
        if change == "removed":
            patch.delattr(place, last)
        else:
            patch.setattr(place, last, lambda one, two, three: None)
        summary = paramstats.summarize(tensors)
    assert [entry.mean for entry in summary.values()] == [1.0, 1.0] and not summary.skipped


def test_without_all_private_names_of_torch_a_call_still_works():
    names = [*PRIVATE, "_C._dynamo.eval_frame.set_code_exec_strategy"]
    code = f"""
import torch, torch._dynamo  # it needs the private names itself
for name in {names}:
    exec(f"del torch.{{name}}")
import paramstats
from paramstats._core import backend as backends
tensors = {{"x": torch.ones(3), "complex": torch.ones(3, dtype=torch.cfloat)}}
for name in ("reference", {paramstats._core.backend.choose(None).name!r}):
    backends._active = backends.choose(name)
    summary = paramstats.summarize(tensors)
    assert [entry.mean for entry in summary.values()] == [1.0, 1.0] and not summary.skipped
"""
    subprocess.run([sys.executable, "-c", code], check=True)
