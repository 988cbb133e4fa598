"""Options and fixtures of the benchmarks: device, threads, backend, and what times a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import paramstats
from benches import checks, hardware, models, timing
from benches.contestants import Contestant
from benches.read_only import NoCompilerError, ReadOnly, checksum
from tests.fake_device import scaled

_TIMING = {"max_time": scaled(300) / 1e3, "min_rounds": scaled(3), "min_time": 1e-4}
"""Seconds of a timing, and of a round: short calls are timed several at once."""

_COMPILE_SECONDS = {"cpu": 60.0, "cuda": 15.0}

Measure = Callable[..., None]

_wrong: dict[str, dict[str, str]] = {}
"""What is wrong, by case and contestant."""


@dataclass(frozen=True)
class Case:
    """A model and its correct statistics."""

    name: str
    model: nn.Module
    expected: checks.Expected
    title: str
    repeats: int = 1
    """How often the model's tensor repeats the one of `expected`."""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return models.tensors(self.model)

    @property
    def about(self) -> dict[str, Any]:
        """What benches.report needs to know."""
        nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
        return {"title": self.title, "tensors": len(self.tensors), "bytes": nbytes}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device of the benchmarks' tensors"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: needs several GiB of memory")
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"  # print the reason when a contestant is skipped


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(**_TIMING))


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"device: {_device(config)}", *str(paramstats.backend()).splitlines()]


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Add the hardware and versions that benches.report needs."""
    machine_info["benches"] = hardware.describe(_device(config))


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Add the contestants with wrong results, by case: these are not timed."""
    output_json["wrong"] = _wrong


def _device(config: pytest.Config) -> str:
    return str(config.getoption("--device", default="cpu"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    wanted = torch.device(_device(request.config))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no CUDA device")
    if wanted.type == "cuda":
        timing.start_cuda()
    return wanted


@pytest.fixture
def use_backend(device: torch.device) -> Iterator[Callable[[str], None]]:
    """Return a function that selects a backend until the test ends, or skips the test."""
    with ExitStack() as stack:

        def use(name: str) -> None:
            try:
                stack.enter_context(timing.use_backend(name))
            except RuntimeError as missing:
                pytest.skip(str(missing))
            if device.type == "cuda" and paramstats.backend().cuda != name:
                pytest.skip(f"the backend of CUDA tensors is {paramstats.backend().cuda}")

        yield use


@pytest.fixture(params=(1, 2), ids="{}_threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set the number of torch's threads, which paramstats uses too, until the test ends."""
    if request.param > hardware.cores():
        pytest.skip(f"{request.param} threads on {hardware.cores()} core")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def measure(benchmark: Any, device: torch.device) -> Measure:
    """`measure(call, case, contestant, **about)` times `call` and stores `about` in the JSON.

    On CUDA the timing of each call includes waiting for the GPU. If `queue` is given, a function
    that queues work without waiting, its GPU time is measured, too.
    """

    def measure(
        call: Callable[[], Any],
        case: str,
        contestant: str,
        queue: Callable[[], Any] | None = None,
        **about: Any,
    ) -> None:
        def call_and_wait() -> None:
            call()
            torch.cuda.synchronize(device)

        benchmark.group = case
        benchmark.extra_info.update(
            case=case, contestant=contestant, threads=torch.get_num_threads(), **about
        )
        free = hardware.FreeShare()
        benchmark(call_and_wait if device.type == "cuda" else call)
        benchmark.extra_info["free"] = free()
        if queue is not None and device.type == "cuda":
            benchmark.extra_info["device_s"] = timing.device_seconds(queue)

    return measure


@pytest.fixture
def compete(
    measure: Measure, use_backend: Callable[[str], None], device: torch.device
) -> Callable[[Case, Contestant], None]:
    """`compete(case, contestant)` checks the contestant's result and times its call."""

    def compete(case: Case, contestant: Contestant) -> None:
        reason = contestant.why_not(case.tensors)
        if reason is None and contestant.compiles:
            seconds = _COMPILE_SECONDS[device.type]
            reason = timing.why_not_compiled(contestant.call(case.model), seconds)
        if reason is not None:
            pytest.skip(reason)
        if contestant.backend is not None:
            use_backend(contestant.backend)
        try:
            call = checks.checked_call(contestant, case.model, case.expected, case.repeats)
        except (RuntimeError, TypeError) as error:
            if contestant.backend is not None:
                raise
            pytest.skip(f"torch has no such operator: {str(error).splitlines()[0]}")
        except AssertionError as error:
            if contestant.backend is not None:
                raise
            _wrong.setdefault(case.name, {})[contestant.name] = str(error)
            pytest.skip(f"wrong result: {error}")
        queue = partial(contestant.queue, case.model) if contestant.queue else None
        measure(call, case.name, contestant.name, queue, **case.about)

    return compete


@pytest.fixture
def time_the_limit(measure: Measure, device: torch.device) -> Callable[[Case], None]:
    """`time_the_limit(case)` times a CPU's memory limit: a loop that only reads the same bytes."""

    def time_the_limit(case: Case) -> None:
        if device.type != "cpu":
            pytest.skip("the read-only loop runs on the CPU")
        tensors = list(case.tensors.values())
        try:
            read_only = ReadOnly(tensors, torch.get_num_threads())
        except NoCompilerError as missing:
            pytest.skip(str(missing))
        assert read_only() == checksum(tensors)
        measure(read_only, case.name, "read_only", **case.about)

    return time_the_limit
