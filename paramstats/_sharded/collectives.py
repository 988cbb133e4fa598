"""Collective calls among the ranks of a process group, with errors that name the likely cause."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from paramstats._sharded.merging import WORDS

DESTROYED = (
    "paramstats.summarize: expected the process group to exist until the exchange has ended, got "
    "a group that was destroyed; call wait() on the summary before destroy_process_group()"
)

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
    def process_group(self) -> dist.ProcessGroup | None:
        if self._reference is None:
            return None
        group = self._reference()
        if group is None:
            raise RuntimeError(DESTROYED)
        return group

    @property
    def device(self) -> torch.device:
        """The device for collectives: the CPU if the group has a backend for it."""
        group = self.process_group
        if group is None or "cpu" in dist.get_backend_config(group):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def all_gather(self, block: Tensor) -> Tensor:
        """Return the blocks of all ranks, [ranks, ..., WORDS]."""
        group, device = self.process_group, self.device
        if group is None or self.size == 1:
            return block[None]
        out = torch.empty((self.size, *block.shape), dtype=block.dtype, device=device)
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        with _explain_errors():
            gather(out.view(-1, WORDS), block.to(device), group=group)
        return out.cpu()

    def all_to_all(self, blocks: Tensor) -> Tensor:
        """Send block i to rank i; return the blocks that all ranks sent to this one."""
        group, device = self.process_group, self.device
        sent = blocks.to(device)
        out = torch.empty_like(sent)
        with _explain_errors():
            dist.all_to_all_single(out, sent, group=group)
        return out.cpu()

    def broadcast(self, value: T | None, sender: int) -> T:
        """Return the value of rank `sender`."""
        group, device = self.process_group, self.device
        box = [value if sender == self.rank else None]
        with _explain_errors():
            dist.broadcast_object_list(
                box, src=self.global_ranks[sender], group=group, device=device
            )
        assert box[0] is not None
        return box[0]


@contextlib.contextmanager
def _explain_errors() -> Iterator[None]:
    """Add the most frequent cause to the error of a collective call."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"paramstats.summarize: expected every rank of the group to make this call, and all "
            f"collective calls in the same order, got: {error}"
        ) from error
