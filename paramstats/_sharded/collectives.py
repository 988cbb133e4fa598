"""Collective calls among the ranks of a process group, with errors that name the likely cause."""

from __future__ import annotations

import contextlib
import ctypes
import pickle
import weakref
from collections.abc import Iterator
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from paramstats._sharded.merging import WORDS

T = TypeVar("T")


class Ranks:
    """The ranks of a process group. Without a group (None), this process is the only rank."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        # A weak reference, so that a destroyed group and all that belongs to it is freed.
        self._reference = None if group is None else weakref.ref(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.global_ranks = [0] if group is None else dist.get_process_group_ranks(group)

    @property
    def device(self) -> torch.device:
        """The device for collectives: the CPU if the group has a backend for it."""
        group = self._group()
        if group is None or "cpu" in dist.get_backend_config(group):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def all_gather(self, block: Tensor) -> Tensor:
        """Return the blocks of all ranks, [ranks, ..., WORDS]."""
        if self.size == 1:
            return block[None]
        sent = block.to(self.device)
        out = sent.new_empty((self.size, *block.shape))
        with explain_errors():
            self._all_gather(out, sent)
        return out.cpu()

    def all_to_all(self, blocks: Tensor) -> Tensor:
        """Send block i to rank i; return the blocks that all ranks sent to this one."""
        sent = blocks.to(self.device)
        out = torch.empty_like(sent)
        with explain_errors():
            self._all_to_all(out, sent)
        return out.cpu()

    def all_reduce(self, buffer: Tensor, operator: dist.ReduceOp) -> None:
        """Reduce a buffer on `device` over all ranks, in place."""
        if self.size > 1:
            with explain_errors():
                self._all_reduce(buffer, operator)

    def broadcast(self, value: T | None, sender: int) -> T:
        """Return the value of rank `sender`."""
        data = bytearray(pickle.dumps(value) if sender == self.rank else b"")
        size = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        with explain_errors():
            self._broadcast(size, sender)
            sent = torch.empty(int(size), dtype=torch.uint8, device=self.device)
            if data:
                sent.copy_(torch.frombuffer(data, dtype=torch.uint8))
            self._broadcast(sent, sender)
        received = sent.cpu()
        content = ctypes.string_at(received.data_ptr(), received.numel())
        return cast(T, pickle.loads(content))  # noqa: S301  # as torch's broadcast_object_list

    def connect(self) -> None:
        """Connect to the other ranks; without effect where torch has done so."""

    def close(self) -> None:
        """Disconnect; without effect on connections that the program uses, too."""

    # The calls as torch has them. Other ways to communicate replace these four.

    def _group(self) -> dist.ProcessGroup | None:
        if self._reference is None:
            return None
        group = self._reference()
        if group is None:
            raise RuntimeError(
                "paramstats.summarize: expected a process group, got a destroyed one"
            )
        return group

    def _all_gather(self, out: Tensor, sent: Tensor) -> None:
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        gather(out.view(-1, WORDS), sent, group=self._group())

    def _all_to_all(self, out: Tensor, sent: Tensor) -> None:
        dist.all_to_all_single(out, sent, group=self._group())

    def _all_reduce(self, buffer: Tensor, operator: dist.ReduceOp) -> None:
        dist.all_reduce(buffer, operator, self._group())

    def _broadcast(self, buffer: Tensor, sender: int) -> None:
        dist.broadcast(buffer, self.global_ranks[sender], self._group())


@contextlib.contextmanager
def explain_errors() -> Iterator[None]:
    """Add the most frequent cause to the error of a collective call."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"paramstats.summarize: expected every rank of the group to make this call, with the "
            f"same async_op, and all collective calls in the same order, got: {error}"
        ) from error
