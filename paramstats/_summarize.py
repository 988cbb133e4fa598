"""From a source to a Summary: the one road through the house."""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from paramstats._core import reference
from paramstats._core import shard as sharding
from paramstats._core import walk as python_walk
from paramstats._core.backend import Implementation, active
from paramstats._core.interrupts import let_through
from paramstats._core.layout import Layout, Patterns, compile_patterns
from paramstats._core.shard import LocalShard, refuse_shards
from paramstats._core.skipped import warn_once
from paramstats._core.torch_private import no_tracing, skip_dynamo
from paramstats._summary import Summary

if TYPE_CHECKING:
    import torch.distributed as dist

Pattern = str | re.Pattern[str]
Source = (
    torch.nn.Module
    | Mapping[str, torch.Tensor | LocalShard]
    | Iterable[tuple[str, torch.Tensor | LocalShard]]
)


_make_layout = Layout.of


@skip_dynamo
def summarize(
    source: Source,
    *,
    params: bool = True,
    grads: bool = True,
    buffers: bool = False,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
    correction: float = 1,
    grad_scale: float = 1.0,
    local: bool = False,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Summary:
    """Mean, std, norm, zero fraction and more of every tensor and its gradient, from one read.

    >>> import torch, paramstats
    >>> model = torch.nn.Linear(3, 2)
    >>> _ = torch.nn.init.constant_(model.weight, 0.5)
    >>> model(torch.ones(1, 3)).sum().backward()
    >>> summary = paramstats.summarize(model)
    >>> summary["weight"].mean, summary["weight"].std, summary["weight"].grad.mean
    (0.5, 0.0, 1.0)

    Args:
        source: an `nn.Module`; a mapping of names to tensors, such as a `state_dict()`; or an
            iterable of (name, tensor) pairs, such as `model.named_parameters()`.
        params: read the tensors themselves. False: only their gradients; the tensors are listed,
            with statistics NaN.
        grads: read their `.grad`. False: `.grad` of every entry is None.
        buffers: list the module's buffers, too, after its parameters.
        include: one regular expression or several, searched in the name (`re.search`): only
            tensors with a name in which one of them is found are read.
        exclude: likewise: tensors all of whose names contain a match are left out (a tied one has
            several).
        correction: what `torch.std` calls so: var = m2 / (n - correction).
        grad_scale: what a gradient scaler multiplied the loss by: statistics of gradients come out
            divided by it. Pass `scaler.get_scale()` before `scaler.unscale_(optimizer)`, 1 after.
        local: of a sharded model, this process's own elements alone, without communication;
            `Summary.is_local` says so.
        group: the processes that hold the model together; None: all of them. Given, the call is a
            collective one for any model: pipeline stages of plain tensors are joined by it.
        async_op: of a sharded model, exchange beside the training, in a group of its own.

    Returns:
        A `Summary`, in the order of `named_parameters()`. A parameter with several names is one
        entry under the first, counted once. It is a snapshot: it does not change with the model.
        Nothing about the tensors changes, neither values nor versions nor autograd history.

    Raises:
        TypeError: `source` is none of the above, a name is no str or a value no tensor.
        ValueError: a name stands twice; `correction` or `grad_scale` is no usable number.
        NotImplementedError: a gradient is sharded and its tensor is not.
        RuntimeError: the current stream of a tensor's device is being captured into a CUDA graph;
            or, on every process alike, elements of a sharded tensor are missing.

    On a GPU it returns without waiting: each device's tensors are read by its current stream, after
    the work that is there already, and statistics, when they are looked at, wait for that read alone.

    Of a sharded model (DTensor, FSDP, FSDP2, ZeRO-3, `LocalShard`) the statistics of whole tensors come
    out, the same on every process: it is then a collective call, which all processes of `group`
    must make. A model of plain tensors, also under DDP, never communicates.

    A tensor that cannot be read (a subclass that hides its elements) does not raise: its statistics
    are NaN, `Summary.skipped` names the reason, and a warning says so once.

    Statistics are computed in float64, from short sums around a local mean (Chan, Golub, LeVeque 1979)
    in float32 or float64 as the type demands, to within 1e-6 of the tensor's root mean square.
    """
    chosen = active()
    if not _is_finite(correction):
        raise ValueError(
            f"paramstats.summarize: expected a finite number for correction, got {correction!r}"
        )
    if not (_is_finite(grad_scale) and grad_scale > 0 and math.isfinite(1 / float(grad_scale))):
        raise ValueError(
            f"paramstats.summarize: expected a finite number > 0 for grad_scale, got {grad_scale!r}"
            "; a GradScaler's is scaler.get_scale()"
        )
    included = None if include is None else compile_patterns(include, "include")
    excluded = () if exclude is None else compile_patterns(exclude, "exclude")

    if isinstance(source, torch.nn.Module):
        found = chosen.walk(source, buffers, _make_layout)
        layout, tensors = found or python_walk.walk(source, buffers, _make_layout)
    else:
        layout, tensors = python_walk.walk_named(source, included, excluded, _make_layout)
    if layout.is_sharded is None:
        layout.is_sharded = sharding.is_sharded(source, tensors)
    correction, grad_scale = float(correction), float(grad_scale)
    if not layout.is_sharded and group is None:
        if included is not None or excluded:
            layout, tensors = _select(layout, tensors, included, excluded)
        table, left, transfers = chosen.read(tensors, params, grads)
        if left:
            return _with_the_rest(
                chosen, layout, table, left, params, transfers, correction, grad_scale
            )
        return Summary(layout, table, correction, grad_scale, transfers)
    from paramstats import _sharded as sharded

    select = functools.partial(_select, included=included, excluded=excluded)
    call = sharded.Call(chosen, params, grads, correction, grad_scale, group, async_op, select)
    if local:
        return sharded.summarize_local(call, source, layout, tensors)
    return sharded.summarize_together(call, source, layout, tensors)


def _select(
    layout: Layout, tensors: list[Any], included: Patterns | None, excluded: Patterns
) -> tuple[Layout, list[Any]]:
    """What `include` and `exclude` leave."""
    if included is None and not excluded:
        return layout, tensors
    layout, rows = layout.select(included, excluded)
    if not rows:
        warnings.warn(
            f"paramstats.summarize: no name passes include={_as_given(included)!r}, "
            f"exclude={_as_given(excluded)!r}",
            RuntimeWarning,
            stacklevel=3,
        )
    return layout, [tensors[row] for row in rows]


def _as_given(patterns: Patterns | None) -> str | list[str] | None:
    texts = [pattern.pattern for pattern in patterns or ()]
    return texts[0] if len(texts) == 1 else texts or None


def _with_the_rest(
    chosen: Implementation,
    layout: Layout,
    table: bytes,
    left: reference.Left,
    params: bool,
    transfers: Sequence[reference.Transfer],
    correction: float,
    grad_scale: float,
) -> Summary:
    """After what an backend read itself, what it left."""
    refuse_shards((layout.row_name(row), tensor) for row, tensor in left)
    with no_tracing():
        devices = [tensor.device for _, tensor in left]
    chosen.explain_cuda(devices)
    table, more, unreadable = reference.fill(table, left, params)
    skipped = {layout.row_name(row): reason for row, reason in unreadable.items()}
    warn_once(skipped, {layout.row_name(row): type(tensor) for row, tensor in left})
    return Summary(layout, table, correction, grad_scale, (*transfers, *more), skipped)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last are torch's
        let_through(error)
        return False
