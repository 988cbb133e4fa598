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
from typing import Any

import torch.distributed as dist

from paramstats._core.backend import Implementation
from paramstats._core.layout import Layout
from paramstats._core.options import Options
from paramstats._core.reading import warn_once
from paramstats._core.record import Deferred, Record
from paramstats._sharded.exchange import Outcome, Result
from paramstats._sharded.groups import group_aside, group_of
from paramstats._sharded.offer import FailedOffer, Offer
from paramstats._sharded.pieces import Placings, held
from paramstats._sharded.wrappers import unwrapped

Select = Callable[[Layout, list[Any]], tuple[Layout, list[Any]]]

_placings: weakref.WeakKeyDictionary[Layout, Placings] = weakref.WeakKeyDictionary()


def summarize(
    source: Any,
    layout: Layout,
    tensors: list[Any],
    backend: Implementation,
    options: Options,
    group: dist.ProcessGroup | None,
    select: Select,
) -> Record | Deferred:
    """Return the record of a sharded model; a collective call unless `options.local`.

    Args:
        source: what `paramstats.summarize` was called with.
        layout, tensors: the tensors of `source` as this rank has them.
        backend: the backend that reads them.
        options: the other arguments of the call.
        group: the ranks that exchange; None: all.
        select: returns what `include` and `exclude` leave of a layout and its tensors.
    """
    if options.local:
        return _local_record(source, layout, tensors, backend, options, select)
    try:
        layout, tensors = select(*unwrapped(source, layout, tensors))
        if backend.native is not None and "torch.distributed.tensor" in sys.modules:
            backend.native.read_distributed(sys.modules["torch.distributed.tensor"].DTensor)
        here = held(tensors, options.grads, _placings.setdefault(layout, {}))
        offer: Offer | FailedOffer = Offer(backend, layout, tensors, here, options.params)
    except Exception as error:  # raised after the exchange, as the other ranks wait for this one
        offer = FailedOffer(error)
    if options.async_op:
        return _DeferredExchange(group_aside(group).exchange_later(offer), options)
    result = group_of(group).exchange(offer)
    warn_once(result.skipped)
    return _record(result, options)


def _local_record(
    source: Any,
    layout: Layout,
    tensors: list[Any],
    backend: Implementation,
    options: Options,
    select: Select,
) -> Record:
    """Return the record of the elements on this rank, without communication."""
    layout, tensors = select(*unwrapped(source, layout, tensors))
    here = held(tensors, options.grads, {})
    here.partial.clear()  # the addends are the local elements
    local: list[Any] = here.tensors[: len(tensors)]
    layout = Layout.of(source, layout.names, layout.aliases, layout.parameters, local)
    offer = Offer(backend, layout, local, here, options.params)
    if offer.error is not None:
        raise offer.error
    warn_once(offer.unreadable)
    return Record(
        layout,
        offer.table(),
        options.correction,
        options.grad_scale,
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
