"""Exchange the states of all tensors of a model among the ranks of a group, in one message.

Every rank sends a header and one row per tensor and gradient, the state of its own shard. With
fewer than ALL_TO_ALL_FROM ranks, one all_gather sends all rows to all ranks. With more ranks, an
all_to_all sends each rank the rows of some of the tensors, and an all_gather sends the merged rows
to all.

A collective call hangs if one rank makes it and another does not. Every decision about one is
therefore based on data that all ranks have received. The buffers of all ranks have the same size.
A rank whose tensors have changed sends no rows; its header makes all ranks agree again.

Details follow the rows in the same message, if they fit in the space that those of earlier calls
took. Otherwise, and with many ranks, another all_gather sends them.

Partial tensors are reduced afterwards. An exchange takes one collective call (two with many ranks),
one more for each operator and dtype of partial tensors, and perhaps one for details.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from paramstats._core.moments import ABSENT, ROW, Moments, merge, unread
from paramstats._core.record import Record
from paramstats._sharded.agreement import Agreement, Arguments, agree, check_arguments
from paramstats._sharded.collectives import Ranks
from paramstats._sharded.details import Message, merge_details, message_rows, rows_needed, unpacked
from paramstats._sharded.header import HAS_FAILED, Header
from paramstats._sharded.local_rows import LocalRows
from paramstats._sharded.merging import (
    DIVERGED,
    INCOMPLETE,
    NOT_HELD,
    UNREADABLE,
    WORDS,
    decode_status,
    hash_word,
    merge_rows,
    packed_words,
)
from paramstats._sharded.partial import Plan, make_plan

ALL_TO_ALL_FROM = 17
"""Number of ranks from which each rank merges the rows of some tensors only."""
_MAX_DETAIL_ROWS = 1 << 10
"""Most rows of WORDS words in a message for details, which are sent even if there are none."""
_MAX_ATTEMPTS = 4
_MAX_REMEMBERED = 64

T = TypeVar("T")


class _Refused(Exception):  # noqa: N818  # never leaves this file
    """An error that every rank raises, based on data that every rank has received."""


@contextlib.contextmanager
def _refuses() -> Iterator[None]:
    """Mark a ValueError as one that every rank raises."""
    try:
        yield
    except ValueError as error:
        raise _Refused from error


class Exchange:
    """Exchanges states among the ranks of one group; remembers what the ranks agreed on.

    If a call is left between two collective calls, its ranks may be out of step forever. Every
    later call then raises RuntimeError.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._capacity = 0  # rows in a message
        self._detail_rows = 0
        self._agreements: dict[bytes, Agreement] = {}
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._broken: str | None = None  # why the ranks may be out of step

    def run(self, local: LocalRows, arguments: Arguments = ()) -> Record:
        """Merge the rows of all ranks into a record of the whole tensors, equal on all ranks.

        Args:
            local: the rows of this rank.
            arguments: those of `summarize` that must be equal on all ranks.

        Raises `local.error` if there is one. Otherwise raises on all ranks alike: RuntimeError if
        elements are missing or a rank failed, ValueError if the ranks' tensors or arguments
        contradict. Raises RuntimeError if a collective call failed, now or before.
        """
        if self._broken is not None:
            raise RuntimeError(
                f"{self._broken} (since then the ranks may be out of step; use a new process group)"
            )
        try:
            agreement, merged, diverged, of_details = self._exchange(local, arguments)
        except _Refused as refused:
            error = refused.__cause__
        except BaseException as error:
            self.leave(error)
            raise
        else:
            return self._record(merged, agreement, local, diverged, *of_details)
        assert error is not None
        raise error

    def leave(self, error: BaseException) -> None:
        """Refuse later calls: because of `error`, this rank has left a call that others wait in."""
        if self._ranks.size > 1:
            self._broken = str(error)
            if not self._broken.startswith("paramstats"):
                self._broken = (
                    f"paramstats.summarize: expected every call in the process group to end, got "
                    f"{type(error).__name__}: {error}"
                )

    def close_if_broken(self) -> None:
        """Tell the other ranks, where the connections allow it, that no call will follow."""
        if self._broken is not None:
            self._ranks.close()

    def _exchange(
        self, local: LocalRows, arguments: Arguments
    ) -> tuple[Agreement, Tensor, dict[str, str], tuple[list[Message], bool]]:
        """Make all collective calls.

        Returns the merged rows, the tensors that diverged, the details of all ranks, and whether
        the ranks have the same backend.
        """
        for _ in range(_MAX_ATTEMPTS):
            agreement = self._agreements.get(local.digest)
            rows, message = None, b""
            if agreement is not None and (local_rows := local.rows()) is not None:
                rows = torch.full(
                    (self._capacity, WORDS), NOT_HELD, dtype=torch.int64, device="cpu"
                )
                rows[agreement.positions] = local_rows
                message = local.message(agreement.positions)
            header = self._header(local, arguments, agreement, len(message))
            received = self._send(header, rows, message)
            headers = [Header.of_words(words) for words in received[:, 0].tolist()]
            self._check_headers(headers, local, arguments)
            if agreement is not None and {h.agreement for h in headers} == {agreement.id}:
                same_backend = len({h.backend for h in headers}) == 1
                merged = self._merge(received[:, 1:], agreement.numels, same_backend)
                messages = self._messages(received, message, [h.details for h in headers])
                digests = [h.partial for h in headers]
                diverged = self._reduce_partials(digests, agreement, local, merged)
                return agreement, merged, diverged, (messages, same_backend)
            self._agree(headers, local)
        raise RuntimeError("paramstats.summarize: expected the ranks to agree on their tensors")

    def _header(
        self, local: LocalRows, arguments: Arguments, agreement: Agreement | None, details: int
    ) -> Header:
        return Header(
            local.digest,
            agreement.id if agreement else 0,
            hash_word(local.backend),
            details if local.error is None else HAS_FAILED,
            hash_word(local.partial_specs) if local.partial_specs else 0,
            hash_word(arguments),
        )

    def _check_headers(self, headers: list[Header], local: LocalRows, arguments: Arguments) -> None:
        for rank, header in zip(self._ranks.global_ranks, headers, strict=True):
            if not header.is_valid():
                raise RuntimeError(
                    f"paramstats.summarize: expected all collective calls in the same order on all "
                    f"ranks, got the data of another call from rank {rank}"
                )
        if local.error is not None:
            raise _Refused from local.error
        for rank, header in zip(self._ranks.global_ranks, headers, strict=True):
            if header.details == HAS_FAILED:
                raise _Refused from RuntimeError(
                    f"paramstats.summarize: expected every rank to read its tensors, got an error "
                    f"on rank {rank}; see the traceback of that rank"
                )
        words = [header.arguments for header in headers]
        if len(set(words)) > 1:
            by_word = self._contents(words, words[self._ranks.rank], arguments)
            with _refuses():
                check_arguments([by_word[word] for word in words], self._ranks.global_ranks)

    def _agree(self, headers: list[Header], local: LocalRows) -> None:
        """Agree on the union of all ranks' tensors."""
        digests = [header.digest for header in headers]
        contents = self._contents(digests, local.digest, local.content)
        with _refuses():
            agreement = agree(digests, contents, local.content, self._ranks.global_ranks)
        # Ranks may clear at different times. If one has no agreement any more, all agree again.
        if len(self._agreements) >= _MAX_REMEMBERED:
            self._agreements.clear()
        self._agreements[local.digest] = agreement
        count, size = len(agreement.numels), self._ranks.size
        self._capacity = max(self._capacity, -(-count // size) * size)  # a multiple of size

    def _contents(self, digests: list[Any], own_digest: Any, own_content: T) -> dict[Any, T]:
        """Return the contents by digest; each is sent by one rank, and only if digests differ."""
        contents = {own_digest: own_content}
        distinct = list(dict.fromkeys(digests))
        if len(distinct) > 1:
            for digest in distinct:
                sender = digests.index(digest)
                contents[digest] = self._ranks.broadcast(contents.get(digest), sender)
        return contents

    def _send(self, header: Header, rows: Tensor | None, message: bytes) -> Tensor:
        """Return what all ranks sent: headers, rows (or those of this rank's share), and details.

        The details are missing with many ranks, and where they need more rows than there are.
        """
        shares = self._ranks.size if self._ranks.size >= ALL_TO_ALL_FROM else 1
        share = self._capacity // shares
        length = 1 + share + (self._detail_rows if shares == 1 else 0)
        blocks = torch.full((shares, length, WORDS), NOT_HELD, dtype=torch.int64, device="cpu")
        blocks[:, 0] = header.words()
        if rows is not None:
            blocks[:, 1 : 1 + share] = rows.view(shares, share, WORDS)
        room = length - 1 - share
        if message and rows_needed(len(message)) <= room:
            blocks[0, 1 + share :] = message_rows(message, room)
        return self._ranks.all_gather(blocks[0]) if shares == 1 else self._ranks.all_to_all(blocks)

    def _merge(self, rows: Tensor, numels: Tensor, compare: bool) -> Tensor:
        """Merge the rows that all ranks sent."""
        size, rank, share = self._ranks.size, self._ranks.rank, rows.shape[1]
        if size < ALL_TO_ALL_FROM:
            return merge_rows(rows[:, : len(numels)], numels, compare)
        padded = numels.new_zeros(size * share)
        padded[: len(numels)] = numels
        own_share = padded[rank * share : (rank + 1) * share]
        merged = self._ranks.all_gather(merge_rows(rows, own_share, compare))
        return merged.view(-1, WORDS)[: len(numels)]

    def _messages(self, received: Tensor, message: bytes, sizes: list[int]) -> list[Message]:
        """Return the details of all ranks, whose sizes are known; no call if they were received."""
        if not any(sizes):
            return []
        details = received[:, 1 + self._capacity :]  # nothing with many ranks
        needed = rows_needed(max(sizes))
        if needed > details.shape[1]:
            details = self._ranks.all_gather(message_rows(message, needed))
            if needed <= _MAX_DETAIL_ROWS:
                self._detail_rows = max(self._detail_rows, needed)
        return unpacked(details, sizes)

    def _reduce_partials(
        self, digests: list[int], agreement: Agreement, local: LocalRows, merged: Tensor
    ) -> dict[str, str]:
        """Write the states of reduced partial tensors into `merged`.

        `digests` are those of each rank's partial specs, 0 where there are none. Returns the
        tensors for which ranks lack a value, by name, and how many do.
        """
        if not any(digests):
            return {}
        key = tuple(digests)
        if key not in self._plans:  # on all ranks, as every plan was made by all ranks
            if len(self._plans) >= _MAX_REMEMBERED:
                self._plans.clear()
            own_digest = digests[self._ranks.rank]
            contents = self._contents(digests, own_digest, local.partial_specs)
            with _refuses():
                self._plans[key] = make_plan([contents[digest] for digest in digests])
        plan = self._plans[key]
        states = local.reduce_partials(plan, self._ranks)
        layout = agreement.layout
        whole: dict[int, Moments] = {}
        diverged = {}
        for slot, state in zip(plan.slots, states, strict=True):
            name, is_gradient = slot.label
            row = layout.index[name] + len(layout) * is_gradient
            whole[row] = merge(whole[row], state) if row in whole else state
            if slot.missing:
                reason = f"{slot.missing} ranks have no value; those of the others were reduced"
                diverged[layout.row_name(row)] = reason
        for row, state in whole.items():
            merged[row, 0] = 0 if state.count == int(agreement.numels[row]) else INCOMPLETE
            merged[row, 1:] = packed_words(state)
        return diverged

    def _record(
        self,
        merged: Tensor,
        agreement: Agreement,
        local: LocalRows,
        diverged: dict[str, str],
        messages: list[Message],
        same_backend: bool,
    ) -> Record:
        layout = agreement.layout
        global_ranks = self._ranks.global_ranks
        skipped: dict[str, str] = {}
        incomplete = []
        first_part = 2 * len(layout)
        for row in merged[:, 0].nonzero().flatten().tolist():
            name = agreement.parts.row_name(layout, row)
            status = decode_status(int(merged[row, 0]))
            rank, other = (global_ranks[number] for number in (status.rank, status.other))
            if status.bits & INCOMPLETE:
                count, numel = int(merged[row, 1]), int(agreement.numels[row])
                if row < first_part:
                    incomplete.append((name, count, numel))
                else:
                    got = "none" if count == ABSENT else count
                    skipped[name] = f"the ranks together have {got} of its {numel} elements"
                    merged[row, 1:] = packed_words(unread(numel))
            if status.bits & DIVERGED:
                diverged[name] = f"rank {rank} differs from rank {other}"
            if status.bits & UNREADABLE:
                reason = f"rank {rank} could not read its shard"
                skipped[name] = local.skipped.get(name, reason)
        if incomplete:
            name, count, expected = incomplete[0]
            got = "none" if count == ABSENT else count
            more = f" (and {len(incomplete) - 1} more tensors)" if len(incomplete) > 1 else ""
            raise RuntimeError(
                f"paramstats.summarize: expected the ranks together to hold the {expected} "
                f"elements of {name!r}, got {got}{more}; call it on all ranks that hold a shard, "
                f"or leave the tensor out with exclude=..., or gradients with grads=False"
            )
        states = merged[:, 1:].contiguous()
        table = ctypes.string_at(states.data_ptr(), states.numel() * 8)
        own, parts = table[: first_part * ROW.size], table[first_part * ROW.size :]
        of_optimizers = agreement.parts.record(layout, parts)
        details, reasons = merge_details(messages, layout, own, same_backend)
        return Record(
            layout,
            own,
            skipped=skipped | local.detail_reasons | reasons,
            diverged=diverged,
            optimizer=of_optimizers,
            details=details,
        )
