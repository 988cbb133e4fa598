"""Summarize a model whose tensors are distributed over ranks.

Each rank reads its own shards, and an exchange merges their states. The modules in order of use:
wrappers (find the shards of FSDP and ZeRO-3), local_shards (which elements are on this rank),
parts (of optimizers), local_rows (read them), exchange (collective calls), merging.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

from paramstats._core.backend import Implementation
from paramstats._core.detail_options import DetailOptions
from paramstats._core.layout import Layout
from paramstats._core.names import Patterns
from paramstats._core.optimizers import Request, make_request
from paramstats._core.options import Options
from paramstats._core.reading import warn_once
from paramstats._sharded.agreement import Arguments
from paramstats._sharded.groups import background_of, exchange_of
from paramstats._sharded.local_rows import LocalRows
from paramstats._sharded.local_shards import LocalShards
from paramstats._sharded.parts import LocalParts, refuse_slices
from paramstats._sharded.wrappers import find_shards
from paramstats._summary import Summary


class Call(NamedTuple):
    """How `paramstats.summarize` was called; `select` applies `include` and `exclude`."""

    backend: Implementation
    options: Options
    params: bool
    grads: bool
    buffers: bool
    group: dist.ProcessGroup | None
    select: Callable[[Layout, list[Any]], tuple[Layout, list[Any]]]
    optimizer: Any


def summarize(call: Call, source: Any, layout: Layout, tensors: list[Any]) -> Summary:
    """Return the summary of a sharded model. A collective call, unless `local` is set.

    Args:
        call: the arguments of the call.
        source: the model, mapping or pairs.
        layout, tensors: the tensors of `source` as this rank has them.
    """
    options = call.options
    if options.local:
        rows = _read(call, source, layout, tensors)
        if rows.error is not None:
            raise rows.error
        record = rows.record()
    else:
        try:
            rows = _read(call, source, layout, tensors)
        except Exception as error:  # raised by the exchange, because the other ranks wait for it
            rows = LocalRows.failed(call.backend, error)
        if options.async_op:
            background = background_of(call.group)
            background.connect()
            return Summary(None, background.submit(rows, _common_arguments(call), options))
        record = exchange_of(call.group).run(rows, _common_arguments(call))
    warn_once(record.skipped, stacklevel=4)
    return Summary(record._replace(correction=options.correction, grad_scale=options.grad_scale))


def _common_arguments(call: Call) -> Arguments:
    """Return the arguments that must be equal on all ranks."""
    include, exclude, correction, grad_scale, *_ = call.options
    details = call.options.details or DetailOptions()
    arguments = {
        "params": bool(call.params),
        "grads": bool(call.grads),
        "buffers": bool(call.buffers),
        "include": None if include is None else _texts(include),
        "exclude": _texts(exclude),
        "correction": correction,
        "grad_scale": grad_scale,
    }
    for name, selection in details.arguments().items():
        arguments[name] = selection if isinstance(selection, bool) else _texts(selection)
    return tuple((name, str(value)) for name, value in arguments.items())


def _texts(patterns: Patterns) -> list[str]:
    """Return regular expressions as text, with their flags if they are not the default."""
    default = re.compile("").flags
    return [p.pattern if p.flags == default else repr(p) for p in patterns]


def check_optimizers(source: Any, layout: Layout, tensors: list[Any]) -> None:
    """Raise NotImplementedError if optimizers of these tensors are not supported."""
    refuse_slices(*find_shards(source, layout, tensors))


def _read(call: Call, source: Any, layout: Layout, tensors: list[Any]) -> LocalRows:
    """Read this rank's shards of the tensors, and of their gradients."""
    options = call.options
    request = Request(()) if call.optimizer is None else make_request(call.optimizer)
    layout, tensors = call.select(*find_shards(source, layout, tensors, request.only))
    native = call.backend.native
    if native is not None and "torch.distributed.tensor" in sys.modules:
        native.set_dtensor_class(sys.modules["torch.distributed.tensor"].DTensor)
    shards = LocalShards(layout, tensors, call.grads)
    optimizers = None
    if request.optimizers:
        optimizers = LocalParts(request, layout, tensors, shards, call.grads)
    if options.local:
        shards.reductions.clear()  # read this rank's values of partial tensors as they are
        tensors = list[Any](shards.tensors[: len(tensors)])
        names, aliases, parameters, shapes, *rest = layout.fields
        local = zip(shapes, tensors, strict=True)
        shapes = tuple(None if shape is None else tuple(x.shape) for shape, x in local)
        layout = Layout.shared(names, aliases, parameters, shapes, *rest)
    flags = b""
    if options.details is not None:
        options.details.warn_no_match(layout, stacklevel=5)
        flags = options.details.flags(layout)
    return LocalRows(call.backend, layout, tensors, shards, call.params, optimizers, flags)
