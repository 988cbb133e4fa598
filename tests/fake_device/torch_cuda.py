"""Replaces the functions of `torch.cuda` by those of the fake device.

A build of torch without CUDA has the names, but not the functions in C++ behind them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from tests.fake_device import NAME, profiler

_MEMORY = 2 << 30
"""Bytes that the device reports. Tests that need more are skipped."""


def install(fake: Any) -> None:
    """Replace what this project uses of `torch.cuda`, for the rest of the process.

    Args:
        fake: the module of fake_device.cpp.
    """
    cuda: Any = torch.cuda

    def index_of(device: Any = None) -> int:
        if device is None:
            return int(fake.current_device())
        if isinstance(device, int):
            return device if device >= 0 else int(fake.current_device())
        index = torch.device(device).index
        return int(fake.current_device()) if index is None else index

    def exchange_device(index: int) -> int:
        before = int(fake.current_device())
        if index >= 0:
            fake.set_device(index)
        return before

    class Stream(torch.Stream):
        """A stream; `cuda_stream` is its handle in the fake driver."""

        def __new__(cls, device: Any = None, priority: int = 0, **ids: int) -> Stream:
            if ids:
                return super().__new__(cls, **ids)
            return super().__new__(cls, device=f"cuda:{index_of(device)}")

        @property
        def cuda_stream(self) -> int:
            return int(fake.handle(self.device_index, self.stream_id))

        def wait_stream(self, stream: Stream) -> None:
            time = fake.busy_until(stream.device_index, stream.stream_id)
            fake.wait_stream(self.device_index, self.stream_id, time)

        def synchronize(self) -> None:
            fake.synchronize(self.device_index, self.stream_id)

    def stream(device: int, number: int) -> Stream:
        cuda_type = 1  # c10::DeviceType::CUDA
        return Stream(stream_id=number, device_index=device, device_type=cuda_type)

    class Event:
        """An event: the time at which the work before it ends."""

        def __init__(self, enable_timing: bool = False, **unused: Any) -> None:
            self._time = 0

        def record(self, stream: Any = None) -> None:
            stream = stream or current_stream()
            fake.log("cudaEventRecord")
            self._time = fake.busy_until(stream.device_index, stream.stream_id)

        def query(self) -> bool:
            fake.raise_if_failed()
            fake.log("cudaEventQuery")
            if fake.now() < self._time:
                return False
            fake.run_all()
            return True

        def synchronize(self) -> None:
            fake.log("cudaEventSynchronize")
            fake.wait_until(self._time)

        def elapsed_time(self, end: Event) -> float:
            return (end._time - self._time) / 1e6

    def current_stream(device: Any = None) -> Stream:
        index = index_of(device)
        return stream(index, fake.current_stream(index))

    @contextlib.contextmanager
    def use_stream(stream: Any) -> Iterator[None]:
        if stream is None:
            yield
            return
        before = fake.current_stream(stream.device_index)
        device = exchange_device(stream.device_index)
        fake.set_stream(stream.device_index, stream.stream_id)
        try:
            yield
        finally:
            fake.set_stream(stream.device_index, before)
            fake.set_device(device)

    @contextlib.contextmanager
    def graph(graph: Any, **unused: Any) -> Iterator[None]:
        cuda.synchronize()
        with use_stream(Stream()):
            graph.begin()
            try:
                yield
            finally:
                graph.end()

    def synchronize(device: Any = None) -> None:
        fake.synchronize(index_of(device), -1)

    def set_sync_debug_mode(mode: Any) -> None:
        fake.set_sync_debug_mode({"default": 0, "warn": 1, "error": 2}.get(mode, mode))

    def properties(device: Any = None) -> Any:
        return SimpleNamespace(
            name=NAME, major=9, minor=0, total_memory=_MEMORY, multi_processor_count=132
        )

    replacements = {
        "_exchange_device": exchange_device,
        "_is_compiled": lambda: True,
        "_lazy_init": lambda: None,
        "_maybe_exchange_device": lambda index: exchange_device(index),
        "_sleep": fake.sleep,  # a clock of 1 GHz
        "CUDAGraph": fake.Graph,
        "Event": Event,
        "Stream": Stream,
        "current_device": fake.current_device,
        "current_stream": current_stream,
        "default_stream": lambda device=None: stream(index_of(device), 0),
        "device_count": lambda: fake.DEVICES,
        "empty_cache": fake.run_all,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: NAME,
        "get_device_properties": properties,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "graph": graph,
        "init": lambda: None,
        "is_available": lambda: True,
        "is_current_stream_capturing": fake.capturing,
        "is_initialized": lambda: True,
        "manual_seed_all": lambda seed: None,
        "mem_get_info": lambda device=None: (_MEMORY, _MEMORY),
        "set_device": lambda device: fake.set_device(index_of(device)),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "set_stream": lambda stream: fake.set_stream(stream.device_index, stream.stream_id),
        "set_sync_debug_mode": set_sync_debug_mode,
        "stream": use_stream,
        "synchronize": synchronize,
    }
    for name, replacement in replacements.items():
        setattr(cuda, name, replacement)
    torch.version.cuda = "13.0"  # type: ignore[assignment]
    torch._C._cuda_getDevice = fake.current_device
    torch._C._cuda_getCurrentRawStream = lambda device: current_stream(device).cuda_stream
    # Triton is missing: torch.compile still traces, but compiles nothing.
    torch.compile = functools.partial(torch.compile, backend="eager")  # type: ignore[assignment]
    profiler.install(fake)
