"""States and details that are still being computed on an accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from paramstats._core.cuda import PinnedMemory
from paramstats._core.details import Detail, Details
from paramstats._core.moments import ROW, Moments, constant, merge
from paramstats._core.reference_details import Words, pack
from paramstats._core.states import from_row
from paramstats._core.torch_private import without_modes


class Transfer(Protocol):
    """States that are still being computed on an accelerator."""

    def ready(self) -> bool:
        """Return whether `write` would not wait."""

    def write(self, table: bytearray) -> None:
        """Wait for this transfer only, and write its states into their rows of a table."""

    def details(self) -> Details:
        """Return the details of these rows, after `write`."""


class _OnHost:
    """A tensor that is being copied to the CPU."""

    def __init__(self, device: torch.device, x: Tensor) -> None:
        self._memory: PinnedMemory | None = None
        if device.type == "cuda" and x.numel():
            self._memory = PinnedMemory(x.nbytes)
            self.tensor = self._memory.tensor.view(x.dtype).view(x.shape)
            self.tensor.copy_(x, non_blocking=True)
            self._memory.record(torch.cuda.current_stream(device))
        else:
            self.tensor = x.cpu()

    def ready(self) -> bool:
        return self._memory is None or self._memory.ready()

    def wait(self) -> Tensor:
        if self._memory is not None:
            self._memory.wait()
        return self.tensor


class Pending:
    """The transfer of what torch operators compute on one device.

    Args:
        device: where it is computed.
        rows: the row of each state, and the number of zeros to add to it; a row may have several.
        states: float64 rows of `Moments` on the device, in one or several tensors.
        details: rows and their details on the device.
    """

    def __init__(
        self,
        device: torch.device,
        rows: list[tuple[int, int]],
        states: list[Tensor],
        details: Sequence[tuple[int, Words]] = (),
    ) -> None:
        self._rows = rows
        self._states = _OnHost(device, torch.vstack(states))
        self._kept = [(row, words._replace(words=words.words[:0])) for row, words in details]
        self._lengths = [8 * len(words.words) for _, words in details]
        self._words = None
        if details:
            self._words = _OnHost(device, torch.cat([words.words for _, words in details]))

    def ready(self) -> bool:
        return self._states.ready() and (self._words is None or self._words.ready())

    @without_modes()
    def write(self, table: bytearray) -> None:
        parts: dict[int, list[Moments]] = {}
        for (row, zeros), state in zip(self._rows, self._states.wait().tolist(), strict=True):
            parts.setdefault(row, [constant(zeros, 0.0)] if zeros else []).append(from_row(state))
        for row, states in parts.items():
            state = merge(*states) if len(states) > 1 else states[0]
            ROW.pack_into(table, row * ROW.size, *state)

    @without_modes()
    def details(self) -> Details:
        out: dict[int, Detail] = {}
        if self._words is None:
            return out
        data, begin = bytes_of(self._words.wait()), 0
        for (row, words), length in zip(self._kept, self._lengths, strict=True):
            put(out, row, words, data[begin : begin + length])
            begin += length
        return out


def put(details: dict[int, Detail], row: int, words: Words, data: bytes) -> None:
    """Add a detail whose words are on the CPU."""
    packed = pack(words, data)
    if packed is not None:
        details[row] = details.get(row, Detail())._replace(**{words.what: packed})


def bytes_of(words: Tensor) -> bytes:
    """Return the bytes of a flat tensor on the CPU."""
    out = bytearray(words.nbytes)
    if out:
        torch.frombuffer(out, dtype=words.dtype).copy_(words)
    return bytes(out)
