"""Options and fixtures of the benchmarks: the device, the threads, the backend, and how to time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import paramstats
from benches import compiling, hardware
from benches.device_time import device_seconds

_SECONDS = 0.8
"""That a contestant is timed for, about, after its warm-up, where the test does not say."""

_LEAST_ROUNDS = 3
_MOST_ROUNDS = 1000
_SLOW = 0.2
"""Seconds: one call says how long such a call takes; it and the check before were the warm-up."""

_LEAST_ROUND = 1e-4
"""Seconds: shorter calls are timed several at once, against the clock's own cost."""

Measure = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the benchmarks' tensors are"
    )
    parser.addoption(
        "--compile-seconds",
        type=float,
        default=compiling.MOST_SECONDS,
        help="after which torch.compile is given up (default: %(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: takes a GiB of memory for its tensors, and more")
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"  # why a contestant did not run belongs to the result


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"device: {_device(config)}", *str(paramstats.backend()).splitlines()]


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """For benches.report, which may run elsewhere."""
    machine_info["benches"] = hardware.describe(_device(config))


def _device(config: pytest.Config) -> str:
    return str(config.getoption("--device", default="cpu"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    wanted = torch.device(_device(request.config))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no CUDA device")
    if wanted.type == "cuda":
        torch.cuda.init()  # before paramstats is asked what it can do there
    return wanted


@pytest.fixture
def use_engine(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Callable[[str], None]:
    """Forces an backend of paramstats until the test is over; skips the test where it is missing,
    so that nothing runs under another's name."""

    def use(name: str) -> None:
        try:
            chosen = paramstats._core.backend.choose(name)
        except RuntimeError as missing:
            pytest.skip(str(missing))
        monkeypatch.setattr(paramstats._core.backend, "_active", chosen)
        if device.type == "cuda" and paramstats.backend().cuda != name:
            pytest.skip(f"CUDA tensors have the {paramstats.backend().cuda} backend")

    return use


@pytest.fixture
def compile_first(request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], None]:
    """Has a call compiled, or skips the test, saying why it cannot be."""
    seconds = float(request.config.getoption("--compile-seconds"))

    def compile_first(call: Callable[[], Any]) -> None:
        reason = compiling.why_not_compiled(call, seconds)
        if reason is not None:
            pytest.skip(reason)

    return compile_first


@pytest.fixture(params=(1, 2), ids="{}_threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Sets torch's threads, which are paramstats' too, until the test is over."""
    if request.param > hardware.cores():
        pytest.skip(f"{request.param} threads on {hardware.cores()} core")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def measure(benchmark: Any, device: torch.device) -> Measure:
    """`measure(call, case, contestant, **about)` times `call`; `about` goes to the report.

    On CUDA a call is over when the device is done. Of one that `queues`, the time by the device's
    own clock is told, too.
    """

    def timed_on(call: Callable[[], Any]) -> Callable[[], Any]:
        if device.type != "cuda":
            return call

        def call_and_wait() -> None:
            call()
            torch.cuda.synchronize(device)

        return call_and_wait

    def measure(
        call: Callable[[], Any],
        case: str,
        contestant: str,
        queues: bool = False,
        seconds: float = _SECONDS,
        **about: Any,
    ) -> None:
        timed = timed_on(call)
        one = _seconds_of(timed)
        iterations = max(1, round(_LEAST_ROUND / one))
        rounds = int(seconds / (one * iterations))
        rounds = min(max(rounds, _LEAST_ROUNDS), _MOST_ROUNDS)
        benchmark.group = case
        benchmark.extra_info.update(
            case=case, contestant=contestant, threads=torch.get_num_threads(), **about
        )
        free = hardware.FreeShare()
        benchmark.pedantic(timed, rounds=rounds, iterations=iterations, warmup_rounds=rounds // 10)
        benchmark.extra_info["free"] = free()
        if queues and device.type == "cuda":
            benchmark.extra_info["device_s"] = device_seconds(call)

    return measure


def _seconds_of(call: Callable[[], Any]) -> float:
    """The best of three calls, or the first where it is slow."""
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
        if best > _SLOW:
            break
    return best
