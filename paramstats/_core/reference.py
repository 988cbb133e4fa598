"""The definition in plain torch operators: the backend where there is no native one.

It also serves, next to the native backend, every tensor that the kernels may not read as it lies in
memory: on another device, sparse, complex, quantised, or of a subclass with operators of its own.

`exact` is the definition. On a CPU, `quick` is tried first; on other devices nothing looks at a
value before all are done: the states stay there, and one transfer brings them over.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from paramstats._core.elements import check_storage, elements, gradient, numel
from paramstats._core.forked import threads_that_exist
from paramstats._core.layout import is_lazy
from paramstats._core.moments import ABSENT, ROW, Moments, merge, unread
from paramstats._core.torch_private import no_tracing

CHUNK = 1 << 17
"""Elements that are worked on at a time, on a CPU: their temporaries stay in its caches."""

_DEVICE_CHUNK = 1 << 24
"""The same on an accelerator, where launches cost more and 128 MiB of float64 is little."""

_LEAST_SQUARES = 2e-33
"""Below this a sum of squares in float32 may have lost digits to underflow: a chunk's roundings
at float32's smallest step, 2^-149, are less than 1e-7 of more."""

_SHORT = 512
"""Up to here one dot product is cheaper than squares and their sum, and as good; beyond, it adds up
too many numbers in a row, and the sum's cascade loses fewer digits."""

_LEAST_SPREAD = {torch.float32: 1e-4, torch.float64: 1e-12}
"""Of the mean: its rounding (6e-8, 1e-16) shows in a standard deviation smaller than this."""

_FAR = 10
"""Standard deviations from zero beyond which a mean's rounding is taken out."""

_IN_FLOAT32 = frozenset({torch.float32, torch.bfloat16, torch.float16})
_NO_FLOAT64 = frozenset({"mps"})


# ---- states -------------------------------------------------------------------------------------


def exact(x: Tensor) -> Tensor:
    """The state of a flat real tensor, as a float64 row of `Moments` on the tensor's device."""
    x = x.to(torch.float64)
    finite = x.isfinite()
    n = finite.sum()
    values = x.where(finite, 0.0)
    low = x.where(finite, math.inf).amin()
    high = x.where(finite, -math.inf).amax()
    mean = values.sum() / n.clamp(min=1)
    # A sum that overflowed is added again in shares of the mean; a constant's mean is exact.
    mean = mean.where(mean.isfinite(), (values / n.clamp(min=1)).sum())
    mean = low.where(low == high, mean)
    deviations = (x - mean).where(finite, 0.0)
    shift = deviations.sum()
    m2 = deviations.square().sum()
    # What is left of the mean's rounding, taken out (the corrected two-pass algorithm; skipped
    # where it would overflow).
    correction = shift * (shift / n.clamp(min=1))
    m2 = (m2 - correction.where(correction.isfinite(), 0.0)).clamp(min=0.0)
    counts = ((x == 0).sum(), x.isnan().sum(), (x == math.inf).sum(), (x == -math.inf).sum())
    count = x.new_full((), x.numel())  # torch.tensor(...) would wait for an accelerator
    columns = (count, *counts, mean, m2, low, high)
    return torch.stack([c.to(torch.float64) for c in columns])


def quick(x: Tensor) -> Moments | None:
    """The state of a flat real tensor on a CPU by as few operators as torch has; None where its
    precision or its range did not suffice, or an element is not finite."""
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
    # Beside a mean that is large next to the deviations its rounding shows in the variance.
    d = x - mean
    m2 = d.dot(d).item() if n <= _SHORT else d.square_().sum().item()
    if not math.isfinite(m2):
        return None
    if m2 < n * (_LEAST_SPREAD[x.dtype] * mean) ** 2 or (in_float32 and m2 < _LEAST_SQUARES):
        return None
    if m2 < n * (mean / _FAR) ** 2:  # as it shows in the distance from another part's mean
        mean += (x - mean).sum().item() / n
    return Moments(n, zeros, 0, 0, 0, mean, m2, low, high)


def _complex(x: Tensor) -> Moments:
    """Complex numbers: mean is the modulus of the mean, m2 the sum of squared distances from it,
    min and max are of the modulus; so std, norm and zero_fraction are torch's."""
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
    """A dense tensor as one run of its elements as they lie, without a copy; another one copied."""
    order = sorted(range(x.dim()), key=lambda d: x.stride(d), reverse=True)
    return x.permute(order).reshape(-1)


def _flat(x: Tensor) -> Tensor:
    return x.view(-1) if x.is_contiguous() else _in_memory_order(x)


def _here(x: Tensor) -> Moments:
    """The state of a strided real tensor on the CPU."""
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
        """Whether `write` would not wait."""

    def write(self, table: bytearray) -> None:
        """Waits for this transfer alone and puts its states into their rows of a table."""


