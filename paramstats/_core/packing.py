"""Read many small tensors together: a few dozen torch operators for all, instead of for each.

Tensors of one dtype are concatenated, and each operator reduces all of them at once. On a CPU,
`torch.segment_reduce` adds up the elements of a tensor one by one in float64: the result depends
neither on threads nor on the other tensors. On accelerators, the tensors become the rows of a
padded matrix, of which `exact` computes the states.
"""

from __future__ import annotations

import functools
import itertools
import math
from array import array
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from paramstats._core.states import IN_FLOAT32, MIN_SPREAD, exact

MAX_NUMEL = 1 << 12
"""Elements up to which a tensor on a CPU is small. Larger ones are faster alone, which takes a
fixed number of operators that use SIMD."""

_MAX_PIECE = (1 << 15) - 1
"""Elements read together on a CPU: they fit in its caches, and torch's operators use no threads."""

_MAX_CACHED = 16
"""Pieces whose layout, of up to about 1 MiB, is kept for the next call."""

MAX_NUMEL_DEVICE = 1 << 16
"""Elements up to which a tensor on an accelerator is small."""

_MAX_PADDED = 1 << 19
"""Elements of a padded matrix, of which temporaries take 4 MiB each."""

_MAX_HELD = 1 << 22
"""Elements of an accelerator's tensors that are collected before they are read."""

Piece = tuple[Sequence[int], Sequence[Tensor]]
"""Rows, and their flat tensors, which are read together."""


class Group:
    """Small tensors of one dtype and device that are still to be read."""

    __slots__ = ("capacity", "is_cpu", "max_numel", "numel", "rows", "tensors")

    def __init__(self, is_cpu: bool) -> None:
        self.is_cpu = is_cpu
        self.max_numel = MAX_NUMEL if is_cpu else MAX_NUMEL_DEVICE
        """Elements up to which a tensor is small."""
        self.capacity = _MAX_PIECE if is_cpu else _MAX_HELD
        """Elements up to which tensors are collected."""
        self.rows: list[int] = []
        self.tensors: list[Tensor] = []
        """Flat tensors, parallel to `rows`."""
        self.numel = 0

    def take(self) -> Iterator[Piece]:
        """Remove the tensors, and return them in pieces of bounded size."""
        rows, tensors = self.rows, self.tensors
        self.rows, self.tensors, self.numel = [], [], 0
        return iter([(rows, tensors)] if rows else []) if self.is_cpu else _padded(rows, tensors)


# ---- on a CPU -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=_MAX_CACHED)
def _segments(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Describe how tensors of these lengths, none of which is 0, are concatenated.

    Returns:
        The lengths and as many zeros in float64, the offsets, and the number of each element's
        tensor. `torch.repeat_interleave` would return the last, but use threads.
    """
    ends = array("q", itertools.accumulate(lengths, initial=0))
    offsets = torch.frombuffer(ends, dtype=torch.int64)
    owners = torch.zeros(ends[-1], dtype=torch.int64, device="cpu")
    owners = owners.index_fill_(0, offsets[1:-1], 1).cumsum(0)
    n = offsets.diff().to(torch.float64)
    return n, torch.zeros_like(n), offsets, owners


def states_on_cpu(tensors: Sequence[Tensor]) -> Tensor:
    """Return the states of flat real tensors of one dtype as `exact` does, in rows.

    No tensor may be empty. m2 is NaN or infinite where these operators do not suffice: an element
    is not finite, squares overflow, or the spread is too small.
    """
    n, none, offsets, owners = _segments(tuple([x.numel() for x in tensors]))
    packed = torch.cat(tensors)  # type: ignore[arg-type]
    x = packed.to(torch.float64)
    reduce = functools.partial(torch.segment_reduce, offsets=offsets, axis=0, unsafe=True)
    # scatter_reduce_ finds extremes in half of the time of segment_reduce.
    low = torch.full_like(n, math.inf).scatter_reduce_(0, owners, x, "amin")
    high = torch.full_like(n, -math.inf).scatter_reduce_(0, owners, x, "amax")
    mean = reduce(x, "sum") / n
    zeros = reduce(torch.eq(x, 0, out=torch.empty_like(x)), "sum")
    is_wide = packed.dtype not in IN_FLOAT32
    if is_wide:  # the sum of up to 2^12 equal elements of 24 bits is exact
        is_constant = low == high
        mean = low.where(is_constant, mean)
    m2 = reduce(x.sub_(mean.index_select(0, owners)).square_(), "sum")
    if is_wide:
        least = n * (MIN_SPREAD[x.dtype] * mean).square()
        m2 = m2.where(is_constant | (m2 >= least), math.nan)
    return torch.stack((n, zeros, none, none, none, mean, m2, low, high), 1)


# ---- on an accelerator --------------------------------------------------------------------------


def states_on_device(tensors: Sequence[Tensor]) -> Tensor:
    """Return the states of flat real tensors of one dtype and device as `exact` does, in rows.

    Nothing is read on the host.
    """
    counts = _uploaded([x.numel() for x in tensors], tensors[0].device)
    packed = torch.cat(tensors).to(torch.float64)  # type: ignore[arg-type]
    width = max(x.numel() for x in tensors)
    columns = torch.arange(width, dtype=torch.int64, device=packed.device)
    index = (counts.cumsum(0) - counts).unsqueeze(1) + columns
    index = index.clamp_(max=packed.numel() - 1)
    matrix = packed.index_select(0, index.view(-1)).view(index.shape)
    return exact(matrix.masked_fill_(columns >= counts.unsqueeze(1), math.nan), counts)


def _uploaded(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return integers as a tensor on a device, without waiting for a CUDA device."""
    on_host = torch.frombuffer(array("q", numbers), dtype=torch.int64)
    if device.type == "cuda":  # from other memory, the copy would wait
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


def _padded(rows: Sequence[int], tensors: Sequence[Tensor]) -> Iterator[Piece]:
    """Split flat tensors into pieces of similar sizes, so that little padding is needed."""
    order = sorted(range(len(rows)), key=lambda i: tensors[i].numel())
    piece: list[int] = []
    for i in order:
        if piece and (len(piece) + 1) * tensors[i].numel() > _MAX_PADDED:
            yield [rows[i] for i in piece], [tensors[i] for i in piece]
            piece = []
        piece.append(i)
    if piece:
        yield [rows[i] for i in piece], [tensors[i] for i in piece]
