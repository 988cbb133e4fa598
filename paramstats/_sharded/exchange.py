"""One packed exchange for all tensors of a model.

Every process sends a header and a row for each tensor and gradient, its own part's state. Up to
ALL_TO_ALL_FROM processes, one all_gather brings all rows to all; beyond, an all_to_all brings each
process the rows of a share of the tensors, and an all_gather the joined ones back to all.

The buffer has the same size on all processes of a group, whatever they hold: it grows only when
all agree anew. So a process whose model has changed on its own still takes part in the others'
exchange, whose headers then tell everyone to agree again. No decision around a collective rests on
anything that only one process knows.

Partial tensors, whose processes hold addends, come after: what is to be added up follows from what
all have told (`partial`). An exchange thus takes one collective call (two of many processes), and
one more for each operator and type of partial tensors.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paramstats._core.layout import Layout
from paramstats._core.moments import ABSENT, ROW, Moments, merge
from paramstats._sharded.agreement import Agreement, agree
from paramstats._sharded.collectives import DESTROYED, Processes
from paramstats._sharded.merging import (
    DIVERGED,
    INCOMPLETE,
    NOT_HELD,
    UNREADABLE,
    WORDS,
    merge_parts,
    trouble,
    word_for,
)
from paramstats._sharded.offer import FailedOffer, Offer
from paramstats._sharded.partial import Plan, digest_of, plan

ALL_TO_ALL_FROM = 17
_TRIES = 4
_MOST_KEPT = 64

# Words of a header.
_DIGEST = slice(0, 4)
_AGREEMENT, _ENGINE, _FAILED, _TOLD = 4, 5, 6, 7


class Result(NamedTuple):
    """The statistics of whole tensors, the same on every process."""

    layout: Layout
    table: bytes
    skipped: dict[str, str]
    diverged: dict[str, str]


Headers = list[list[int]]
Outcome = tuple[Result | None, Exception | None]


class Group:
    """The processes that exchange, and what they have agreed on."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._capacity = 0
        self._latest: dict[bytes, Agreement] = {}
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._worker: ThreadPoolExecutor | None = None

    # ---- what callers want

    def exchange(self, offer: Offer | FailedOffer) -> Result:
        """Joins what all processes offer.

        Raises:
            RuntimeError: elements are missing, or a process failed; on every process alike.
            ValueError: the processes' tensors do not go together.
        """
        for _ in range(_TRIES):
            agreement = self._latest.get(offer.digest)
            rows = None
            if agreement is not None and (own := offer.rows()) is not None:
                rows = torch.full((self._capacity, WORDS), NOT_HELD, dtype=torch.int64)
                rows[agreement.positions] = own
            headers, joined = self._send(self._header(offer, agreement), rows)
            self._raise_failure(headers, offer)
            if agreement is not None and {h[_AGREEMENT] for h in headers} == {agreement.id}:
                same_backend = len({h[_ENGINE] for h in headers}) == 1
                merged = joined(agreement.numels, same_backend)
                lacking = self._add_up([h[_TOLD] for h in headers], agreement, offer, merged)
                return self._result(merged, agreement, offer, lacking)
            self._agree(headers, offer)
        raise RuntimeError("paramstats.summarize: expected the processes to agree on their tensors")

    def exchange_later(self, offer: Offer | FailedOffer) -> Future[Outcome]:
        """The same beside the training, on a thread; one after the other."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "paramstats-exchange")
        return self._worker.submit(self._outcome, offer)

    def _outcome(self, offer: Offer | FailedOffer) -> Outcome:
        try:
            return self.exchange(offer), None
        except Exception as error:
            if not dist.is_initialized():
                return None, RuntimeError(DESTROYED)
            # Not its traceback, which holds the model's tensors.
            cause = error.__cause__
            return None, error.with_traceback(None) if cause is None else type(error)(*error.args)

    # ---- rounds

    def _header(self, offer: Offer | FailedOffer, agreement: Agreement | None) -> Tensor:
        words = torch.zeros(WORDS, dtype=torch.int64)
        words[_DIGEST] = torch.tensor(struct.unpack("=4q", offer.digest), dtype=torch.int64)
        words[_AGREEMENT] = agreement.id if agreement else 0
        # Copies read by other instructions may differ in their last bit.
        words[_ENGINE] = word_for(offer.backend)
        words[_FAILED] = int(offer.error is not None)
        words[_TOLD] = digest_of(offer.told)
        return words

    def _raise_failure(self, headers: Headers, offer: Offer | FailedOffer) -> None:
        failed = [
            rank for rank, h in zip(self._processes.ranks, headers, strict=True) if h[_FAILED]
        ]
        if offer.error is not None:
            raise offer.error
        if failed:
            raise RuntimeError(
                f"paramstats.summarize: expected every process to read its tensors, got an error "
                f"on rank {failed[0]}, which raises it"
            )

    def _agree(self, headers: Headers, offer: Offer | FailedOffer) -> None:
        """From headers that all processes see. Contents are sent only where they differ."""
        digests = [struct.pack("=4q", *h[_DIGEST]) for h in headers]
        described = {offer.digest: offer.content}
        distinct = list(dict.fromkeys(digests))
        if len(distinct) > 1:
            for digest in distinct:
                sender = digests.index(digest)
                described[digest] = self._processes.broadcast(described.get(digest), sender)
        agreement = agree(digests, described, offer.layout, self._processes.ranks)
        if len(self._latest) >= _MOST_KEPT:  # whoever has forgotten one says so, and all agree anew
            self._latest.clear()
        self._latest[offer.digest] = agreement
        self._capacity = max(self._capacity, len(agreement.numels))

    def _add_up(
        self,
        digests: list[int],
        agreement: Agreement,
        offer: Offer | FailedOffer,
        merged: Tensor,
    ) -> dict[str, str]:
        """Puts partial tensors, where any process has told of some, into their rows. Returns the
        names of those that lack addends, and how many."""
        if not any(digests):
            return {}
        key = tuple(digests)
        if key not in self._plans:  # known to all: every plan was made by all
            if len(self._plans) >= _MOST_KEPT:
                self._plans.clear()
            self._plans[key] = plan(self._processes.gather_objects(offer.told))
        made = self._plans[key]
        states = offer.add_up(made, self._processes.process_group, self._processes.device)
        layout = agreement.layout
        whole: dict[int, Moments] = {}
        lacking = {}
        for slot, state in zip(made.slots, states, strict=True):
            name, is_gradient = slot.label
            row = layout.index[name] + len(layout) * is_gradient
            whole[row] = merge(whole[row], state) if row in whole else state
            if slot.missing:
                lacking[layout.row_name(row)] = (
                    f"addends of {slot.missing} processes are missing; they were left out"
                )
        for row, state in whole.items():
            bits = 0 if state.count == int(agreement.numels[row]) else INCOMPLETE
            merged[row, 0] = bits
            words = struct.unpack("=9q", ROW.pack(*state))
            merged[row, 1:] = torch.tensor(words, dtype=torch.int64)
        return lacking

    # ---- rows there and back

    def _send(
        self, header: Tensor, rows: Tensor | None
    ) -> tuple[Headers, Callable[[Tensor, bool], Tensor]]:
        """All processes' headers, and what joins the rows that came with them."""
        count, size = self._capacity, self._processes.size
        if size < ALL_TO_ALL_FROM:
            block = torch.full((1 + count, WORDS), NOT_HELD, dtype=torch.int64)
            block[0] = header
            if rows is not None:
                block[1:] = rows
            got = self._processes.all_gather(block)
            return got[:, 0].tolist(), functools.partial(self._merge_all, got)
        share = -(-count // size)
        blocks = torch.full((size, 1 + share, WORDS), NOT_HELD, dtype=torch.int64)
        blocks[:, 0] = header
        if rows is not None:
            padded = torch.full((size * share, WORDS), NOT_HELD, dtype=torch.int64)
            padded[:count] = rows
            blocks[:, 1:] = padded.view(size, share, WORDS)
        got = self._processes.all_to_all(blocks)
        return got[:, 0].tolist(), functools.partial(self._merge_share, got, share)

    def _merge_all(self, got: Tensor, numels: Tensor, same_backend: bool) -> Tensor:
        return merge_parts(got[:, 1 : 1 + len(numels)], numels, same_backend)

    def _merge_share(self, got: Tensor, share: int, numels: Tensor, same_backend: bool) -> Tensor:
        size, rank = self._processes.size, self._processes.rank
        padded = numels.new_zeros(size * share)
        padded[: len(numels)] = numels
        mine = padded[rank * share : (rank + 1) * share]
        joined = self._processes.all_gather(merge_parts(got[:, 1:], mine, same_backend))
        return joined.view(-1, WORDS)[: len(numels)]

    # ---- what came out

    def _result(
        self,
        merged: Tensor,
        agreement: Agreement,
        offer: Offer | FailedOffer,
        lacking: dict[str, str],
    ) -> Result:
        layout = agreement.layout
        ranks = self._processes.ranks
        skipped: dict[str, str] = {}
        diverged = dict(lacking)
        incomplete = []
        for row in merged[:, 0].nonzero().flatten().tolist():
            name = layout.row_name(row)
            bits, odd, other = trouble(int(merged[row, 0]))
            if bits & INCOMPLETE:
                incomplete.append((name, int(merged[row, 1]), int(agreement.numels[row])))
            if bits & DIVERGED:
                diverged[name] = f"rank {ranks[odd]} differs from rank {ranks[other]}"
            if bits & UNREADABLE:
                told = f"rank {ranks[odd]} could not read its part"
                skipped[name] = offer.unreadable.get(name, told)
        if incomplete:
            name, got, expected = incomplete[0]
            seen = "none" if got == ABSENT else got
            others = f" (and of {len(incomplete) - 1} more)" if len(incomplete) > 1 else ""
            raise RuntimeError(
                f"paramstats.summarize: expected the processes together to hold the {expected} "
                f"elements of '{name}', got {seen}{others}; call it on all processes that hold a "
                f"part, or leave it out with exclude=..., or gradients with grads=False"
            )
        states = merged[:, 1:].contiguous()
        table = ctypes.string_at(states.data_ptr(), states.numel() * 8)
        return Result(layout, table, skipped, diverged)
