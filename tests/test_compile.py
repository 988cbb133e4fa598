"""Inside torch.compile: the statistics are right, with one graph break per call, compiled once."""

from __future__ import annotations

import importlib

import pytest
import torch

import paramstats
from paramstats._core.torch_private import REASON, skip_dynamo


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
def test_a_compiled_step_is_compiled_once(backend, model, read, breaks):
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


@pytest.mark.filterwarnings("error")
def test_statistics_of_an_argument_are_read_without_a_warning(backend, model):
    def scaled(x, summary):
        return x * summary.total.norm + summary["0.weight"].std

    torch._dynamo.reset()
    summary, x = paramstats.summarize(model), torch.ones(2)
    assert torch.equal(torch.compile(scaled, backend="eager")(x, summary), scaled(x, summary))


@pytest.mark.parametrize("change", ["removed", "other arguments"])
def test_without_the_private_function_skip_dynamo_wraps(monkeypatch, change):
    importlib.import_module("torch._dynamo")  # it needs the private function itself
    frames, name = torch._C._dynamo.eval_frame, "set_code_exec_strategy"
    if change == "removed":
        monkeypatch.delattr(frames, name)
    else:
        monkeypatch.setattr(frames, name, lambda one, two, three: None)

    def function(x):
        return 2 * x

    wrapped = skip_dynamo(function)
    assert wrapped is not function and wrapped(3) == 6


def test_fullgraph_is_an_error_with_the_reason(backend, model):
    torch._dynamo.reset()
    step = torch.compile(lambda: paramstats.summarize(model), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=REASON):
        step()
