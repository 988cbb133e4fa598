"""The state of each process group, which goes with it."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch.distributed as dist

from paramstats._sharded.collectives import Processes
from paramstats._sharded.exchange import Group

_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, Group] = weakref.WeakKeyDictionary()
_aside: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[Group, dist.ProcessGroup]] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()


def group_of(process_group: dist.ProcessGroup | None) -> Group:
    """The state of a process group; of the default one for None."""
    process_group = _checked(process_group)
    if process_group is None:
        return Group(Processes(None))
    with _lock:
        found = _groups.get(process_group)
        if found is None:
            found = _groups[process_group] = Group(Processes(process_group))
        return found


def group_aside(process_group: dist.ProcessGroup | None) -> Group:
    """A gloo group of the same processes, in which nothing else happens. Made at first use, which
    is a collective call of its own."""
    process_group = _checked(process_group)
    if process_group is None:
        return Group(Processes(None))
    found = _aside.get(process_group)
    if found is None:
        ranks = dist.get_process_group_ranks(process_group)
        whole = len(ranks) == dist.get_world_size()
        made = dist.new_group(ranks, backend="gloo", use_local_synchronization=not whole)
        found = _aside[process_group] = (Group(Processes(made)), made)
    return found[0]


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
