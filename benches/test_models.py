"""Benchmarks of whole models: every contestant is checked, then timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import paramstats
from benches import checks, models, timing
from benches.conftest import Measure
from benches.contestants import CONTESTANTS, Contestant
from benches.read_only import NoCompilerError, ReadOnly, checksum

_COMPILE_SECONDS = {"cpu": 60.0, "cuda": 15.0}


@dataclass(frozen=True)
class Case:
    """A model and its correct statistics."""

    name: str
    model: nn.Module
    tensors: dict[str, torch.Tensor]
    expected: dict[str, paramstats.TensorStats]
    about: dict[str, Any]


@pytest.fixture(scope="module", params=models.MODELS, ids=lambda model: model.name)
def case(request: pytest.FixtureRequest, device: torch.device) -> Case:
    model: models.Model = request.param
    if model.device not in (None, device.type):
        pytest.skip(f"this case is for {model.device}")
    built = models.build(model, device)
    tensors = models.tensors(built)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    about = {"title": model.title, "tensors": len(tensors), "bytes": nbytes}
    return Case(model.name, built, tensors, checks.expected(tensors), about)


@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda contestant: contestant.name)
def test_model(
    case: Case,
    contestant: Contestant,
    measure: Measure,
    use_backend: Callable[[str], None],
    device: torch.device,
) -> None:
    reason = contestant.why_not(case.tensors)
    if reason is None and contestant.compiles:
        seconds = _COMPILE_SECONDS[device.type]
        reason = timing.why_not_compiled(lambda: contestant.run(case.model), seconds)
    if reason is not None:
        pytest.skip(reason)
    if contestant.backend is not None:
        use_backend(contestant.backend)
    try:
        result = contestant.run(case.model)
    except (RuntimeError, TypeError) as error:
        if contestant.backend is not None:
            raise
        pytest.skip(f"torch has no such operator: {str(error).splitlines()[0]}")
    checks.check(contestant.statistics(result), case.expected, contestant.tolerance)
    queue = partial(contestant.queue, case.model) if contestant.queue else None
    measure(
        lambda: contestant.run(case.model),
        case.name,
        contestant.name,
        queue,
        **case.about,
    )


def test_read_only(case: Case, measure: Measure, device: torch.device) -> None:
    """A CPU's memory limit: a loop that only reads the same bytes."""
    if device.type != "cpu":
        pytest.skip("the read-only loop runs on the CPU")
    tensors = list(case.tensors.values())
    try:
        read_only = ReadOnly(tensors, torch.get_num_threads())
    except NoCompilerError as missing:
        pytest.skip(str(missing))
    assert read_only() == checksum(tensors)
    measure(read_only, case.name, "read_only", **case.about)


def test_copy(case: Case, measure: Measure, device: torch.device) -> None:
    """A GPU's memory limit: a copy of the same number of bytes."""
    if device.type != "cuda":
        pytest.skip("the memory limit of a CPU is the read-only loop")
    source = torch.ones(int(case.about["bytes"]), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy() -> object:
        return target.copy_(source)

    copy()
    assert torch.equal(source, target)
    measure(copy, case.name, "copy", copy, **case.about)
