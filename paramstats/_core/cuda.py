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

from paramstats._core import images
from paramstats._core.details import Details, named
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
        self._native = native
        self._event: torch.cuda.Event | None = None
        if native is not None:
            _drop_finished()
        self.tensor = self._allow_capture(
            lambda: torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        )
        self.address = self.tensor.data_ptr()
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

    def _allow_capture(self, call: Callable[[], T]) -> T:
        """Return `call()`, which may run while a stream is being captured into a graph.

        By default, CUDA refuses a query of an event and an allocation of pinned memory, and
        invalidates the capture, even that of another thread.
        """
        if self._native is None:
            return call()
        before = self._native.exchange_capture_mode(self._native.RELAXED_CAPTURE)
        try:
            return call()
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

    def details(self) -> Details:
        """Return the details of the rows that have any, after `write`."""
        return named(self._group.details(self._memory.address))


Rows = tuple[bytes, Sequence[tuple[int, torch.Tensor]], Sequence[Transfer], Details]
"""A table, the rows that torch operators must read, the transfers that complete the table, and the
details of tensors on the CPU."""


class CudaBackend:
    """Starts the reads of CUDA tensors.

    Args:
        native: the module `paramstats._native`.
        driver: the library of CUDA's driver.
    """

    def __init__(self, native: Any, driver: str = "libcuda.so.1") -> None:
        self._native = native
        self._driver = driver
        self._reasons: dict[int, str] = {}
        self._origins: dict[int, str] = {}
        self._refused: dict[int, str] = {}
        """Why the driver did not load an image, by device."""
        self._usable = _ALL_DEVICES

    def reason(self, device: int, wait: bool = False) -> str:
        """Return why the kernels cannot run on a device, or "" if they can.

        While they are being compiled, the reason is an `images.NotYet`; with `wait`, this waits.
        """
        known = self._reasons.get(device)
        if known is None:
            known = self._load(device, wait)
            if not isinstance(known, images.NotYet):
                known = self._reasons.setdefault(device, known)  # another thread may be first
                if known:
                    self._usable &= ~(1 << device)
        return known

    def origin(self, device: int) -> str:
        """Return where the kernels on a device come from, or "" if none are loaded."""
        return self._origins.get(device, "")

    def _load(self, device: int, wait: bool) -> str:
        reason: str = self._native.cuda_open(self._driver)
        if reason:
            return reason
        capability = torch.cuda.get_device_capability(device)
        for _ in range(2):
            refused = self._refused.get(device)
            # What the driver refuses, NVRTC compiles again, perhaps until a later call.
            found = images.find(capability, wait, refused is None)
            if isinstance(found, images.NotYet):
                return found
            if isinstance(found, str):
                return "; ".join(filter(None, (refused, found)))
            reason = self._native.cuda_load(device, found.data)
            if not reason:
                self._origins[device] = found.origin
                return ""
            self._refused[device] = f"the kernels ({found.origin}) do not load: {reason}"
        return self._refused[device]

    def read(
        self,
        tensors: list[torch.Tensor],
        params: bool,
        grads: bool,
        wait: bool = False,
        updates: Sequence[tuple[Any, ...]] = (),
        details: bytes = b"",
    ) -> Rows:
        """Read tensors on the CPU and start the reads on CUDA devices.

        Args:
            tensors: the tensors.
            params: whether to read the tensors; only their sizes otherwise.
            grads: whether to read their gradients.
            wait: wait for kernels that are being compiled. Otherwise torch operators read their
                tensors meanwhile.
            updates: see `_core.updates.Update`; each has four more rows.
            details: what else to read, a byte per tensor; see `paramstats._native.read`.

        Raises:
            RuntimeError: a stream that would be used is being captured into a CUDA graph, or CUDA
                reports an error. A capture stays valid, and no device has done any work.
        """
        devices, hold, all_updates = self._usable, False, tuple(updates)
        while True:
            table, deferred_rows, groups, own_details = self._native.read(
                tensors, params, grads, devices, hold, all_updates, details
            )
            if not groups:
                return table, deferred_rows, (), own_details
            unusable = self._unusable(groups, wait)
            if unusable:
                devices &= ~unusable
                continue
            transfers = [self._enqueue(group) for group in groups]
            if not any(group.replaced for group in groups):
                return table, deferred_rows, transfers, own_details
            hold = True  # another thread has replaced a tensor: read again

    def _unusable(self, groups: Sequence[Any], wait: bool) -> int:
        """Return the devices, as bits, on which the kernels cannot run."""
        refuse_capture(group.device for group in groups)
        return sum(1 << group.device for group in groups if self.reason(group.device, wait))

    @without_modes()
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
        try:
            memory.record(stream)
        finally:
            if error:
                raise RuntimeError(f"paramstats.summarize: {device} reports {error}")
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
