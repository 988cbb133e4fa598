"""Benchmarks of whole models: every contestant is checked, then timed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benches import checks, models
from benches.conftest import Case, Measure
from benches.contestants import Contestant
from benches.libraries import MODEL_CONTESTANTS


@pytest.fixture(scope="module", params=models.MODELS, ids=lambda model: model.name)
def case(request: pytest.FixtureRequest, device: torch.device) -> Case:
    model: models.Model = request.param
    if model.device not in (None, device.type):
        pytest.skip(f"this case is for {model.device}")
    built = models.build(model, device)
    return Case(model.name, built, checks.expected(models.tensors(built)), model.title)


@pytest.mark.parametrize("contestant", MODEL_CONTESTANTS, ids=lambda contestant: contestant.name)
def test_model(
    case: Case, contestant: Contestant, compete: Callable[[Case, Contestant], None]
) -> None:
    compete(case, contestant)


def test_read_only(case: Case, time_the_limit: Callable[[Case], None]) -> None:
    time_the_limit(case)


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
