"""Read tensors with torch operators: the reference backend, and the fallback of the native one.

The native kernels cannot read every tensor: it may be sparse, complex, quantized, on another device
or of a subclass with its own operators. Those tensors are read here with either backend.

`exact` is the definition of the statistics. On a CPU, `quick` is tried first. On other devices, no
value is looked at before all states are computed, so that one transfer brings them to the CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from paramstats._core.cuda import PinnedMemory, refuse_capture
from paramstats._core.denormals import threads_with_denormals
from paramstats._core.elements import check_storage, elements, gradient, numel
from paramstats._core.forked import threads_that_exist
from paramstats._core.format import one_line_name
from paramstats._core.layout import is_lazy
from paramstats._core.moments import ABSENT, ROW, Moments, merge, unread
from paramstats._core.torch_private import without_modes

CHUNK = 1 << 17
"""Elements per chunk on a CPU, so that temporaries stay in its caches."""

_DEVICE_CHUNK = 1 << 24
"""Elements per chunk on an accelerator: fewer launches, at the cost of 128 MiB of float64."""

_MIN_SUM_OF_SQUARES = 2e-33
"""Below this, a sum of squares in float32 may have lost digits to underflow. Above it, a chunk's
rounding errors, of at most 2^-149 each, are less than 1e-7 of the sum."""

_MAX_DOT = 512
"""Elements up to which m2 is one dot product. It is faster than squares and their sum, but it adds
up all elements in sequence, which loses digits for longer tensors."""

_MIN_SPREAD = {torch.float32: 1e-4, torch.float64: 1e-12}
"""Ratio std / mean below which the rounding of the mean (6e-8, 1e-16) shows in the std."""

_FAR = 10
"""Ratio mean / std above which the rounding of the mean is corrected."""

_IN_FLOAT32 = frozenset({torch.float32, torch.bfloat16, torch.float16})
_NO_FLOAT64 = frozenset({"mps"})


# ---- states -------------------------------------------------------------------------------------


def exact(x: Tensor) -> Tensor:
    """Return the state of a flat real tensor, as a float64 row of `Moments` on its device."""
    x = x.to(torch.float64)
    finite = x.isfinite()
    n = finite.sum()
    values = x.where(finite, 0.0)
    low = x.where(finite, math.inf).amin()
    high = x.where(finite, -math.inf).amax()
    mean = values.sum() / n.clamp(min=1)
    # If the sum overflows, sum the elements divided by n. The mean of a constant is exact.
    mean = mean.where(mean.isfinite(), (values / n.clamp(min=1)).sum())
    mean = low.where(low == high, mean)
    deviations = (x - mean).where(finite, 0.0)
    shift = deviations.sum()
    m2 = deviations.square().sum()
    # Corrected two-pass algorithm: remove the error from rounding the mean, unless that overflows.
    correction = shift * (shift / n.clamp(min=1))
    m2 = (m2 - correction.where(correction.isfinite(), 0.0)).clamp(min=0.0)
    counts = ((x == 0).sum(), x.isnan().sum(), (x == math.inf).sum(), (x == -math.inf).sum())
    count = x.new_full((), x.numel())  # torch.tensor(...) would synchronize
    columns = (count, *counts, mean, m2, low, high)
    return torch.stack([c.to(torch.float64) for c in columns])


def quick(x: Tensor) -> Moments | None:
    """Return the state of a flat real tensor on a CPU, with as few operators as possible.

    Returns None where the precision or range of these operators does not suffice, or an element is
    not finite.
    """
    in_float32 = x.dtype in _IN_FLOAT32
    if x.dtype is not torch.float32:
        x = x.to(torch.float32 if in_float32 else torch.float64)
    n = x.numel()
    low, high = (bound.item() for bound in x.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    zeros = n - int(x.count_nonzero().item())
    if low == high:
        return Moments(n, zeros, 0, 0, 0, low, 0.0, low, high)
    mean = x.sum().item() / n
    d = x - mean
    m2 = d.dot(d).item() if n <= _MAX_DOT else d.square_().sum().item()
    if not math.isfinite(m2):
        return None
    if m2 < n * (_MIN_SPREAD[x.dtype] * mean) ** 2 or (in_float32 and m2 < _MIN_SUM_OF_SQUARES):
        return None
    if m2 < n * (mean / _FAR) ** 2:  # matters when parts are merged
        mean += (x - mean).sum().item() / n
    return Moments(n, zeros, 0, 0, 0, mean, m2, low, high)


def _complex(x: Tensor) -> Moments:
    """Return the state of complex numbers, whose std, norm and zero_fraction are torch's.

    Here, mean is the modulus of the mean, m2 the sum of squared distances from the mean, and min
    and max are those of the moduli.
    """
    x = x.to(torch.complex128)
    finite = x.isfinite()
    modulus = x.abs()
    nans = int((x.real.isnan() | x.imag.isnan()).sum())
    pos_infs = x.numel() - int(finite.sum()) - nans
    zeros = x.numel() - int(x.count_nonzero())
    values = x[finite]
    out = Moments(x.numel(), zeros, nans, pos_infs, 0)
    if values.numel() == 0:
        return out
    mean = values.mean()
    m2 = (values - mean).abs().square().sum().item()
    low, high = (bound.item() for bound in modulus[finite].aminmax())
    return out._replace(mean=mean.abs().item(), m2=m2, min=low, max=high)


def _in_memory_order(x: Tensor) -> Tensor:
    """Return the elements as a flat tensor in memory order; copies only if the tensor has gaps."""
    order = sorted(range(x.dim()), key=lambda d: x.stride(d), reverse=True)
    return x.permute(order).reshape(-1)


def _flat(x: Tensor) -> Tensor:
    return x.view(-1) if x.is_contiguous() else _in_memory_order(x)


def _on_cpu(x: Tensor) -> Moments:
    """Return the state of a strided real tensor on the CPU."""
    n = x.numel()
    if n == 0:
        return Moments()
    flat = _flat(x)
    if n <= CHUNK:
        return _chunk(flat)
    return functools.reduce(merge, map(_chunk, flat.split(CHUNK)))


def _chunk(x: Tensor) -> Moments:
    return quick(x) or _from_row(exact(x).tolist())


def _from_row(row: Sequence[float]) -> Moments:
    return Moments(*(int(c) for c in row[:5]), *row[5:])


# ---- tables of rows -----------------------------------------------------------------------------


class Transfer(Protocol):
    """States that are still being computed on an accelerator."""

    def ready(self) -> bool:
        """Return whether `write` would not wait."""

    def write(self, table: bytearray) -> None:
        """Wait for this transfer only, and write its states into their rows of a table."""


def finished(table: bytes, transfers: Sequence[Transfer]) -> bytes:
    """Wait for transfers and return the table with their states."""
    out = bytearray(table)
    for transfer in transfers:
        transfer.write(out)
    return bytes(out)


class Pending:
    """The transfer of states that torch operators compute on one device.

    Args:
        device: where they are computed.
        rows: the row of each state, and the number of zeros to add to it; a row may have several.
        states: float64 rows of `Moments` on the device.
    """

    def __init__(self, device: torch.device, rows: list[tuple[int, int]], states: list[Tensor]):
        self._rows = rows
        self._memory: PinnedMemory | None = None
        stacked = torch.stack(states)
        if device.type == "cuda":
            self._memory = PinnedMemory(stacked.nbytes)
            self._states = self._memory.tensor.view(stacked.dtype).view(stacked.shape)
            self._states.copy_(stacked, non_blocking=True)
            self._memory.record(torch.cuda.current_stream(device))
        else:
            self._states = stacked.cpu()

    def ready(self) -> bool:
        return self._memory is None or self._memory.ready()

    @without_modes()
    def write(self, table: bytearray) -> None:
        if self._memory is not None:
            self._memory.wait()
        states: dict[int, Moments] = {}
        for (row, zeros), state in zip(self._rows, self._states.tolist(), strict=True):
            states[row] = merge(states.get(row, _zeros(zeros)), _from_row(state))
        for row, merged in states.items():
            ROW.pack_into(table, row * ROW.size, *merged)


DeferredRows = Sequence[tuple[int, Tensor]]
"""Rows that `fill` must read, each with its tensor."""


@without_modes()
def read(
    tensors: list[Tensor], params: bool, grads: bool
) -> tuple[bytes, DeferredRows, Sequence[Transfer]]:
    """Return a table of unread and absent rows, the rows that `fill` must read, and no transfers.

    Args:
        tensors: the tensors.
        params: whether to read the tensors.
        grads: whether to read their gradients.
    """
    n = len(tensors)
    deferred_rows = list(enumerate(tensors)) if params else []
    absent = ROW.pack(*unread(ABSENT))
    table = [ROW.pack(*unread(numel(t))) for t in tensors] + [absent] * n
    if grads:
        found = ((n + i, gradient(t)) for i, t in enumerate(tensors))
        deferred_rows += [(row, grad) for row, grad in found if grad is not None]
    return b"".join(table), deferred_rows, ()


@without_modes()
def fill(
    table: bytes, deferred_rows: DeferredRows, params: bool = True
) -> tuple[bytes, tuple[Transfer, ...], dict[int, str]]:
    """Read the rows that a backend has deferred.

    Args:
        table: the table that the backend returned.
        deferred_rows: rows and their tensors.
        params: whether to read the tensors themselves; otherwise only their sizes.

    Returns:
        The table with these rows, the transfers that complete it, and why a row could not be read.

    Raises:
        RuntimeError: a CUDA stream that would be used is being captured into a graph.
    """
    devices = {tensor.device for _, tensor in deferred_rows}
    refuse_capture(device.index for device in devices if device.type == "cuda")
    out = bytearray(table)
    skipped: dict[int, str] = {}
    on_device: OnDevice = {}
    n = len(table) // ROW.size // 2
    on_cpu = [numel(tensor) for _, tensor in deferred_rows if tensor.device.type == "cpu"]
    largest = max(on_cpu, default=0)
    with torch.no_grad(), threads_that_exist(), threads_with_denormals(largest):
        for row, tensor in deferred_rows:
            try:
                state = _state(tensor, row, on_device) if params or row >= n else None
            except Exception as error:  # a subclass may raise anything; training goes on
                state = None
                skipped[row] = _reason(error, tensor)
            ROW.pack_into(out, row * ROW.size, *(state or unread(numel(tensor))))
    transfers = tuple(Pending(device, *parts) for device, parts in on_device.items())
    return bytes(out), transfers, skipped


def _reason(error: Exception, tensor: Tensor) -> str:
    """Return in one line why a tensor could not be read."""
    if isinstance(error, NotImplementedError) and "not implemented for" in str(error):
        return (
            f"{type(error).__name__}: torch has no conversion of {tensor.dtype} to numbers; "
            f"pass the values it encodes, or its bytes (.view(torch.uint8))"
        )
    return one_line_name(f"{type(error).__name__}: {error}".splitlines()[0])


OnDevice = dict[torch.device, tuple[list[tuple[int, int]], list[Tensor]]]


def _state(tensor: Tensor, row: int, on_device: OnDevice) -> Moments:
    """Return the state of any tensor.

    The states of a tensor on an accelerator are added to `on_device`, and its row is unread so far.
    """
    if tensor.device.type == "meta" or is_lazy(tensor):
        return unread(numel(tensor))
    x, zeros = elements(tensor)
    check_storage(x)
    if x.is_complex():
        state = _complex(x)
    elif x.device.type == "cpu":
        state = _on_cpu(x)
    elif x.device.type in _NO_FLOAT64:
        state = _on_cpu(x.cpu())
    elif x.numel() == 0:
        state = Moments()
    else:
        rows, states = on_device.setdefault(x.device, ([], []))
        for chunk in _flat(x).split(_DEVICE_CHUNK):
            rows.append((row, zeros))
            states.append(exact(chunk))
        return unread(tensor.numel())
    return merge(_zeros(zeros), state) if zeros else state


def _zeros(count: int) -> Moments:
    return Moments(count, count, 0, 0, 0, 0.0, 0.0, 0.0, 0.0) if count else Moments()
