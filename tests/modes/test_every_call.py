"""Every public function gives the same result under any mode of torch, and changes no mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

import paramstats
from tests import oracle
from tests.modes.calls import CALLS, FAILING, READING, plain_tensors
from tests.modes.conditions import CONDITIONS, FEW, settings

_expected: dict[tuple[str, str], Any] = {}


def comparable(result: Any) -> Any:
    """Return a result as something that `==` compares, with NaN equal to NaN."""
    if isinstance(result, paramstats.Summary):
        return result._identity(), dict(result.skipped), dict(result.diverged)
    if isinstance(result, dict):
        return {name: comparable(value) for name, value in result.items()}
    if isinstance(result, (list, tuple)):
        return [comparable(value) for value in result]
    if dataclasses.is_dataclass(result):
        return [comparable(value) for value in vars(result).values()]
    if isinstance(result, float):
        return np.float64(result).tobytes()
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("modes")


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def check_settings(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return `call` as a function that fails if a setting of torch is another one afterwards."""

    def checked() -> Any:
        before = settings()
        try:
            return call()
        finally:
            assert settings() == before

    return checked


def conditions_of(call: str) -> Iterable[str]:
    if call == "plot":  # it takes a tenth of a second
        return FEW[:2]
    return CONDITIONS if call in READING else FEW


@pytest.mark.parametrize(
    ("call", "condition"), [(call, name) for call in CALLS for name in conditions_of(call)]
)
def test_a_mode_changes_no_result(backend, folder, call, condition):
    key = backend.name, call
    if key not in _expected:
        _expected[key] = comparable(CALLS[call](folder)())
    prepared = check_settings(CALLS[call](folder))
    result = check_settings(lambda: CONDITIONS[condition](prepared))()
    assert comparable(result) == _expected[key]


@pytest.mark.parametrize("condition", FEW)
@pytest.mark.parametrize("call", FAILING)
def test_a_mode_changes_no_error(backend, folder, call, condition):
    prepare, error, message = FAILING[call]
    prepared = check_settings(prepare(folder))

    def fails() -> None:
        with pytest.raises(error, match=message):
            prepared()

    check_settings(lambda: CONDITIONS[condition](fails))()


@pytest.mark.parametrize("call", [name for name in CALLS if "shards" in name or "DTensor" in name])
def test_tensors_that_are_kept_in_a_mode_are_used_outside(backend, folder, call):
    prepared = CALLS[call](folder)
    inside = CONDITIONS["dispatch mode and others"](prepared)
    assert comparable(prepared()) == comparable(inside)


@pytest.mark.parametrize(
    "call", [name for name in CALLS if name.startswith("summarize") and "scaler" not in name]
)
def test_results_outside_of_modes_are_right(backend, folder, call):
    summary = CALLS[call](folder)()
    tensors = plain_tensors()
    for name in set(tensors) & set(summary) - {"odd"}:
        oracle.check(summary[name], tensors[name])
