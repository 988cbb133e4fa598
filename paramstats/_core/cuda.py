"""Read CUDA tensors with the kernels of `paramstats._cuda`, on torch's streams and memory.

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
        kernels: the module `paramstats._cuda`, if it writes to the memory. None: torch operators
            do, whose memory torch itself keeps.
    """

    def __init__(self, size: int, kernels: Any = None) -> None:
        if kernels is not None:
            _drop_finished()
        self.tensor = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        self.address = self.tensor.data_ptr()
        self._kernels = kernels
        self._event: torch.cuda.Event | None = None
        if kernels is not None:
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
        if self._kernels is None:
            return query()
        before = self._kernels.exchange_capture_mode(self._kernels.RELAXED_CAPTURE)
        try:
            return query()
        finally:
            self._kernels.exchange_capture_mode(before)


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
        memory: contains the states first, in the order of `rows`.
        rows: the row of each state in the table, as int64.
        kernels: the module `paramstats._cuda`.
    """

    def __init__(self, memory: PinnedMemory, rows: bytes, kernels: Any) -> None:
        self._memory = memory
        self._rows = rows
        self._kernels = kernels

    def ready(self) -> bool:
        return self._memory.ready()

    def write(self, table: bytearray) -> None:
        self._memory.wait()
        self._kernels.write_rows(table, self._rows, self._memory.address)


class CudaBackend:
    """Starts the reads of CUDA tensors.

    Args:
        native: the module `paramstats._native`, which finds the tensors.
        kernels: the module `paramstats._cuda`.

    Raises ImportError if the modules do not belong together.
    """

    def __init__(self, native: Any, kernels: Any) -> None:
        if native.CUDA_VIEW_BYTES != kernels.VIEW_BYTES:
            raise ImportError(
                f"it describes a tensor with {kernels.VIEW_BYTES} bytes and paramstats._native "
                f"with {native.CUDA_VIEW_BYTES}: they were built from different sources"
            )
        self._native = native
        self._kernels = kernels
        self._errors: dict[int, str] = {}

    def error(self, device: int) -> str:
        """Return why the kernels cannot run on a device, or "" if they can."""
        if device not in self._errors:
            with torch.cuda.device(device):
                self._errors[device] = self._kernels.check()
        return self._errors[device]

    def read(
        self, tensors: list[torch.Tensor], params: bool, grads: bool
    ) -> tuple[bytes, Sequence[tuple[int, torch.Tensor]], Sequence[Transfer]]:
        """Read tensors on the CPU and start the reads on CUDA devices.

        Returns:
            A table, the rows that torch operators must read with their tensors, and the transfers
            that complete the table.

        Raises:
            RuntimeError: a stream that would be used is being captured into a CUDA graph, or CUDA
                reports an error. A capture stays valid, and no device has done any work.
        """
        table, deferred_rows, groups = self._native.read(tensors, params, grads, True)
        if not groups:
            return table, deferred_rows, ()
        return table, *self._start(groups, deferred_rows)

    @without_modes()
    def _start(
        self, groups: Sequence[Any], deferred_rows: Sequence[tuple[int, torch.Tensor]]
    ) -> tuple[Sequence[tuple[int, torch.Tensor]], Sequence[Transfer]]:
        refuse_capture(group.device for group in groups)
        transfers = []
        for group in groups:
            if self.error(group.device):
                rows = memoryview(group.rows).cast("q")
                deferred_rows = [*deferred_rows, *zip(rows, group.tensors(), strict=True)]
            else:
                transfers.append(self._enqueue(group))
        return deferred_rows, tuple(transfers)

    def _enqueue(self, group: Any) -> Transfer:
        with torch.cuda.device(group.device):
            stream = torch.cuda.current_stream()
            if stream.cuda_stream:  # not the default stream
                for tensor in group.tensors():
                    tensor.record_stream(stream)
            views = group.views
            host_bytes, device_bytes = self._kernels.sizes(views)
            # Freed at the end of this function: torch's allocator reuses it in stream order.
            workspace = torch.empty(device_bytes, dtype=torch.uint8, device="cuda")
            memory = PinnedMemory(host_bytes, self._kernels)
            error = self._kernels.enqueue(
                views, memory.address, workspace.data_ptr(), stream.cuda_stream
            )
            if error:
                raise RuntimeError(
                    f"paramstats.summarize: the CUDA runtime reports {error!r} on "
                    f"cuda:{group.device}"
                )
            memory.record(stream)
        return Transfer(memory, group.rows, self._kernels)


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
