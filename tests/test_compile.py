"""Inside torch.compile: right statistics, a break where a call is, and nothing compiled twice."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

import paramstats


def read_nothing(summary):
    return None


def read_entry(summary):
    return summary["0.weight"].grad.norm


def read_total(summary):
    return summary.total.norm


def read_scalars(summary):
    return summary.scalars(stats=("norm",))["param_norm/total"]


@pytest.mark.parametrize(
    ("read", "breaks"), [(read_nothing, 1), (read_entry, 2), (read_total, 2), (read_scalars, 2)]
)
def test_in_a_compiled_step(backend, model, read, breaks):
    from torch._dynamo.utils import compilation_time_metrics, counters

    torch._dynamo.reset()
    counters.clear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile(backend="eager")
    def step(x):
        loss = model(x).square().mean()
        return 2 * loss, read(paramstats.summarize(model))

    compiled = []
    for _ in range(5):
        expected = read(paramstats.summarize(model))
        loss, statistic = step(torch.randn(4, 8))
        assert statistic == expected
        loss.backward()
        optimizer.step()
        compiled.append(len(compilation_time_metrics["_compile.compile_inner"]))
    assert compiled == compiled[:1] * 5
    assert sum(counters["graph_break"].values()) == breaks


def test_torch_compile_is_not_imported_for_nothing():
    code = "import sys, paramstats; print('torch._dynamo' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


@pytest.mark.parametrize("way", ["gone", "called otherwise"])
def test_without_the_mark_a_wrapper_does(monkeypatch, way):
    from paramstats._core.torch_private import skip_dynamo

    importlib.import_module("torch._dynamo")  # which wants the mark itself
    place, name = torch._C._dynamo.eval_frame, "set_code_exec_strategy"
    if way == "gone":
        monkeypatch.delattr(place, name)
    else:
        monkeypatch.setattr(place, name, lambda one, two, three: None)

    def function(x):
        return 2 * x

    wrapped = skip_dynamo(function)
    assert wrapped is not function and wrapped(3) == 6


def test_fullgraph_is_refused_with_the_reason(backend, model):
    torch._dynamo.reset()
    step = torch.compile(lambda: paramstats.summarize(model), fullgraph=True, backend="eager")
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"reads values .* outside of code with"
    ):
        step()
