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

import contextlib
import ctypes
import functools
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from paramstats.layout import Layout
from paramstats.moments import ABSENT, ROW, Moments, merge
from paramstats.sharded.agreement import Agreement, agree
from paramstats.sharded.merging import (
    DIVERGED,
    INCOMPLETE,
    NOT_HELD,
    UNREADABLE,
    WORDS,
    merge_parts,
    trouble,
    word_for,
)
from paramstats.sharded.offer import FailedOffer, Offer
from paramstats.sharded.partial import Plan, digest_of, plan

ALL_TO_ALL_FROM = 17
_TRIES = 4
_MOST_KEPT = 64

_DESTROYED = (
    "paramstats.summarize: expected the process group to last until the exchange was over, got one "
    "that was destroyed before; call wait() first"
)

# Words of a header.
_DIGEST = slice(0, 4)
_AGREEMENT, _ENGINE, _FAILED, _TOLD = 4, 5, 6, 7


class Result(NamedTuple):
    """The figures of whole tensors, the same on every process."""

    layout: Layout
    table: bytes
    skipped: dict[str, str]
    diverged: dict[str, str]


Headers = list[list[int]]
Outcome = tuple[Result | None, Exception | None]
T = TypeVar("T")


class Group:
    """The processes that exchange, and what they have agreed on."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        # Not owned: a destroyed group goes with what was agreed in it.
        self._reference = None if process_group is None else weakref.ref(process_group)
        self._size = 1 if process_group is None else dist.get_world_size(process_group)
        self._rank = 0 if process_group is None else dist.get_rank(process_group)
        self._ranks = [0] if process_group is None else dist.get_process_group_ranks(process_group)
        self._capacity = 0
        self._latest: dict[bytes, Agreement] = {}
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._worker: ThreadPoolExecutor | None = None

    @property
    def _process_group(self) -> dist.ProcessGroup | None:
        if self._reference is None:
            return None
        found = self._reference()
        if found is None:
            raise RuntimeError(_DESTROYED)
        return found

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
                same_engine = len({h[_ENGINE] for h in headers}) == 1
                merged = joined(agreement.numels, same_engine)
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
                return None, RuntimeError(_DESTROYED)
            # Not its traceback, which holds the model's tensors.
            cause = error.__cause__
            return None, error.with_traceback(None) if cause is None else type(error)(*error.args)

    # ---- rounds

    def _header(self, offer: Offer | FailedOffer, agreement: Agreement | None) -> Tensor:
        words = torch.zeros(WORDS, dtype=torch.int64)
        words[_DIGEST] = torch.tensor(struct.unpack("=4q", offer.digest), dtype=torch.int64)
        words[_AGREEMENT] = agreement.id if agreement else 0
        # Copies read by other instructions may differ in their last bit.
        words[_ENGINE] = word_for(offer.engine)
        words[_FAILED] = int(offer.error is not None)
        words[_TOLD] = digest_of(offer.told)
        return words

    def _raise_failure(self, headers: Headers, offer: Offer | FailedOffer) -> None:
        failed = [rank for rank, h in zip(self._ranks, headers, strict=True) if h[_FAILED]]
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
                described[digest] = self._broadcast(described.get(digest), sender)
        agreement = agree(digests, described, offer.layout, self._ranks)
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
            self._plans[key] = plan(self._gather_objects(offer.told))
        made = self._plans[key]
        states = offer.add_up(made, self._process_group, group_device(self._process_group))
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

    def _gather_objects(self, mine: T) -> list[T]:
        if self._process_group is None:
            return [mine]
        found: list[Any] = [None] * self._size
        with _explained():
            dist.all_gather_object(found, mine, group=self._process_group)
        return found

    def _broadcast(self, own: T | None, sender: int) -> T:
        box = [own if sender == self._rank else None]
        group = self._process_group
        with _explained():
            dist.broadcast_object_list(
                box, src=self._ranks[sender], group=group, device=group_device(group)
            )
        assert box[0] is not None
        return box[0]

    # ---- collectives

    def _send(
        self, header: Tensor, rows: Tensor | None
    ) -> tuple[Headers, Callable[[Tensor, bool], Tensor]]:
        """All processes' headers, and what joins the rows that came with them."""
        count = self._capacity
        if self._size < ALL_TO_ALL_FROM:
            block = torch.full((1 + count, WORDS), NOT_HELD, dtype=torch.int64)
            block[0] = header
            if rows is not None:
                block[1:] = rows
            got = self._all_gather(block)
            return got[:, 0].tolist(), functools.partial(self._merge_all, got)
        share = -(-count // self._size)
        blocks = torch.full((self._size, 1 + share, WORDS), NOT_HELD, dtype=torch.int64)
        blocks[:, 0] = header
        if rows is not None:
            padded = torch.full((self._size * share, WORDS), NOT_HELD, dtype=torch.int64)
            padded[:count] = rows
            blocks[:, 1:] = padded.view(self._size, share, WORDS)
        got = self._all_to_all(blocks)
        return got[:, 0].tolist(), functools.partial(self._merge_share, got, share)

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
        with _explained():
            gather(out.view(-1, WORDS), block.to(device), group=self._process_group)
        return out.cpu()

    def _all_to_all(self, blocks: Tensor) -> Tensor:
        sent = blocks.to(group_device(self._process_group))
        out = torch.empty_like(sent)
        with _explained():
            dist.all_to_all_single(out, sent, group=self._process_group)
        return out.cpu()

    # ---- what came out

    def _result(
        self,
        merged: Tensor,
        agreement: Agreement,
        offer: Offer | FailedOffer,
        lacking: dict[str, str],
    ) -> Result:
        layout = agreement.layout
        skipped: dict[str, str] = {}
        diverged = dict(lacking)
        incomplete = []
        for row in merged[:, 0].nonzero().flatten().tolist():
            name = layout.row_name(row)
            bits, odd, other = trouble(int(merged[row, 0]))
            if bits & INCOMPLETE:
                incomplete.append((name, int(merged[row, 1]), int(agreement.numels[row])))
            if bits & DIVERGED:
                diverged[name] = f"rank {self._ranks[odd]} differs from rank {self._ranks[other]}"
            if bits & UNREADABLE:
                told = f"rank {self._ranks[odd]} could not read its part"
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


def group_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors must lie for a group's collectives: the CPU where it has a backend for it."""
    if group is None or "cpu" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


# ---- the group of a call ------------------------------------------------------------------------

_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, Group] = weakref.WeakKeyDictionary()
_aside: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[Group, dist.ProcessGroup]] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()


