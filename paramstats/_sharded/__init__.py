"""Summaries of models that several processes hold together.

Each process reads its own part of every tensor, as it would a whole one, and one packed exchange of
states makes the whole tensors' statistics on all of them. The way: wrappers (what a sharding library
has put in a tensor's place) -> pieces (what is here, and where it belongs) -> offer (read) ->
exchange (agreement, collectives) -> merging -> Summary.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch.distributed as dist

from paramstats._core.backend import Implementation
from paramstats._core.layout import Layout
from paramstats._core.skipped import warn_once
from paramstats._core.torch_private import skip_dynamo
from paramstats._sharded.exchange import Outcome, Result
from paramstats._sharded.groups import group_aside, group_of
from paramstats._sharded.offer import FailedOffer, Offer
from paramstats._sharded.pieces import Placings, held
from paramstats._sharded.wrappers import unwrapped
from paramstats._summary import Summary

__all__ = ["Call", "summarize_local", "summarize_together"]

_placings: weakref.WeakKeyDictionary[Layout, Placings] = weakref.WeakKeyDictionary()


class Call(NamedTuple):
    """How `summarize` was called."""

    backend: Implementation
    params: bool
    grads: bool
    correction: float
    grad_scale: float
    group: dist.ProcessGroup | None
    async_op: bool
    select: Callable[[Layout, list[Any]], tuple[Layout, list[Any]]]
    """What `include` and `exclude` leave."""


def summarize_together(call: Call, source: Any, layout: Layout, rows: list[Any]) -> Summary:
    """The statistics of whole tensors; a collective call."""
    try:
        offer: Offer | FailedOffer = _offer(call, *call.select(*unwrapped(source, layout, rows)))
    except Exception as error:  # the others are waiting
        offer = FailedOffer(error)
    if call.async_op:
        later = group_aside(call.group).exchange_later(offer)
        return _UnderWay(later, call.correction, call.grad_scale)
    result = group_of(call.group).exchange(offer)
    warn_once(result.skipped, {})
    return Summary(
        result.layout,
        result.table,
        call.correction,
        call.grad_scale,
        skipped=result.skipped,
        diverged=result.diverged,
    )


def _offer(call: Call, layout: Layout, rows: list[Any]) -> Offer:
    if call.backend.native is not None and "torch.distributed.tensor" in sys.modules:
        call.backend.native.read_distributed(sys.modules["torch.distributed.tensor"].DTensor)
    here = held(rows, call.grads, _placings.setdefault(layout, {}))
    return Offer(call.backend, layout, rows, here, call.params)


def summarize_local(call: Call, source: Any, layout: Layout, rows: list[Any]) -> Summary:
    """The statistics of what this process holds; no communication."""
    layout, rows = call.select(*unwrapped(source, layout, rows))
    here = held(rows, call.grads, {})
    here.partial.clear()  # addends are what is here
    mine: list[Any] = here.tensors[: len(rows)]
    own = Layout.of(layout.names, layout.aliases, layout.parameters, mine)
    offer = Offer(call.backend, own, mine, here, call.params)
    if offer.error is not None:
        raise offer.error
    warn_once(offer.unreadable, {})
    table = offer.table()
    return Summary(
        own, table, call.correction, call.grad_scale, skipped=offer.unreadable, local=True
    )


class _UnderWay(Summary):
    """A Summary whose exchange is not done: all that one may ask of it waits for that."""

    __slots__ = ("_later",)

    def __init__(self, later: Future[Outcome], correction: float, grad_scale: float) -> None:
        self._later = later
        self._correction = correction
        self._grad_scale = grad_scale
        self._pending = ()

    @skip_dynamo
    def ready(self) -> bool:
        return self._later.done()

    @skip_dynamo
    def wait(self) -> Summary:
        self._result()
        return self

    def _result(self) -> Result:
        result, error = self._later.result()
        if result is None:
            assert error is not None
            raise error.with_traceback(None)  # or it would grow with every look
        return result

    # What the exchange decides. Slots of the base class, which nothing sets here.
    _layout = property(lambda self: self._result().layout)
    _table = property(lambda self: self._result().table)
    _skipped = property(lambda self: self._result().skipped)
    _diverged = property(lambda self: self._result().diverged)
    _local = False
