"""One tensor in memory or in cache: paramstats against a loop that only reads it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import paramstats
from benches import hardware
from benches.conftest import Measure
from benches.exact import PARAMSTATS, Exact, exact, worst_errors
from benches.read_only import NoCompilerError, ReadOnly, checksum

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
_OF_1_GIB = ("float32", "bfloat16", "float64")
_SHARED_FROM = 1 << 20
"""Bytes from which on threads share a tensor; below, one case stands for any number of them."""

_PIECE = 1 << 24
"""Elements that are made at a time: most types are made by way of float32."""

_SECONDS = 0.4
"""For each timing, half of a model's: there are many."""

_TURNS = range(5, 21)
_TURN_SECONDS = 0.05
_NOISE = 1.1


@dataclass(frozen=True)
class Memory:
    """A tensor of normally distributed values, integers of evenly distributed ones, every page of
    it written; and the SIMD level that reads it, where it is not the machine's best."""

    name: str
    tensor: torch.Tensor
    expected: Exact
    about: dict[str, Any]
    simd: str | None = None


def _case(size: str, dtype: str, simd: str | None = None) -> Any:
    marks = [pytest.mark.large] if size == "1_GiB" else []
    name = "_".join(filter(None, (size, dtype, simd)))
    return pytest.param((name, size, dtype, simd), marks=marks, id=name)


def _cases() -> Iterator[Any]:
    for dtype in _OF_1_GIB:
        yield _case("1_GiB", dtype)
    yield _case("1_GiB", "float32", "avx2")
    for size in ("32_MB", "16_MB", "1_MB", "32_KB"):
        for dtype in _DTYPES:
            yield _case(size, dtype)


of_plain_bytes = pytest.mark.parametrize(
    "memory", [_case(size, "float32") for size in ("1_GiB", "32_MB", "1_MB")], indirect=True
)
"""For what takes any type's memory for the same integers: once for each size. (In 32 KB torch's own
call takes most of the time.)"""


@pytest.fixture(scope="module", params=_cases())
def memory(request: pytest.FixtureRequest, device: torch.device) -> Memory:
    if device.type != "cpu":
        pytest.skip("the read-only loop reads the CPU's memory")
    name, size, dtype, simd = request.param
    tensor = _filled(_SIZES[size] // _DTYPES[dtype].itemsize, _DTYPES[dtype])
    title = f"{size.replace('_', ' ')} of {dtype}{f', {simd}' if simd else ''}"
    about = {"title": title, "tensors": 1, "bytes": _SIZES[size]}
    return Memory(name, tensor, exact(tensor), about, simd)


def _filled(numel: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    tensor = torch.empty(numel, dtype=dtype)
    for piece in tensor.split(_PIECE):
        if dtype.is_floating_point:
            piece.copy_(torch.randn(piece.shape))
        else:
            piece.random_(-128, 128)
    return tensor


@pytest.fixture
def name(memory: Memory, threads: int) -> str:
    if threads > 1 and memory.tensor.nbytes < _SHARED_FROM:
        pytest.skip("so little is read by one thread")
    return f"{memory.name}_{threads}_threads"


@pytest.fixture
def read_only(memory: Memory, name: str, threads: int) -> ReadOnly:
    try:
        loop = ReadOnly([memory.tensor], threads)
    except NoCompilerError as missing:
        pytest.skip(str(missing))
    assert loop() == checksum([memory.tensor])
    return loop


@pytest.fixture
def native(memory: Memory, use_engine: Callable[[str], None]) -> Iterator[None]:
    """The native backend, at the case's SIMD level until the test is over."""
    use_engine("native")
    kernels = paramstats._core.backend.active().native
    best = kernels.simd_level()
    if memory.simd is not None:
        if memory.simd == best or memory.simd not in kernels.simd_levels():
            pytest.skip(f"{best} is what runs here in any case")
        kernels.set_simd_level(memory.simd)
    yield
    kernels.set_simd_level(best)


@pytest.mark.usefixtures("native")
def test_paramstats(memory: Memory, name: str, measure: Measure) -> None:
    source = {"x": memory.tensor}
    stats = paramstats.summarize(source)["x"]
    statistics = {"x": (stats.mean, stats.std, stats.norm, stats.zero_fraction)}
    errors = worst_errors(statistics, {"x": memory.expected}, PARAMSTATS)
    measure(
        lambda: paramstats.summarize(source),
        name,
        "paramstats",
        errors=errors,
        seconds=_SECONDS,
        **memory.about,
    )


def test_read_only(memory: Memory, name: str, read_only: ReadOnly, measure: Measure) -> None:
    measure(read_only, name, "read_only", seconds=_SECONDS, **memory.about)


@of_plain_bytes
def test_torch_sum(memory: Memory, name: str, measure: Measure) -> None:
    """One statistic by torch, of the same bytes as integers, which it adds up fastest."""
    words = memory.tensor.view(torch.int64)
    measure(words.sum, name, "torch_sum", seconds=_SECONDS, **memory.about)


@of_plain_bytes
def test_read_only_is_a_limit(memory: Memory, read_only: ReadOnly) -> None:
    """It is no slower than torch.sum, by the best of calls in turn."""
    words = memory.tensor.view(torch.int64)
    read = total = float("inf")
    free = hardware.FreeShare()
    for turn in range(1, _TURNS.stop):
        read = min(read, _best(read_only))
        total = min(total, _best(words.sum))
        if turn >= _TURNS.start and read <= total * _NOISE:
            break
    share = free()
    if read > total * _NOISE and share is not None and share < hardware.LEAST_FREE:
        pytest.skip(f"others took {1 - share:.0%} of the processors meanwhile")
    assert read <= total * _NOISE, f"read-only loop {read * 1e3:.2f} ms, sum {total * 1e3:.2f} ms"


def _best(call: Callable[[], Any]) -> float:
    """Seconds of the best call of a turn. A turn is many calls: the threads of either wait awake
    for a while after one, and would be in the other's way."""
    best = float("inf")
    end = time.perf_counter() + _TURN_SECONDS
    while (begin := time.perf_counter()) < end:
        call()
        best = min(best, time.perf_counter() - begin)
    return best