def group_of(process_group: dist.ProcessGroup | None) -> Group:
    """The state of a process group; of the default one for None."""
    process_group = _checked(process_group)
    if process_group is None:
        return Group(None)
    with _lock:
        found = _groups.get(process_group)
        if found is None:
            found = _groups[process_group] = Group(process_group)
        return found


def _checked(process_group: Any) -> dist.ProcessGroup | None:
    """The default group for None; None where there is none at all."""
    if process_group is None:
        return dist.group.WORLD if dist.is_initialized() else None
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:  # a number
        raise ValueError(
            "paramstats.summarize: expected a group that this process belongs to, got another one"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"paramstats.summarize: expected a torch.distributed.ProcessGroup for group, got "
            f"{type(process_group).__name__}"
        )
    return process_group


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Says what is most often amiss when a collective fails."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"paramstats.summarize: expected every process of the group to make this call, and all "
            f"collective calls in the same order, got: {error}"
        ) from error


def group_aside(process_group: dist.ProcessGroup | None) -> Group:
    """A gloo group of the same processes, in which nothing else happens. Made at first use, which
    is a collective call of its own."""
    process_group = _checked(process_group)
    if process_group is None:
        return Group(None)
    found = _aside.get(process_group)
    if found is None:
        ranks = dist.get_process_group_ranks(process_group)
        whole = len(ranks) == dist.get_world_size()
        made = dist.new_group(ranks, backend="gloo", use_local_synchronization=not whole)
        found = _aside[process_group] = (Group(made), made)
    return found[0]
