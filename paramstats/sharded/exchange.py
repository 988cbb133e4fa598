"""One packed exchange for all tensors of a model.

Every process sends a header and a row for each tensor and gradient, its own part's state. Up to
ALL_TO_ALL_FROM processes, one all_gather brings all rows to all; beyond, an all_to_all brings each
process the rows of a share of the tensors, and an all_gather the joined ones back to all.

The buffer has the same size on all processes of a group, whatever they hold: it grows only when
all agree anew. So a process whose model has changed on its own still takes part in the others'
exchange, whose headers then tell everyone to agree again. No decision around a collective rests on
anything that only one process knows.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import hashlib
import struct
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paramstats.layout import Layout
from paramstats.sharded.agreement import Agreement, Description, agree
from paramstats.sharded.merging import (
    DIVERGED,
    INCOMPLETE,
    NOT_HELD,
    UNREADABLE,
    WORDS,
    merge_parts,
    trouble,
)
from paramstats.sharded.offer import Offer
from paramstats.sharded.pieces import group_device

ALL_TO_ALL_FROM = 17
_TRIES = 4

# Words of a header.
_DIGEST = slice(0, 4)
_AGREEMENT, _ENGINE, _FAILED = 4, 5, 6


class Result(NamedTuple):
    """The figures of whole tensors, the same on every process."""

    layout: Layout
    table: bytes
    skipped: dict[str, str]
    diverged: dict[str, str]


class Group:
    """The processes that exchange, and what they have agreed on."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self._process_group = process_group
        self._size = 1 if process_group is None else dist.get_world_size(process_group)
        self._rank = 0 if process_group is None else dist.get_rank(process_group)
        self._ranks = [0] if process_group is None else dist.get_process_group_ranks(process_group)
        self._capacity = 0
        self._agreements: dict[int, Agreement] = {}
        self._latest: dict[bytes, Agreement] = {}
        self._last: Agreement | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._under_way: Future[Result] | None = None

    # ---- what callers want

    def exchange(self, offer: Offer) -> Result:
        """Joins what all processes offer.

        Raises:
            RuntimeError: elements are missing, or a process failed; on every process alike.
            ValueError: the processes' tensors do not go together.
        """
        return self._finish(offer, self._prepare(offer))

    def exchange_later(self, offer: Offer) -> Future[Result]:
        """The same beside the training, on a thread and in a process group of its own. What is
        read is read now. One exchange is under way at a time: what the next one does rests on what
        was agreed in it."""
        if self._under_way is not None:
            concurrent.futures.wait([self._under_way])
        first = self._prepare(offer)
        if not self._agreements:  # known to all: there was no exchange before
            done: Future[Result] = Future()
            done.set_result(self._finish(offer, first))
            return done
        offer.close()
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "paramstats-exchange")
        self._under_way = self._worker.submit(self._finish, offer, first)
        return self._under_way

    # ---- rounds

    def _prepare(self, offer: Offer) -> Agreement | None:
        """What this process believes to be agreed. It takes part in what the others add up."""
        agreement = self._latest.get(offer.layout_digest)
        followed = agreement or self._last
        offer.prepare(followed.program if followed else {})
        return agreement

    def _finish(self, offer: Offer, agreement: Agreement | None) -> Result:
        for _ in range(_TRIES):
            if agreement is not None and not agreement.covers(offer.partials):
                agreement = None
            header = self._header(offer, agreement.id if agreement else 0)
            rows = None
            if agreement is not None and offer.error is None:
                rows = torch.full((self._capacity, WORDS), NOT_HELD, dtype=torch.int64)
                rows[agreement.positions] = offer.rows()
            headers, merge = self._send(header, rows)
            self._raise_failure(headers, offer)
            believed = {int(h[_AGREEMENT]) for h in headers}
            if len(believed) == 1 and believed != {0}:
                assert agreement is not None
                same = len({int(h[_ENGINE]) for h in headers}) == 1
                self._last = agreement
                return self._result(merge(agreement.numels, same), agreement, offer)
            agreement = self._agree(headers, offer)
            offer.prepare(agreement.program)
        raise RuntimeError("paramstats.summarize: expected the processes to agree on their tensors")

    def _header(self, offer: Offer, agreement: int) -> Tensor:
        words = [*struct.unpack("=4q", offer.digest), agreement, _engine_tag(offer.engine)]
        words.append(int(offer.error is not None))
        return torch.tensor(words + [0] * (WORDS - len(words)), dtype=torch.int64)

    def _raise_failure(self, headers: Tensor, offer: Offer) -> None:
        failed = [rank for rank, h in zip(self._ranks, headers, strict=True) if h[_FAILED]]
        if offer.error is not None:
            raise offer.error
        if failed:
            raise RuntimeError(
                f"paramstats.summarize: expected every process to read its tensors, got an error "
                f"on rank {failed[0]}, which raises it"
            )

    def _agree(self, headers: Tensor, offer: Offer) -> Agreement:
        """From headers that all processes see. Descriptions are sent only where they differ."""
        digests = [struct.pack("=4q", *h[_DIGEST].tolist()) for h in headers]
        described = {offer.digest: offer.description()}
        distinct = list(dict.fromkeys(digests))
        if len(distinct) > 1:
            for digest in distinct:
                sender = digests.index(digest)
                described[digest] = self._broadcast(described.get(digest), sender)
        agreement = agree(digests, described, self._rank, offer.layout, offer.mesh, self._ranks)
        agreement = self._agreements.setdefault(agreement.id, agreement)
        self._latest[offer.layout_digest] = agreement
        self._capacity = max(self._capacity, len(agreement.numels))
        return agreement

    def _broadcast(self, description: Description | None, sender: int) -> Description:
        box = [description if sender == self._rank else None]
        group = self._process_group
        dist.broadcast_object_list(
            box, src=self._ranks[sender], group=group, device=group_device(group)
        )
        assert box[0] is not None
        return box[0]

    # ---- collectives

    def _send(
        self, header: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Callable[[Tensor, bool], Tensor]]:
        """All processes' headers, and what joins the rows that came with them."""
        if self._size < ALL_TO_ALL_FROM:
            block = torch.full((1 + self._capacity, WORDS), NOT_HELD, dtype=torch.int64)
            block[0] = header
            if rows is not None:
                block[1:] = rows
            got = self._all_gather(block)
            return got[:, 0], functools.partial(self._merge_all, got)
        share = -(-self._capacity // self._size)
        blocks = torch.full((self._size, 1 + share, WORDS), NOT_HELD, dtype=torch.int64)
        blocks[:, 0] = header
        if rows is not None:
            padded = torch.full((self._size * share, WORDS), NOT_HELD, dtype=torch.int64)
            padded[: self._capacity] = rows
            blocks[:, 1:] = padded.view(self._size, share, WORDS)
        got = self._all_to_all(blocks)
        return got[:, 0], functools.partial(self._merge_share, got, share)

    def _merge_all(self, got: Tensor, numels: Tensor, same_engine: bool) -> Tensor:
        return merge_parts(got[:, 1 : 1 + len(numels)], numels, same_engine)

    def _merge_share(self, got: Tensor, share: int, numels: Tensor, same_engine: bool) -> Tensor:
        padded = numels.new_zeros(self._size * share)
        padded[: len(numels)] = numels
        mine = padded[self._rank * share : (self._rank + 1) * share]
        joined = self._all_gather(merge_parts(got[:, 1:], mine, same_engine))
        return joined.view(-1, WORDS)[: len(numels)]

    def _all_gather(self, block: Tensor) -> Tensor:
        if self._process_group is None or self._size == 1:
            return block[None]
        device = group_device(self._process_group)
        out = torch.empty((self._size, *block.shape), dtype=block.dtype, device=device)
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        gather(out.view(-1, WORDS), block.to(device), group=self._process_group)
        return out.cpu()

    def _all_to_all(self, blocks: Tensor) -> Tensor:
        sent = blocks.to(group_device(self._process_group))
        out = torch.empty_like(sent)
        dist.all_to_all_single(out, sent, group=self._process_group)
        return out.cpu()

    # ---- what came out

    def _result(self, merged: Tensor, agreement: Agreement, offer: Offer) -> Result:
        layout = agreement.layout
        skipped = dict(offer.unreadable)
        diverged: dict[str, str] = {}
        incomplete = []
        for row in merged[:, 0].nonzero().flatten().tolist():
            name = layout.row_name(row)
            bits, place = trouble(int(merged[row, 0]))
            if bits & INCOMPLETE:
                incomplete.append((name, int(merged[row, 1]), int(agreement.numels[row])))
            if bits & DIVERGED:
                diverged[name] = f"rank {self._ranks[place]} holds another copy than one before it"
            if bits & UNREADABLE:
                skipped.setdefault(name, f"rank {self._ranks[place]} could not read its part")
        if incomplete:
            name, got, expected = incomplete[0]
            others = f" (and of {len(incomplete) - 1} more)" if len(incomplete) > 1 else ""
            raise RuntimeError(
                f"paramstats.summarize: expected the processes together to hold the {expected} "
                f"elements of '{name}', got {got}{others}; call it on all processes that hold a "
                f"part, or leave it out with exclude=..., or gradients with grads=False"
            )
        states = merged[:, 1:].contiguous()
        table = ctypes.string_at(states.data_ptr(), states.numel() * 8)
        return Result(layout, table, skipped, diverged)


# ---- the group of a call ------------------------------------------------------------------------

_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, Group] = weakref.WeakKeyDictionary()
_aside: weakref.WeakKeyDictionary[dist.ProcessGroup, Group] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def group_of(process_group: dist.ProcessGroup | None) -> Group:
    """The state of a process group; of the default one for None."""
    if process_group is None:
        process_group = dist.group.WORLD if dist.is_initialized() else None
    if process_group is None:
        return Group(None)
    with _lock:
        return _groups.setdefault(process_group, Group(process_group))


def group_aside(process_group: dist.ProcessGroup | None) -> Group:
    """A gloo group of the same processes, in which nothing else happens. Made at first use, which
    is a collective call of its own."""
    if process_group is None:
        process_group = dist.group.WORLD if dist.is_initialized() else None
    if process_group is None:
        return Group(None)
    found = _aside.get(process_group)
    if found is None:
        ranks = dist.get_process_group_ranks(process_group)
        whole = len(ranks) == dist.get_world_size()
        made = dist.new_group(ranks, backend="gloo", use_local_synchronization=not whole)
        found = _aside[process_group] = Group(made)
    return found


@functools.lru_cache(maxsize=8)
def _engine_tag(engine: str) -> int:
    """Copies read by other instructions may differ in their last bit."""
    return int(struct.unpack("=q", hashlib.sha256(engine.encode()).digest()[:8])[0])
