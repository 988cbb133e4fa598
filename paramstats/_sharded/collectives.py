"""The processes of a group, and the collective calls of an exchange but for partial tensors."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from paramstats._sharded.merging import WORDS

DESTROYED = (
    "paramstats.summarize: expected the process group to last until the exchange was over, got one "
    "that was destroyed before; call wait() first"
)

T = TypeVar("T")


class Processes:
    """One process alone where there is no group."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        # Not owned: a group that is destroyed goes, and with it what `groups` keeps of it.
        self._reference = None if process_group is None else weakref.ref(process_group)
        self.size = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.ranks = [0] if process_group is None else dist.get_process_group_ranks(process_group)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        if self._reference is None:
            return None
        found = self._reference()
        if found is None:
            raise RuntimeError(DESTROYED)
        return found

    @property
    def device(self) -> torch.device:
        """Where tensors must lie for collectives: the CPU where the group has a backend for it."""
        group = self.process_group
        if group is None or "cpu" in dist.get_backend_config(group):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def all_gather(self, block: Tensor) -> Tensor:
        group, device = self.process_group, self.device
        if group is None or self.size == 1:
            return block[None]
        out = torch.empty((self.size, *block.shape), dtype=block.dtype, device=device)
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        with _explained():
            gather(out.view(-1, WORDS), block.to(device), group=group)
        return out.cpu()

    def all_to_all(self, blocks: Tensor) -> Tensor:
        group, device = self.process_group, self.device
        sent = blocks.to(device)
        out = torch.empty_like(sent)
        with _explained():
            dist.all_to_all_single(out, sent, group=group)
        return out.cpu()

    def gather_objects(self, mine: T) -> list[T]:
        group = self.process_group
        if group is None:
            return [mine]
        found: list[Any] = [None] * self.size
        with _explained():
            dist.all_gather_object(found, mine, group=group)
        return found

    def broadcast(self, own: T | None, sender: int) -> T:
        group, device = self.process_group, self.device
        box = [own if sender == self.rank else None]
        with _explained():
            dist.broadcast_object_list(box, src=self.ranks[sender], group=group, device=device)
        assert box[0] is not None
        return box[0]


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