def finished(table: bytes, transfers: Sequence[Transfer]) -> bytes:
    """A table with what is still under way; waits for that."""
    out = bytearray(table)
    for transfer in transfers:
        transfer.write(out)
    return bytes(out)


class Pending:
    """The transfer of what torch operators compute."""

    def __init__(self, device: torch.device, rows: list[tuple[int, int]], states: list[Tensor]):
        self._rows = rows  # (row, zeros to add) of each state, in order; a row may have several
        stacked = torch.stack(states)
        self._event: torch.Event | None = None
        if device.type == "cuda":
            self._host = torch.empty(
                stacked.shape, dtype=stacked.dtype, device="cpu", pin_memory=True
            )
            self._host.copy_(stacked, non_blocking=True)
            self._event = torch.Event(device)
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._host = stacked.cpu()

    def ready(self) -> bool:
        return self._event is None or self._event.query()

    @no_tracing()
    def write(self, table: bytearray) -> None:
        if self._event is not None:
            self._event.synchronize()
        states: dict[int, Moments] = {}
        for (row, zeros), state in zip(self._rows, self._host.tolist(), strict=True):
            states[row] = merge(states.get(row, _zeros(zeros)), _from_row(state))
        for row, merged in states.items():
            ROW.pack_into(table, row * ROW.size, *merged)


Left = list[tuple[int, Tensor]]
"""Rows that are still to be read, each with the tensor that belongs there."""


@no_tracing()
def read(
    tensors: list[Tensor], params: bool, grads: bool
) -> tuple[bytes, Left, Sequence[Transfer]]:
    """A table in which every row is unread or absent, and what `fill` is to read; no transfers."""
    n = len(tensors)
    left: Left = list(enumerate(tensors)) if params else []
    absent = ROW.pack(*unread(ABSENT))
    table = [ROW.pack(*unread(numel(t))) for t in tensors] + [absent] * n
    if grads:
        found = ((n + i, gradient(t)) for i, t in enumerate(tensors))
        left += [(row, grad) for row, grad in found if grad is not None]
    return b"".join(table), left, ()


@no_tracing()
def fill(
    table: bytes, left: Left, params: bool = True
) -> tuple[bytes, tuple[Transfer, ...], dict[int, str]]:
    """Reads what an backend `left` over; where not `params`, of the tensors' own rows their size.

    Returns the table with them, what is under way, and why a row could not be read, by row.
    """
    _refuse_capture(left)
    out = bytearray(table)
    skipped: dict[int, str] = {}
    later: Later = {}
    n = len(table) // ROW.size // 2
    with torch.no_grad(), threads_that_exist():
        for row, tensor in left:
            try:
                state = _state(tensor, row, later) if params or row >= n else None
            except Exception as error:  # a subclass may raise anything; training goes on
                state = None
                skipped[row] = _reason(error, tensor)
            ROW.pack_into(out, row * ROW.size, *(state or unread(numel(tensor))))
    transfers = tuple(Pending(device, *parts) for device, parts in later.items())
    return bytes(out), transfers, skipped


def _reason(error: Exception, tensor: Tensor) -> str:
    """Why a tensor could not be read, in one line."""
    if isinstance(error, NotImplementedError) and "not implemented for" in str(error):
        return (
            f"{type(error).__name__}: torch has no conversion of {tensor.dtype} to numbers; "
            f"pass what it stands for, or its bytes (.view(torch.uint8))"
        )
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _refuse_capture(left: Left) -> None:
    """Raises RuntimeError where a stream that would be read on is being captured into a graph."""
    for device in {tensor.device for _, tensor in left if tensor.device.type == "cuda"}:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"paramstats.summarize: expected no CUDA graph capture under way, got a stream "
                    f"that is being captured (call it before the capture, or between replays) on "
                    f"{device}"
                )


Later = dict[torch.device, tuple[list[tuple[int, int]], list[Tensor]]]


def _state(tensor: Tensor, row: int, later: Later) -> Moments:
    """The state of any tensor; of one on an accelerator, unread for now and added to `later`."""
    if tensor.device.type == "meta" or is_lazy(tensor):
        return unread(numel(tensor))
    x, zeros = elements(tensor)
    check_storage(x)
    if x.is_complex():
        state = _complex(x)
    elif x.device.type == "cpu":
        state = _here(x)
    elif x.device.type in _NO_FLOAT64:
        state = _here(x.cpu())
    elif x.numel() == 0:
        state = Moments()
    else:
        rows, states = later.setdefault(x.device, ([], []))
        for chunk in _flat(x).split(_DEVICE_CHUNK):
            rows.append((row, zeros))
            states.append(exact(chunk))
        return unread(tensor.numel())
    return merge(_zeros(zeros), state) if zeros else state


def _zeros(count: int) -> Moments:
    return Moments(count, count, 0, 0, 0, 0.0, 0.0, 0.0, 0.0) if count else Moments()
