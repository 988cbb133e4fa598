"""Return the exchange of a process group, which exists as long as the group does."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch.distributed as dist

from paramstats._sharded.background import Background
from paramstats._sharded.channel import Channel
from paramstats._sharded.collectives import Ranks
from paramstats._sharded.exchange import Exchange

_exchanges: weakref.WeakKeyDictionary[dist.ProcessGroup, Exchange] = weakref.WeakKeyDictionary()
_background: weakref.WeakKeyDictionary[dist.ProcessGroup, Background] = weakref.WeakKeyDictionary()


def exchange_of(process_group: dist.ProcessGroup | None) -> Exchange:
    """Return the exchange of a process group; None: the default group."""
    process_group = _checked(process_group)
    if process_group is None:
        return Exchange(Ranks(None))
    exchange = _exchanges.get(process_group)
    if exchange is None:
        exchange = _exchanges.setdefault(process_group, Exchange(Ranks(process_group)))
    return exchange


def background_of(process_group: dist.ProcessGroup | None) -> Background:
    """Return what exchanges among the same ranks in the background."""
    process_group = _checked(process_group)
    if process_group is None:
        return _alone()
    background = _background.get(process_group)
    if background is None:
        background = _background.setdefault(process_group, Background(Channel(process_group)))
    return background


def leave(process_group: dist.ProcessGroup | None, async_op: bool, error: BaseException) -> None:
    """Refuse later calls in a group, because `error` has made this rank leave a call."""
    if async_op:
        background_of(process_group).exchange.leave(error)
    else:
        exchange_of(process_group).leave(error)


@functools.lru_cache(maxsize=1)
def _alone() -> Background:
    return Background(Ranks(None))


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
