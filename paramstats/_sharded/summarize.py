"""Summarize a model that several ranks hold together.

Each rank reads its own part of every tensor, and one exchange of states gives all ranks the
statistics of the whole tensors. The steps: wrappers (replace what a sharding library has put in a
tensor's place) -> pieces (which elements are here) -> offer (read them) -> exchange (collective
calls) -> merging -> `Record`.
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
from paramstats._core.options import Options
from paramstats._core.reading import warn_once
from paramstats._core.record import Record
from paramstats._sharded.exchange import Outcome, Result
from paramstats._sharded.groups import group_aside, group_of
from paramstats._sharded.offer import FailedOffer, Offer
from paramstats._sharded.pieces import Placings, held
from paramstats._sharded.wrappers import unwrapped
from paramstats._summary import Summary

_placings: weakref.WeakKeyDictionary[Layout, Placings] = weakref.WeakKeyDictionary()


class Call(NamedTuple):
    """How `paramstats.summarize` was called."""

    backend: Implementation
    options: Options
    params: bool
    grads: bool
    group: dist.ProcessGroup | None
    """The ranks that exchange; None: all."""
    select: Callable[[Layout, list[Any]], tuple[Layout, list[Any]]]
    """Returns what `include` and `exclude` leave of a layout and its tensors."""


def summarize(call: Call, source: Any, layout: Layout, tensors: list[Any]) -> Summary:
    """Return the summary of a sharded model; a collective call unless `local` is set.

    Args:
        call: the arguments of the call.
        source: the model, mapping or pairs.
        layout, tensors: the tensors of `source` as this rank has them.
    """
    backend, options = call.backend, call.options
    if options.local:
        return Summary(_local_record(call, source, layout, tensors))
    try:
        layout, tensors = call.select(*unwrapped(source, layout, tensors))
        if backend.native is not None and "torch.distributed.tensor" in sys.modules:
            backend.native.set_dtensor_class(sys.modules["torch.distributed.tensor"].DTensor)
        here = held(tensors, call.grads, _placings.setdefault(layout, {}))
        offer: Offer | FailedOffer = Offer(backend, layout, tensors, here, call.params)
    except Exception as error:  # raised after the exchange, as the other ranks wait for this one
        offer = FailedOffer(error)
    if options.async_op:
        later = group_aside(call.group).exchange_later(offer)
        return Summary(None, _DeferredExchange(later, options))
    result = group_of(call.group).exchange(offer)
    warn_once(result.skipped)
    return Summary(_record(result, options))


def _local_record(call: Call, source: Any, layout: Layout, tensors: list[Any]) -> Record:
    """Return the record of the elements on this rank, without communication."""
    layout, tensors = call.select(*unwrapped(source, layout, tensors))
    here = held(tensors, call.grads, {})
    here.partial.clear()  # the addends are the local elements
    local: list[Any] = here.tensors[: len(tensors)]
    layout = Layout.of(source, layout.names, layout.aliases, layout.parameters, local)
    offer = Offer(call.backend, layout, local, here, call.params)
    if offer.error is not None:
        raise offer.error
    warn_once(offer.unreadable)
    return Record(
        layout,
        offer.table(),
        call.options.correction,
        call.options.grad_scale,
        skipped=offer.unreadable,
        is_local=True,
    )


def _record(result: Result, options: Options) -> Record:
    return Record(
        result.layout,
        result.table,
        options.correction,
        options.grad_scale,
        result.skipped,
        result.diverged,
    )


class _DeferredExchange:
    """The record of an exchange that runs in the background."""

    def __init__(self, future: Future[Outcome], options: Options) -> None:
        self._future = future
        self._options = options

    def layout(self) -> Layout:
        return self.result().layout

    def ready(self) -> bool:
        return self._future.done()

    def result(self) -> Record:
        result, error = self._future.result()
        if result is None:
            assert error is not None
            raise error.with_traceback(None)  # otherwise it would grow at every call
        return _record(result, self._options)
