"""One tensor in a GPU's memory or in its L2 cache: paramstats against a copy of the same bytes.

A copy reads and writes each byte, so that at its rate a read would take half of its time. The
others' statistics stay on the device; paramstats' time has its transfer in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import paramstats
from benches.conftest import Measure
from benches.contestants import compiled_four_of_each, four_of_each
from benches.exact import PARAMSTATS, TORCH, Exact, Statistics, Tolerances, exact, worst_errors

_GIB = 1 << 30
_PIECE = 1 << 26
"""Elements that are made at a time: for bytes, they are first four times as large."""

_CASES = (
    (2 * _GIB, torch.float32),
    (2 * _GIB, torch.bfloat16),
    (_GIB, torch.float8_e4m3fn),
    (_GIB, torch.int8),
    (32_000_000, torch.float32),
    (32_000_000, torch.bfloat16),
)


@dataclass(frozen=True)
class Memory:
    """A tensor of normally distributed values, integers of evenly distributed ones."""

    name: str
    tensor: torch.Tensor
    expected: Exact
    about: dict[str, Any]


@dataclass(frozen=True)
class OnDevice:
    """One way to the statistics of a tensor, which returns before the device is done."""

    name: str
    run: Callable[[torch.Tensor], Any]
    statistics: Callable[[Any], Statistics]
    tolerances: Tolerances
    backend: str | None = None
    compiles: bool = False


def _summary(tensor: torch.Tensor) -> paramstats.Summary:
    return paramstats.summarize({"x": tensor})


def _from_summary(summary: paramstats.Summary) -> Statistics:
    stats = summary["x"]
    return stats.mean, stats.std, stats.norm, stats.zero_fraction


def _from_row(rows: torch.Tensor) -> Statistics:
    mean, std, norm, zero_fraction = rows[0].tolist()
    return mean, std, norm, zero_fraction


CONTESTANTS = (
    OnDevice("paramstats", _summary, _from_summary, PARAMSTATS, "native"),
    OnDevice("paramstats_reference", _summary, _from_summary, PARAMSTATS, "reference"),
    OnDevice("batched_torch", lambda x: four_of_each([x]), _from_row, TORCH),
    OnDevice(
        "foreach_norm_only",
        lambda x: torch._foreach_norm([x])[0],
        lambda norm: (None, None, norm.item(), None),
        TORCH,
    ),
    OnDevice(
        "compiled_torch", lambda x: compiled_four_of_each()([x]), _from_row, TORCH, compiles=True
    ),
)


def _params() -> Iterator[Any]:
    for size, dtype in _CASES:
        marks = [pytest.mark.large] if size >= _GIB else []
        yield pytest.param((size, dtype), marks=marks, id=case_name(size, dtype))


def case_name(size: int, dtype: torch.dtype) -> str:
    amount = f"{size // _GIB}_GiB" if size >= _GIB else f"{size // 10**6}_MB"
    return f"{amount}_{str(dtype).removeprefix('torch.')}"


def filled(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random values, by way of a type that torch makes them in."""
    torch.manual_seed(0)
    tensor = torch.empty(numel, dtype=dtype, device=device)
    for piece in tensor.split(_PIECE):
        if dtype.is_floating_point:
            piece.copy_(torch.randn(piece.shape, device=device))
        else:
            piece.random_(-128, 128)
    return tensor


@pytest.fixture(scope="module", params=_params())
def memory(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Memory]:
    if device.type != "cuda":
        pytest.skip("a CPU's memory is test_memory_limit.py's")
    size, dtype = request.param
    name = case_name(size, dtype)
    free, _ = torch.cuda.mem_get_info(device)
    if free < 8 * size:  # the float8 tensor as float32, and a copy
        pytest.skip(f"{free / _GIB:.0f} GiB free on the device")
    tensor = filled(size // dtype.itemsize, dtype, device)
    title = name.replace("_", " ", 1).replace("_", " of ", 1)
    yield Memory(name, tensor, exact(tensor), {"title": title, "tensors": 1, "bytes": size})
    del tensor
    torch.cuda.empty_cache()


@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda contestant: contestant.name)
def test_one_tensor(
    memory: Memory,
    contestant: OnDevice,
    measure: Measure,
    use_engine: Callable[[str], None],
    compile_first: Callable[[Callable[[], Any]], None],
) -> None:
    if contestant.backend is not None:
        use_engine(contestant.backend)
    if contestant.compiles:
        compile_first(lambda: contestant.run(memory.tensor))
    try:
        result = contestant.run(memory.tensor)
    except (RuntimeError, TypeError) as error:
        if contestant.backend is not None:
            raise
        pytest.skip(f"torch has no such operator: {str(error).splitlines()[0]}")
    errors = worst_errors(
        {"x": contestant.statistics(result)}, {"x": memory.expected}, contestant.tolerances
    )
    measure(
        lambda: contestant.run(memory.tensor),
        memory.name,
        contestant.name,
        queues=True,
        errors=errors,
        **memory.about,
    )


def test_copy(memory: Memory, measure: Measure) -> None:
    target = torch.empty_like(memory.tensor)
    target.copy_(memory.tensor)
    assert torch.equal(target.view(torch.int64), memory.tensor.view(torch.int64))
    measure(lambda: target.copy_(memory.tensor), memory.name, "copy", queues=True, **memory.about)
