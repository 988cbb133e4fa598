"""Return the exchange of a process group; it exists as long as the group does."""

from __future__ import annotations

import weakref
from typing import Any

import torch.distributed as dist

from paramstats._sharded.collectives import Ranks
from paramstats._sharded.exchange import Exchange

_exchanges: weakref.WeakKeyDictionary[dist.ProcessGroup, Exchange] = weakref.WeakKeyDictionary()
_background: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[Exchange, dist.ProcessGroup]] = (
    weakref.WeakKeyDictionary()
)


def exchange_of(process_group: dist.ProcessGroup | None) -> Exchange:
    """Return the exchange of a process group; None: the default group."""
    process_group = _checked(process_group)
    if process_group is None:
        return Exchange(Ranks(None))
    exchange = _exchanges.get(process_group)
    if exchange is None:
        exchange = _exchanges.setdefault(process_group, Exchange(Ranks(process_group)))
    return exchange


def background_exchange(process_group: dist.ProcessGroup | None) -> Exchange:
    """Return an exchange among the same ranks in a gloo group of its own.

    Calls in that group cannot get out of order with the program's own collective calls. The group
    is created at the first use, which is a collective call.
    """
    process_group = _checked(process_group)
    if process_group is None:
        return Exchange(Ranks(None))
    found = _background.get(process_group)
    if found is None:
        ranks = dist.get_process_group_ranks(process_group)
        is_world = len(ranks) == dist.get_world_size()
        group = dist.new_group(ranks, backend="gloo", use_local_synchronization=not is_world)
        found = _background[process_group] = (Exchange(Ranks(group)), group)
    return found[0]


def _checked(process_group: Any) -> dist.ProcessGroup | None:
    """Return the group, or the default group for None; None if torch.distributed is not in use."""
    if process_group is None:
        return dist.group.WORLD if dist.is_initialized() else None
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:  # an int
        raise ValueError(
            "paramstats.summarize: expected a group that this rank belongs to, got another one"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"paramstats.summarize: expected a torch.distributed.ProcessGroup for group, got "
            f"{type(process_group).__name__}"
        )
    return process_group
