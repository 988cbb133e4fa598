"""Accumulate the state of every tensor while its elements are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from paramstats._core import moments
from paramstats._core.backend import active
from paramstats._core.moments import Moments
from paramstats._core.reading import read_rows
from paramstats._core.states import CHUNK
from paramstats.checkpoints._reading import PIECE, Piece, block_view

_COMPLEX_CHUNK = 1 << 19
"""Complex elements that are read at a time: torch needs 80 bytes of memory for each."""

_BATCH = 1 << 20
"""Bytes that the backend gets at a time: fewer than it divides among threads (kSerialBytes). One
thread is several times as fast as any file. Waking others for every piece takes longer than they
save."""


class States:
    """The states of tensors, by row.

    Dense parts are read in order and in the chunks that the native backend uses. Its states are
    therefore bitwise equal to those of tensors in memory.
    """

    def __init__(self, rows: int) -> None:
        self.states = [Moments()] * rows
        self.skipped: dict[int, str] = {}
        """Why a tensor could not be read."""
        self._means: dict[int, complex] = {}

    def update(self, piece: Piece, data: torch.Tensor) -> None:
        """Read all blocks of a piece and merge them into the states of their tensors."""
        rows: list[int] = []
        chunks: list[torch.Tensor] = []
        decoded = 0
        for block in piece.blocks:
            x = block_view(data, piece, block)
            if block.decoder is not None:  # values can take more memory than the piece
                decoded += x.nbytes
                if decoded > PIECE:
                    self._update(rows, chunks)
                    rows, chunks, decoded = [], [], x.nbytes
            size = _COMPLEX_CHUNK if block.dtype.is_complex else CHUNK
            chunks += x.split(size) if block.is_dense else (x,)
            rows += [block.row] * (len(chunks) - len(rows))
        self._update(rows, chunks)

    def _update(self, rows: list[int], chunks: list[torch.Tensor]) -> None:
        for row, x, state in zip(rows, chunks, self._read(rows, chunks), strict=True):
            self._merge(row, state, _complex_mean(x) if x.is_complex() else None)

    def _read(self, rows: list[int], chunks: list[torch.Tensor]) -> Iterator[Moments]:
        for batch in _batches(chunks):
            table, skipped = read_table(chunks[batch.start : batch.stop])
            self.skipped |= {rows[batch.start + i]: reason for i, reason in skipped.items()}
            yield from (moments.row(table, i) for i in range(len(batch)))

    def _merge(self, row: int, b: Moments, b_mean: complex | None) -> None:
        """Merge a state into that of a tensor (Chan, Golub, LeVeque 1979).

        The state of complex elements holds only the modulus of their mean. The mean itself, which
        the merge needs, is `b_mean` and `self._means[row]`.
        """
        a = self.states[row]
        merged = moments.merge(a, b)
        if b_mean is not None:
            na, nb = moments.finite_count(a), moments.finite_count(b)
            if na:
                weight = nb / (na + nb)
                delta = b_mean - self._means[row]
                b_mean = self._means[row] + delta * weight
                m2 = a.m2 + b.m2 + abs(delta) ** 2 * (na * weight)
                merged = merged._replace(mean=abs(b_mean), m2=m2)
            self._means[row] = b_mean
        self.states[row] = merged


def read_table(tensors: list[torch.Tensor]) -> tuple[bytes, Mapping[int, str]]:
    """Return a table with the states of tensors, and why a tensor could not be read, by row."""
    table, _, skipped, _ = read_rows(active(), tensors, True, False, str)
    return table, {row: why for row, why in skipped.items() if isinstance(row, int)}


def _batches(chunks: list[torch.Tensor]) -> Iterator[range]:
    """Yield ranges of chunks with fewer than `_BATCH` bytes together, or of one larger chunk."""
    begin = nbytes = 0
    for i, x in enumerate(chunks):
        if i > begin and nbytes + x.nbytes >= _BATCH:
            yield range(begin, i)
            begin, nbytes = i, 0
        nbytes += x.nbytes
    yield range(begin, len(chunks))


def _complex_mean(x: torch.Tensor) -> complex:
    """Return the mean of the finite elements."""
    finite = x[x.isfinite()].to(torch.complex128)
    return complex(finite.mean().item()) if len(finite) else 0j
