"""Benchmarks of one tensor in memory or in cache: paramstats against a loop that only reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import paramstats
from benches import checks
from benches.conftest import Measure
from benches.contestants import PARAMSTATS, from_summary
from benches.models import filled
from benches.read_only import NoCompilerError, ReadOnly, checksum
from paramstats._core.backend import active

_SIZES = {
    "32_KB": 32_000,
    "1_MB": 1_000_000,
    "16_MB": 16_000_000,
    "32_MB": 32_000_000,
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

_BLOCK_BYTES = (1_000_000, 1 << 20)
"""A larger tensor repeats a block of one of these sizes, which the oracle can check quickly."""


@dataclass(frozen=True)
class Case:
    """A tensor, which repeats a block `repeats` times, and the correct statistics of the block."""

    name: str
    tensor: torch.Tensor
    repeats: int
    expected: dict[str, paramstats.TensorStats]
    about: dict[str, Any]
    simd: str | None = None
    """The SIMD level of paramstats, if not the best one."""


def _case(size: str, dtype: str, simd: str | None = None) -> Any:
    marks = [pytest.mark.large] if size == "1_GiB" else []
    name = "_".join(filter(None, (size, dtype, simd)))
    return pytest.param((name, size, dtype, simd), marks=marks, id=name)


_CASES = (
    *(_case("1_GiB", dtype) for dtype in ("float32", "bfloat16", "float64")),
    _case("1_GiB", "float32", "avx2"),
    *(_case(size, dtype) for size in ("32_MB", "16_MB", "1_MB", "32_KB") for dtype in _DTYPES),
)


@pytest.fixture(scope="module", params=_CASES)
def case(request: pytest.FixtureRequest, device: torch.device) -> Case:
    if device.type != "cpu":
        pytest.skip("the read-only loop runs on the CPU")
    name, size, dtype, simd = request.param
    nbytes = _SIZES[size]
    block_bytes = next((b for b in _BLOCK_BYTES if nbytes % b == 0), nbytes)
    block = filled(block_bytes // _DTYPES[dtype].itemsize, _DTYPES[dtype], device)
    repeats = nbytes // block_bytes
    title = f"{size.replace('_', ' ')} of {dtype}{f', {simd}' if simd else ''}"
    about = {"title": title, "tensors": 1, "bytes": nbytes}
    return Case(name, block.repeat(repeats), repeats, checks.expected({"x": block}), about, simd)


@pytest.fixture
def name(case: Case, threads: int) -> str:
    if threads > 1 and case.tensor.nbytes < _SHARED_FROM:
        pytest.skip("such a small tensor is read by one thread")
    return f"{case.name}_{threads}_threads"


@pytest.fixture
def read_only(case: Case, name: str, threads: int) -> ReadOnly:
    try:
        loop = ReadOnly([case.tensor], threads)
    except NoCompilerError as missing:
        pytest.skip(str(missing))
    assert loop() == checksum([case.tensor])
    return loop


@pytest.fixture
def native(case: Case, use_backend: Callable[[str], None]) -> Iterator[None]:
    """Select the native backend and the SIMD level of the case until the test ends."""
    use_backend("native")
    kernels = active().native
    best = kernels.simd_level()
    if case.simd is not None:
        if case.simd == best or case.simd not in kernels.simd_levels():
            pytest.skip(f"the SIMD level is {best} anyway")
        kernels.set_simd_level(case.simd)
    yield
    kernels.set_simd_level(best)


@pytest.mark.usefixtures("native")
def test_paramstats(case: Case, name: str, measure: Measure) -> None:
    source = {"x": case.tensor}
    mean, std, norm, zero_fraction = from_summary(paramstats.summarize(source))["x"]
    norm = norm and norm / math.sqrt(case.repeats)
    checks.check({"x": (mean, std, norm, zero_fraction)}, case.expected, PARAMSTATS)

    def call() -> object:
        return paramstats.summarize(source)

    measure(call, name, "paramstats", **case.about)


def test_read_only(case: Case, name: str, read_only: ReadOnly, measure: Measure) -> None:
    measure(read_only, name, "read_only", **case.about)


@pytest.mark.parametrize(
    "case", [_case("1_GiB", "float32"), _case("32_MB", "float32")], indirect=True
)
def test_torch_sum(case: Case, name: str, measure: Measure) -> None:
    """torch.sum of the same bytes as integers. The read-only loop must not be slower."""
    words = case.tensor.view(torch.int64)
    measure(words.sum, name, "torch_sum", **case.about)
