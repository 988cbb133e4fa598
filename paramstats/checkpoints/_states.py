"""The state of every tensor, as pieces of its elements come in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from paramstats._core import moments
from paramstats._core.backend import active
from paramstats._core.moments import Moments
from paramstats._core.reading import read_rows
from paramstats._core.reference import CHUNK
from paramstats.checkpoints._reading import Piece, view

_COMPLEX_CHUNK = 1 << 19
"""Complex elements worked on at a time: their temporaries take 80 bytes each."""

_BATCH = 1 << 20
"""Bytes from which on the backend wakes threads (kSerialBytes): it gets fewer at a time. One thread
is several times as fast as any file, and others, while they wait for the next call, would keep a
processor from the thread that reads."""


class States:
    """States of parts, by their position. Dense parts come in whole chunks and in order, as the
    backends cut a tensor: merged one after another they make the very same state."""

    def __init__(self, parts: int) -> None:
        self._states = [Moments()] * parts
        self._means: dict[int, complex] = {}
        self.skipped: dict[int, str] = {}
        """Why a part could not be read."""

    def update(self, piece: Piece, data: torch.Tensor) -> None:
        """Takes in all runs of a piece."""
        owners: list[int] = []
        views: list[torch.Tensor] = []
        for run in piece.runs:
            x = view(data, piece, run)
            if run.is_dense:
                chunks = x.split(_COMPLEX_CHUNK if run.dtype.is_complex else CHUNK)
            else:
                chunks = (x,)
            views += chunks
            owners += [run.part] * len(chunks)
        for part, x, state in zip(owners, views, self._read(owners, views), strict=True):
            self._merge(part, state, _complex_mean(x) if x.is_complex() else None)

    def merged(self, parts: range) -> Moments:
        """The state of a tensor: its parts', in their order."""
        for part in parts[1:]:
            self._merge(parts[0], self._states[part], self._means.get(part))
        return self._states[parts[0]] if parts else Moments()

    def _read(self, owners: list[int], views: list[torch.Tensor]) -> Iterator[Moments]:
        for rows in _batches(views):
            table, skipped = read_table(views[rows.start : rows.stop])
            self.skipped |= {owners[rows.start + row]: reason for row, reason in skipped.items()}
            yield from (moments.row(table, row) for row in range(len(rows)))

    def _merge(self, part: int, b: Moments, b_mean: complex | None) -> None:
        """Chan's merge. The state of complex elements has the modulus of their mean; the mean
        itself is kept beside it."""
        a = self._states[part]
        out = moments.merge(a, b)
        if b_mean is not None:
            na, nb = moments.finite_count(a), moments.finite_count(b)
            if na:
                weight = nb / (na + nb)
                delta = b_mean - self._means[part]
                b_mean = self._means[part] + delta * weight
                m2 = a.m2 + b.m2 + abs(delta) ** 2 * (na * weight)
                out = out._replace(mean=abs(b_mean), m2=m2)
            self._means[part] = b_mean
        self._states[part] = out


def read_table(tensors: list[torch.Tensor]) -> tuple[bytes, Mapping[int, str]]:
    """Return a table of the tensors' states, and why one could not be read, by row."""
    table, _, skipped = read_rows(active(), tensors, True, False, str)
    return table, skipped


def _batches(views: list[torch.Tensor]) -> Iterator[range]:
    begin = nbytes = 0
    for row, x in enumerate(views):
        if row > begin and nbytes + x.nbytes >= _BATCH:
            yield range(begin, row)
            begin, nbytes = row, 0
        nbytes += x.nbytes
    if views:
        yield range(begin, len(views))


def _complex_mean(x: torch.Tensor) -> complex:
    """Of the finite elements."""
    finite = x[x.isfinite()].to(torch.complex128)
    return complex(finite.mean().item()) if len(finite) else 0j
