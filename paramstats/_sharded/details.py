"""Merge what several ranks have of the same tensors in addition to their states."""

from __future__ import annotations

import ctypes
import math
import pickle
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paramstats._core import moments
from paramstats._core.details import (
    NOT_KNOWN,
    ROW_STATE,
    ROWS_HEAD,
    Detail,
    Distribution,
    merge_distributions,
    pack_zero_rows,
    zero_rows_of,
)
from paramstats._core.layout import Layout
from paramstats._core.moments import finite_count
from paramstats._core.reading import reasons_by_name
from paramstats._sharded.local_shards import NO_ROWS
from paramstats._sharded.merging import WORDS


class ShardDetail(NamedTuple):
    """What a rank sends of a shard."""

    shard_index: int
    """The index of the shard. Replicas of a shard have the same index, and one of them counts."""
    first_row: int
    """Where dimension 0 of the shard begins in that of the whole tensor, or NO_ROWS."""
    row_numel: int
    """The elements of a row of the shard."""
    detail: Detail


Message = Mapping[int, ShardDetail]
"""What a rank sends, by row of the merged table."""


def packed(message: Message) -> bytes:
    """Return a message as bytes; empty if there is nothing to send."""
    return pickle.dumps(dict(message)) if message else b""


def rows_needed(size: int) -> int:
    """Return how many rows of WORDS words a message of this many bytes takes."""
    return -(-size // (8 * WORDS))


def message_rows(message: bytes, count: int) -> Tensor:
    """Return a packed message as rows of WORDS words, padded to `count` > 0 rows."""
    padded = bytearray(message.ljust(8 * WORDS * count, b"\0"))
    return torch.frombuffer(padded, dtype=torch.int64).view(count, WORDS)


def unpacked(rows: Tensor, sizes: Sequence[int]) -> list[Message]:
    """Return the messages of all ranks from their rows and their sizes in bytes."""
    contents = zip(rows.contiguous(), sizes, strict=True)
    messages = [ctypes.string_at(own.data_ptr(), size) for own, size in contents]
    return [pickle.loads(message) if message else {} for message in messages]  # noqa: S301


def merge_details(
    messages: Sequence[Message], layout: Layout, table: bytes, have_same_hashes: bool
) -> tuple[dict[int, Detail], dict[str, str]]:
    """Merge the messages of all ranks.

    Args:
        messages: those of each rank.
        layout, table: of the whole tensors.
        have_same_hashes: whether all ranks compute the same hash of a row.

    Returns:
        The details of whole tensors by row, and why something is not known, by name.
    """
    by_row: dict[int, dict[int, ShardDetail]] = {}
    for message in messages:
        for row, shard in message.items():
            by_row.setdefault(row, {}).setdefault(shard.shard_index, shard)
    details: dict[int, Detail] = {}
    reasons: dict[int | tuple[int, str], str] = {}
    for row in sorted(by_row):
        shards = [shard for _, shard in sorted(by_row[row].items())]
        shape = layout.shapes[row % len(layout)] or ()
        state = moments.row(table, row)
        distribution = _merged_distribution(shards, finite_count(state))
        if distribution is None and any(shard.detail.distribution for shard in shards):
            reasons[row, "distribution"] = "a rank has no distribution of its shard"
        rows = _joined_rows(shards, shape)
        if rows is None and any(shard.detail.rows for shard in shards):
            reasons[row, "rows"] = "only tensors that are sharded as Shard(0) have whole rows"
        elif rows is not None and len(shards) > 1 and not have_same_hashes:
            rows, reasons[row, "rows"] = None, "the ranks' backends differ in the hashes of rows"
        has_some = math.prod(shape[1:]) <= state.zeros < state.count
        zero_rows = _merged_zero_rows(shards, shape) if has_some else None
        detail = Detail(distribution, rows, zero_rows)
        if detail != Detail():
            details[row] = detail
    return details, reasons_by_name(reasons, layout.row_name)


def _merged_distribution(shards: Sequence[ShardDetail], n: int) -> bytes | None:
    packed = [shard.detail.distribution for shard in shards]
    merged = merge_distributions(Distribution.unpack(part) for part in packed if part is not None)
    return merged.pack() if merged.n == n and any(packed) else None


def _joined_rows(shards: Sequence[ShardDetail], shape: tuple[int, ...]) -> bytes | None:
    """Return the rows of the whole tensor, if each shard consists of whole rows."""
    if not shape:
        return None
    row_numel = math.prod(shape[1:])
    states = []
    end = 0
    for shard in sorted(shards, key=lambda shard: shard.first_row):
        if shard.detail.rows is None:
            continue
        rows, _ = ROWS_HEAD.unpack_from(shard.detail.rows)
        if rows == 0:
            continue
        if shard.first_row != end or shard.row_numel != row_numel:
            return None
        states.append(shard.detail.rows[ROWS_HEAD.size :])
        end += rows
    joined = b"".join(states)
    if end != shape[0] or len(joined) != end * ROW_STATE.size:
        return None
    return ROWS_HEAD.pack(end, row_numel) + joined


def _merged_zero_rows(shards: Sequence[ShardDetail], shape: tuple[int, ...]) -> bytes | None:
    """Return the rows that are zero in all shards; `NOT_KNOWN` if shards do not consist of rows.

    A shard may have a range of the rows, a range of the columns, or both.
    """
    found = [shard for shard in shards if shard.detail.zero_rows is not None]
    if not found or not shape:
        return None
    zeros = [0] * shape[0]
    for shard in found:
        if shard.first_row == NO_ROWS or shard.detail.zero_rows == NOT_KNOWN:
            return NOT_KNOWN
        assert shard.detail.zero_rows is not None
        for row in zero_rows_of(shard.detail.zero_rows) or ():
            zeros[shard.first_row + row] += shard.row_numel
    row_numel = math.prod(shape[1:])
    return pack_zero_rows(bytes(count == row_numel for count in zeros))
