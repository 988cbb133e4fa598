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

_SIZES = {"1_GiB": 1 << 30, "32_MB": 32_000_000}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TURNS = range(5, 21)
_TURN_SECONDS = 0.05
_NOISE = 1.1


@dataclass(frozen=True)
class Memory:
    """A tensor of normally distributed values, every page of it written."""

    name: str
    tensor: torch.Tensor
    expected: Exact
    about: dict[str, Any]


def _cases() -> Iterator[Any]:
    for size in _SIZES:
        marks = [pytest.mark.large] if size == "1_GiB" else []
        for dtype in _DTYPES:
            yield pytest.param((size, dtype), marks=marks, id=f"{size}_{dtype}")


@pytest.fixture(scope="module", params=_cases())
def memory(request: pytest.FixtureRequest, device: torch.device) -> Memory:
    if device.type != "cpu":
        pytest.skip("the read-only loop reads the CPU's memory")
    size, dtype = request.param
    torch.manual_seed(0)
    numel = _SIZES[size] // _DTYPES[dtype].itemsize
    tensor = torch.empty(numel, dtype=_DTYPES[dtype]).normal_()
    title = f"{size.replace('_', ' ')} of {dtype}"
    about = {"title": title, "tensors": 1, "bytes": _SIZES[size]}
    return Memory(f"{size}_{dtype}", tensor, exact(tensor), about)


@pytest.fixture
def name(memory: Memory, threads: int) -> str:
    return f"{memory.name}_{threads}_threads"


@pytest.fixture
def read_only(memory: Memory, threads: int) -> ReadOnly:
    try:
        loop = ReadOnly([memory.tensor], threads)
    except NoCompilerError as missing:
        pytest.skip(str(missing))
    assert loop() == checksum([memory.tensor])
    return loop


def test_paramstats(
    memory: Memory, name: str, measure: Measure, use_engine: Callable[[str], None]
) -> None:
    use_engine("native")
    source = {"x": memory.tensor}
    stats = paramstats.summarize(source)["x"]
    figures = {"x": (stats.mean, stats.std, stats.norm, stats.zero_fraction)}
    errors = worst_errors(figures, {"x": memory.expected}, PARAMSTATS)
    measure(lambda: paramstats.summarize(source), name, "paramstats", errors=errors, **memory.about)


def test_read_only(memory: Memory, name: str, read_only: ReadOnly, measure: Measure) -> None:
    measure(read_only, name, "read_only", **memory.about)


def test_torch_sum(memory: Memory, name: str, measure: Measure) -> None:
    """One figure by torch, of the same bytes as integers, which it adds up fastest."""
    words = memory.tensor.view(torch.int64)
    measure(words.sum, name, "torch_sum", **memory.about)


def test_read_only_is_a_limit(memory: Memory, threads: int, read_only: ReadOnly) -> None:
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
