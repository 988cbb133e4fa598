"""Benchmarks of one tensor in memory or in cache, and of a loop that only reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from benches import checks, models
from benches.conftest import Case, Measure
from benches.contestants import Contestant
from benches.libraries import TENSOR_CONTESTANTS
from paramstats._core.backend import active

_SIZES = {
    "32_KB": 32_000,
    "1_MB": 1_000_000,
    "16_MB": 16_000_000,
    "1_GiB": 1 << 30,
}
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int8": torch.int8,
    "float64": torch.float64,
}
_SHARED_FROM = 1 << 20
"""Bytes from which several threads share a tensor."""

_SIMD = "avx2"
"""The SIMD level of one more case, if it is not the best one of this machine."""


def _param(size: str, dtype: str, simd: str | None = None) -> Any:
    marks = [pytest.mark.large] if size == "1_GiB" else []
    return pytest.param(
        (size, dtype, simd), marks=marks, id="_".join(filter(None, (size, dtype, simd)))
    )


_CASES = (
    *(_param("1_GiB", dtype) for dtype in ("float32", "bfloat16", "float64")),
    _param("1_GiB", "float32", _SIMD),
    *(_param(size, dtype) for size in ("16_MB", "1_MB", "32_KB") for dtype in _DTYPES),
)


@pytest.fixture(scope="module", params=_CASES)
def one_thread(request: pytest.FixtureRequest, device: torch.device) -> Case:
    if device.type != "cpu":
        pytest.skip("the read-only loop runs on the CPU")
    size, dtype, simd = request.param
    model, block, repeats = models.repeating(_SIZES[size], _DTYPES[dtype])
    name = "_".join(filter(None, request.param))
    title = f"{size.replace('_', ' ')} of {dtype}{f', {simd}' if simd else ''}"
    return Case(name, model, checks.expected(models.tensors(block)), title, repeats)


@pytest.fixture
def case(one_thread: Case, threads: int) -> Case:
    if threads > 1 and one_thread.about["bytes"] < _SHARED_FROM:
        pytest.skip("such a small tensor is read by one thread")
    return replace(one_thread, name=f"{one_thread.name}_{threads}_threads")


@pytest.fixture
def simd(case: Case, use_backend: Callable[[str], None]) -> Iterator[bool]:
    """Select the SIMD level of the case until the test ends; tell whether it is not the best."""
    if not case.title.endswith(_SIMD):
        yield False
        return
    use_backend("native")
    kernels = active().native
    best = kernels.simd_level()
    if best == _SIMD or _SIMD not in kernels.simd_levels():
        pytest.skip(f"the SIMD level is {best} anyway")
    kernels.set_simd_level(_SIMD)
    yield True
    kernels.set_simd_level(best)


@pytest.mark.parametrize("contestant", TENSOR_CONTESTANTS, ids=lambda contestant: contestant.name)
def test_tensor(
    case: Case, contestant: Contestant, simd: bool, compete: Callable[[Case, Contestant], None]
) -> None:
    if simd and contestant.backend is None:
        pytest.skip("only paramstats is measured with another SIMD level")
    compete(case, contestant)


def test_read_only(case: Case, simd: bool, time_the_limit: Callable[[Case], None]) -> None:
    time_the_limit(case)


@pytest.mark.parametrize(
    "one_thread", [_param("1_GiB", "float32"), _param("16_MB", "float32")], indirect=True
)
def test_torch_sum(case: Case, measure: Measure) -> None:
    """torch.sum of the same bytes as integers. The read-only loop must not be slower."""
    (tensor,) = case.tensors.values()
    measure(tensor.view(torch.int64).sum, case.name, "torch_sum", **case.about)
