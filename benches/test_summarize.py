"""Whole models with gradients: every contestant is checked against float64, then timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import paramstats
from benches import models
from benches.conftest import Measure
from benches.contestants import CONTESTANTS, Contestant
from benches.exact import Exact, exact, worst_errors
from benches.read_only import NoCompilerError, ReadOnly, checksum

_MOST_COMPILED = 64
"""Tensors of a model that torch.compile makes a program for a CPU of in some ten seconds."""


@dataclass(frozen=True)
class Case:
    """A model that is built, and what is right for it."""

    name: str
    model: nn.Module
    tensors: dict[str, torch.Tensor]
    expected: dict[str, Exact]
    about: dict[str, str | int]


@pytest.fixture(scope="module", params=models.MODELS, ids=lambda model: model.name)
def case(request: pytest.FixtureRequest, device: torch.device) -> Case:
    model = models.build(request.param, device)
    tensors = models.tensors(model)
    return Case(
        request.param.name,
        model,
        tensors,
        {name: exact(tensor) for name, tensor in tensors.items()},
        {"title": request.param.title, "tensors": len(tensors), "bytes": models.size(tensors)},
    )


@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda contestant: contestant.name)
def test_model(
    case: Case,
    contestant: Contestant,
    measure: Measure,
    use_engine: Callable[[str], None],
    compile_first: Callable[[Callable[[], Any]], None],
    device: torch.device,
) -> None:
    reason = contestant.why_not(case.tensors)
    if reason is not None:
        pytest.skip(reason)
    if contestant.backend is not None:
        use_engine(contestant.backend)
    if contestant.compiles:
        if device.type == "cpu" and len(case.tensors) > _MOST_COMPILED:
            pytest.skip("compiling so many tensors for a CPU takes minutes")
        compile_first(lambda: contestant.run(case.model))
    statistics = contestant.statistics(contestant.run(case.model))
    errors = worst_errors(statistics, case.expected, contestant.tolerances)
    measure(
        lambda: contestant.run(case.model),
        case.name,
        contestant.name,
        contestant.queues,
        errors=errors,
        **case.about,
    )


def test_read_only(case: Case, measure: Measure, device: torch.device) -> None:
    """The memory limit: the same bytes, read and added up."""
    if device.type != "cpu":
        pytest.skip("the read-only loop reads the CPU's memory")
    tensors = list(case.tensors.values())
    try:
        read_only = ReadOnly(tensors, torch.get_num_threads())
    except NoCompilerError as missing:
        pytest.skip(str(missing))
    assert read_only() == checksum(tensors)
    measure(read_only, case.name, "read_only", **case.about)


def test_copy(case: Case, measure: Measure, device: torch.device) -> None:
    """A GPU's memory limit: the same number of bytes, copied from one place to another."""
    if device.type != "cuda":
        pytest.skip("a CPU's limit is the read-only loop")
    source = torch.ones(int(case.about["bytes"]), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    assert torch.equal(source, target)
    measure(lambda: target.copy_(source), case.name, "copy", queues=True, **case.about)


def test_nothing_is_remembered(case: Case) -> None:
    """A second call reads again: what is timed is no cache of results."""
    name, p = next(iter(case.model.named_parameters()))
    assert p.grad is not None
    before = paramstats.summarize(case.model)[name]
    first, first_grad = p.detach().view(-1)[0], p.grad.view(-1)[0]
    kept = first.clone(), first_grad.clone()
    first.fill_(100.0)
    first_grad.fill_(-100.0)
    after = paramstats.summarize(case.model)[name]
    first.copy_(kept[0])
    first_grad.copy_(kept[1])
    assert (before.max, after.max) == (case.tensors[name].max().item(), 100.0)
    assert before.grad is not None and after.grad is not None
    assert (before.grad.min, after.grad.min) == (p.grad.min().item(), -100.0)
