"""Read CUDA tensors with the kernels of `paramstats._native`, on torch's streams and memory.

A call reads the tensors on the CPU, then enqueues its reads on each device's current stream, and
does not wait. The kernels write the states to pinned memory. A `Transfer` copies them from there
once an event has happened.

Memory: torch's allocators reuse freed device memory in stream order. This also makes it safe to
free the tensors at once, if they were allocated on the stream that reads them (torch's operators
have the same rule). If that stream is not the default stream, on which the model was most likely
allocated, the tensors are recorded on it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from paramstats._core.torch_private import without_modes

T = TypeVar("T")

_ALL_DEVICES = (1 << 64) - 1
"""The indices of devices, as bits."""

_unfinished: deque[PinnedMemory] = deque()
"""Memory that the kernels may still write to. It must not be freed with its Transfer: torch does
not know about the kernels and would give it to the next user at once. Memory whose event fails,
after a device error, stays here."""


class PinnedMemory:
    """Host memory that work on a stream writes to. It is kept until that work is done.

    There is no destructor: it could run in any thread, during a graph capture and after a device
    error. Instead, later calls drop the memory.

    Args:
        size: bytes.
        native: the module `paramstats._native`, if its kernels write to the memory. None: torch
            operators do, whose memory torch itself keeps.
    """

    def __init__(self, size: int, native: Any = None) -> None:
        if native is not None:
            _drop_finished()
        self.tensor = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        self.address = self.tensor.data_ptr()
        self._native = native
        self._event: torch.cuda.Event | None = None
        if native is not None:
            _unfinished.append(self)

    def record(self, stream: torch.Stream) -> None:
        """Must be called once all work that writes to the memory was enqueued on `stream`."""
        event = torch.cuda.Event()
        event.record(stream)
        self._event = event

    def ready(self) -> bool:
        """Return whether the work is done; False if `record` was not called."""
        return self._event is not None and self._allow_capture(self._event.query)

    def wait(self) -> None:
        """Wait for the work, after `record` was called."""
        assert self._event is not None
        self._allow_capture(self._event.synchronize)
        with contextlib.suppress(ValueError):  # it is not in there any more
            _unfinished.remove(self)

    def _allow_capture(self, query: Callable[[], T]) -> T:
        """Return `query()`, which may run while a stream is being captured into a graph.

        By default, CUDA treats a query of an event as an error that invalidates the capture.
        """
        if self._native is None:
            return query()
        before = self._native.exchange_capture_mode(self._native.RELAXED_CAPTURE)
        try:
            return query()
        finally:
            self._native.exchange_capture_mode(before)


def _drop_finished() -> None:
    """Look at two of the memories, so that there are never many, at little cost per call."""
    for _ in range(2):
        with contextlib.suppress(IndexError, ValueError, RuntimeError):
            oldest = _unfinished[0]
            _unfinished.rotate(-1)
            if oldest.ready():
                _unfinished.remove(oldest)


class Transfer:
    """The states of one device's tensors, which may still be being computed.

    Args:
        memory: contains the states first, in the order of the group.
        group: a `CudaGroup` of `paramstats._native`, which has the rows of the states.
    """

    def __init__(self, memory: PinnedMemory, group: Any) -> None:
        self._memory = memory
        self._group = group

    def ready(self) -> bool:
        return self._memory.ready()

    def write(self, table: bytearray) -> None:
        self._memory.wait()
        self._group.write(table, self._memory.address)


Rows = tuple[bytes, Sequence[tuple[int, torch.Tensor]], Sequence[Transfer]]
"""A table, the rows that torch operators must read, and the transfers that complete the table."""


class CudaBackend:
    """Starts the reads of CUDA tensors.

    Args:
        native: the module `paramstats._native`.
        driver: the library of CUDA's driver.
    """

    def __init__(self, native: Any, driver: str = "libcuda.so.1") -> None:
        self._native = native
        self._driver = driver
        self._errors: dict[int, str] = {}
        self._usable = _ALL_DEVICES

    def error(self, device: int) -> str:
        """Return why the kernels cannot run on a device, or "" if they can."""
        if device not in self._errors:
            self._errors[device] = error = self._load(device)
            if error:
                self._usable &= ~(1 << device)
        return self._errors[device]

    def _load(self, device: int) -> str:
        return self._native.cuda_open(self._driver) or self._native.cuda_load(device, b"")

    def read(self, tensors: list[torch.Tensor], params: bool, grads: bool) -> Rows:
        """Read tensors on the CPU and start the reads on CUDA devices.

        Raises:
            RuntimeError: a stream that would be used is being captured into a CUDA graph, or CUDA
                reports an error. A capture stays valid, and no device has done any work.
        """
        table, deferred_rows, groups = self._native.read(tensors, params, grads, self._usable)
        if not groups:
            return table, deferred_rows, ()
        return self._start(tensors, params, grads, table, deferred_rows, groups)

    @without_modes()
    def _start(
        self,
        tensors: list[torch.Tensor],
        params: bool,
        grads: bool,
        table: bytes,
        deferred_rows: Sequence[tuple[int, torch.Tensor]],
        groups: Sequence[Any],
    ) -> Rows:
        devices, hold = self._usable, False
        while groups:
            refuse_capture(group.device for group in groups)
            unusable = [group.device for group in groups if self.error(group.device)]
            if not unusable:
                transfers = [self._enqueue(group) for group in groups]
                if not any(group.replaced for group in groups):
                    return table, deferred_rows, tuple(transfers)
                hold = True  # another thread has replaced a tensor
            for device in unusable:
                devices &= ~(1 << device)
            table, deferred_rows, groups = self._native.read(tensors, params, grads, devices, hold)
        return table, deferred_rows, ()

    def _enqueue(self, group: Any) -> Transfer:
        device = torch.device("cuda", group.device)
        stream = torch.cuda.current_stream(device)
        if stream.cuda_stream:  # not the default stream
            for tensor in group.aliases():
                tensor.record_stream(stream)
        host_bytes, device_bytes = group.sizes()
        # Freed at the end of this function: torch's allocator reuses it in stream order.
        workspace = torch.empty(device_bytes, dtype=torch.uint8, device=device)
        memory = PinnedMemory(host_bytes, self._native)
        error = group.enqueue(memory.address, workspace.data_ptr(), stream.cuda_stream)
        if error:
            raise RuntimeError(f"paramstats.summarize: {device} reports {error}")
        memory.record(stream)
        return Transfer(memory, group)


def refuse_capture(devices: Iterable[int]) -> None:
    """Raise RuntimeError if a device's current stream is being captured into a CUDA graph.

    The capture stays valid.
    """
    for device in devices:
        with torch.cuda.device(device):
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            raise RuntimeError(
                "paramstats.summarize: expected no CUDA graph capture under way, got a stream that "
                f"is being captured on cuda:{device}; call it before the capture or between replays"
            )
