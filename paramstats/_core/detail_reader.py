"""Read the details of any tensor with torch operators, or note why they cannot be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from paramstats._core import moments, reference_details
from paramstats._core.details import NO_ZERO_ROWS, NOT_KNOWN, READ_DISTRIBUTION, READ_ROWS, Detail
from paramstats._core.elements import check_storage, elements
from paramstats._core.format import one_line_name
from paramstats._core.moments import is_unread
from paramstats._core.reference_details import Words
from paramstats._core.states import flat
from paramstats._core.torch_private import unwrapped
from paramstats._core.transfers import bytes_of, put

NO_FLOAT64 = frozenset({"mps"})

Reason = int | tuple[int, str]
"""A row, or a detail of a row: (row, field of `Detail`)."""

Reasons = dict[Reason, str]
"""Why a row, or a detail of a row (row, field of `Detail`), could not be read."""


class DetailReader:
    """Reads the details of tensors.

    Args:
        tensors: the row of each, the tensor, and the bits of what was asked for.
        skipped: gets the reasons. A row that is in it already is not read.
    """

    def __init__(self, tensors: Iterable[tuple[int, Tensor, int]], skipped: Reasons) -> None:
        self._tensors = [one for one in tensors if not (one[1].is_meta or is_lazy(one[1]))]
        self._skipped = skipped
        self.found: dict[int, Detail] = {}

    def on_devices(self) -> dict[torch.device, list[tuple[int, Words]]]:
        """Compute the details of tensors on accelerators, without waiting for these."""
        out: dict[torch.device, list[tuple[int, Words]]] = {}
        for row, x, flags in self._tensors:
            if not self._is_on_cpu(x) and row not in self._skipped:
                # How many zeros there are is not known here.
                for words in self._words(row, x, flags, x.dim() > 0 and x.numel() > 0):
                    out.setdefault(words.words.device, []).append((row, words))
        return out

    def on_cpu(self, table: bytes) -> None:
        """Read the details of tensors on the CPU, of which `table` has the states."""
        for row, x, flags in self._tensors:
            if not self._is_on_cpu(x) or row in self._skipped:
                continue
            state = moments.row(table, row)
            has_zero_row = (
                not is_unread(state) and x.dim() > 0 and state.zeros * x.shape[0] >= state.count > 0
            )
            for words in self._words(row, x, flags, has_zero_row):
                put(self.found, row, words, bytes_of(words.words))

    def _is_on_cpu(self, x: Tensor) -> bool:
        return x.is_cpu or x.device.type in NO_FLOAT64

    def _words(self, row: int, x: Tensor, flags: int, zero_rows: bool) -> Iterator[Words]:
        wanted = (
            ("distribution", flags & READ_DISTRIBUTION),
            ("rows", flags & READ_ROWS and x.dim() > 0 and x.numel() > 0),
            ("zero_rows", zero_rows and not flags & NO_ZERO_ROWS),
        )
        for what, is_wanted in wanted:
            if not is_wanted:
                continue
            try:
                words = _compute(what, x)
            except Exception as error:  # a subclass may raise anything; training goes on
                self._skipped[row, what] = reason_of(error, x)
                if what == "zero_rows":
                    self.found[row] = self.found.get(row, Detail())._replace(zero_rows=NOT_KNOWN)
            else:
                yield words


def _compute(what: str, x: Tensor) -> Words:
    if x.is_complex() and what != "zero_rows":
        raise TypeError(f"complex numbers have no {what}")
    stored, zeros = elements(x)
    check_storage(stored)
    if stored.device.type in NO_FLOAT64:
        stored = stored.cpu()
    if what == "distribution":
        return reference_details.distribution(flat(stored), zeros)
    dense_or_sparse = stored
    if zeros or stored.shape != x.shape:  # a sparse tensor, of which `stored` has the values
        dense_or_sparse = unwrapped(x.detach()).to(stored.device)
    if what == "rows":
        return reference_details.rows(dense_or_sparse)
    return reference_details.zero_rows(dense_or_sparse)


def reason_of(error: Exception, tensor: Tensor) -> str:
    """Return in one line why a tensor could not be read."""
    if isinstance(error, NotImplementedError) and "not implemented for" in str(error):
        return (
            f"{type(error).__name__}: torch has no conversion of {tensor.dtype} to numbers; "
            f"pass the values it encodes, or its bytes (.view(torch.uint8))"
        )
    return one_line_name(f"{type(error).__name__}: {error}".splitlines()[0])
