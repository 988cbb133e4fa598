"""`summarize`: turn a module, a mapping or (name, tensor) pairs into a `Summary`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from paramstats._core import optimizers
from paramstats._core import walk as python_walk
from paramstats._core.backend import Implementation, active
from paramstats._core.detail_options import Selection, make_detail_options
from paramstats._core.details import NO_ZERO_ROWS, Details, named
from paramstats._core.layout import Layout
from paramstats._core.names import Patterns
from paramstats._core.options import (
    DEFAULT_CORRECTION,
    DEFAULT_GRAD_SCALE,
    Options,
    Pattern,
    Scaler,
    make_options,
    warn_no_match,
)
from paramstats._core.reading import (
    DeferredRecord,
    read_deferred,
    read_rows,
    reasons_by_name,
    warn_once,
)
from paramstats._core.record import NO_NAMES, Record
from paramstats._core.shard import LocalShard
from paramstats._core.torch_private import skip_dynamo, without_modes
from paramstats._summary import Summary

if TYPE_CHECKING:
    import torch.distributed as dist

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
    correction: float = DEFAULT_CORRECTION,
    grad_scale: float | Scaler = DEFAULT_GRAD_SCALE,
    local: bool = False,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
    optimizer: Any = None,
    distribution: Selection = False,
    rows: Selection = False,
) -> Summary:
    """Compute mean, std, norm, zero fraction and more of all tensors and gradients, in one read.

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
        params: whether to read the tensors themselves. If False, they are listed with NaN
            statistics and only their gradients are read.
        grads: whether to read gradients. If False, `.grad` of every entry is None.
        buffers: whether to list the module's buffers, after its parameters.
        include: a regular expression or several, searched in the name (`re.search`). Only tensors
            with a matching name are read.
        exclude: a regular expression or several. Tensors with a matching name are left out. A tied
            tensor has several names, and is left out if all of them match.
        correction: as in `torch.std`: the sum of squared deviations is divided by n - correction.
        grad_scale: the factor that the loss was multiplied by, or the gradient scaler itself. The
            statistics of gradients are divided by it. Leave it out after
            `scaler.unscale_(optimizer)`.
        local: for a sharded model, read only the elements on this rank, without communication.
        group: the ranks that hold the model together; default: all ranks. With a group, the call
            is collective for any model. This merges the stages of a pipeline.
        async_op: for a sharded model, exchange the statistics in the background. Without effect
            on a model of plain tensors, which exchanges nothing.
        optimizer: a `torch.optim.Optimizer` or several. The entries then also have the statistics
            of its state and of the last update: `ParamStats.optimizer` and `ParamStats.update`.
            Call it after `optimizer.step()`, before the learning rate changes and gradients are
            set to None. `paramstats.watch(optimizer=...)` does this by itself.
        distribution: True, or regular expressions as in `include`: also read how the elements of
            these tensors and of their gradients are distributed. See `TensorStats.histogram`,
            `quantile`, `skewness`, `kurtosis` and `abs_mean`.
        rows: True, or regular expressions: also read the statistics of every index of dimension 0
            of these tensors and of their gradients: units, channels, experts or tokens. See
            `TensorStats.rows`. They take 48 bytes of memory per index.

    Returns:
        A `Summary` in the order of `named_parameters()`. A tied parameter is one entry under its
        first name and counts once. Names are those of the model without wrappers such as DDP or
        torch.compile. The summary is a snapshot: it does not change when the model does.

    Raises:
        TypeError: `source` is none of the above, a name is not a str, or a value is not a tensor.
        ValueError: two tensors have the same name; `correction` or `grad_scale` is not a usable
            number; `local` is combined with `group` or `async_op`; the ranks of a sharded model
            have different arguments, or different tensors of one name.
        NotImplementedError: a gradient is sharded and its parameter is not.
        RuntimeError: the current stream of a tensor's device is being captured into a CUDA graph;
            or elements of a sharded tensor are missing, or another rank does not make the call.

    The call changes nothing: no value, no version counter, no autograd history, no random state.

    On a GPU it returns without waiting, except for complex and sparse tensors. The tensors are read
    on the current stream of their device, after the work that is already queued. Reading a
    statistic waits for this summary's read only.

    For a sharded model (DTensor, FSDP, FSDP2, ZeRO-3, `LocalShard`), the statistics are those of
    whole tensors, equal on all ranks. The call is then collective: every rank of `group` must make
    it, with the same arguments. A model of plain tensors never communicates, also under DDP.

    A tensor that cannot be read, such as a subclass that hides its elements, raises nothing. Its
    statistics are NaN, `Summary.skipped` gives the reason, and one warning is issued.

    Statistics are computed in float64 from short partial sums around a local mean (Chan, Golub,
    LeVeque 1979). Their error is at most 1e-6 of the tensor's root mean square.
    """
    try:
        backend = active()
        options = make_options(
            include, exclude, correction, grad_scale, local, group is not None, async_op
        )
        if distribution is not False or rows is not False:
            options = options._replace(details=make_detail_options(distribution, rows))
        if isinstance(source, torch.nn.Module):
            walked = backend.walk(source, bool(buffers), _make_layout)
            layout, tensors = walked or python_walk.walk(source, buffers, _make_layout)
        else:
            layout, tensors = python_walk.walk_named(
                source, options.include, options.exclude, _make_layout
            )
        if layout.is_sharded or group is not None:
            from paramstats import _sharded

            select = functools.partial(_select, include=options.include, exclude=options.exclude)
            call = _sharded.Call(backend, options, params, grads, buffers, group, select, optimizer)
            with without_modes():
                return _sharded.summarize(call, source, layout, tensors)
    except BaseException as error:
        if not (local or isinstance(error, Exception)):  # such as Ctrl-C, on this rank only
            _leave_collective(group, bool(async_op), error)
        raise
    if options.include is not None or options.exclude:
        layout, tensors = _select(layout, tensors, options.include, options.exclude)
    if options.details is not None:
        options.details.warn_no_match(layout, stacklevel=3)
    if optimizer is not None:
        return _with_optimizer(backend, options, layout, tensors, params, grads, optimizer)
    # read_rows, without the cost of a call for a model that the backend reads by itself.
    if options.details is None:
        flags = b""
        table, deferred_rows, transfers, details = backend.read(tensors, bool(params), bool(grads))
    else:
        flags = options.details.flags(layout)
        table, deferred_rows, transfers, details = backend.read(
            tensors, bool(params), bool(grads), details=flags
        )
    if details:
        details = named(details)
    skipped: Mapping[str, str] = NO_NAMES
    if deferred_rows:
        table, transfers, reasons, details = read_deferred(
            backend, table, deferred_rows, transfers, params, layout.row_name, flags, details
        )
        if reasons:
            skipped = reasons_by_name(reasons, layout.row_name)
            warn_once(skipped)
    numbers = options.correction, options.grad_scale
    fields = (layout, table, *numbers, skipped, NO_NAMES, False, None, details, None)
    record = tuple.__new__(Record, fields)  # takes half the time of Record(...)
    return Summary(None, DeferredRecord(record, transfers)) if transfers else Summary(record)


def _with_optimizer(
    backend: Implementation,
    options: Options,
    layout: Layout,
    tensors: list[torch.Tensor],
    params: bool,
    grads: bool,
    optimizer: Any,
) -> Summary:
    """Return the summary of these tensors and of what optimizers know of them."""
    request = optimizers.make_request(optimizer)
    layout, tensors = request.select(layout, tensors)
    plan = optimizers.Plan(request, layout, tensors, params, grads)
    own = bytes(len(layout)) if options.details is None else options.details.flags(layout)
    flags = own.ljust(len(layout), b"\0").ljust(len(plan.tensors), bytes([NO_ZERO_ROWS]))
    table, transfers, reasons, details = read_rows(
        backend, plan.tensors, True, bool(grads), plan.row_name, plan.updates, flags
    )
    skipped = reasons_by_name(reasons, plan.row_name)
    warn_once(skipped, stacklevel=4)

    def make(table: bytes, details: Details) -> Record:
        own, of_optimizers = plan.split(table)
        numbers = options.correction, options.grad_scale
        known = of_optimizers if request.optimizers else None
        own_details = plan.own_details(details)
        return Record(layout, own, *numbers, skipped, optimizer=known, details=own_details)

    record = make(table, details)
    return (
        Summary(None, DeferredRecord(record, transfers, table, make, details))
        if transfers
        else Summary(record)
    )


@without_modes()
def tensors_of(
    source: Any,
    buffers: bool = False,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> tuple[Layout, list[Any]]:
    """Return the layout and the tensors that `summarize` would read; arguments as there.

    They are as optimizers have them: no gathered parameters of `fully_shard`.
    """
    patterns = include, exclude or ()
    if isinstance(source, torch.nn.Module):
        walked = active().walk(source, bool(buffers), _make_layout)
        layout, tensors = walked or python_walk.walk(source, buffers, _make_layout)
    else:
        layout, tensors = python_walk.walk_named(source, *patterns, _make_layout)
    if layout.is_sharded:
        from paramstats import _sharded

        tensors = _sharded.tensors_of_optimizers(source, tensors)
    layout, rows = layout.select(*patterns)
    return layout, [tensors[row] for row in rows]


def _leave_collective(
    group: dist.ProcessGroup | None, async_op: bool, error: BaseException
) -> None:
    """Refuse later collective calls, because other ranks may wait for this rank in this one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from paramstats import _sharded

        with contextlib.suppress(TypeError, ValueError):  # of a wrong group, which nobody waits in
            _sharded.leave(group, async_op, error)


def _select(
    layout: Layout, tensors: list[torch.Tensor], include: Patterns | None, exclude: Patterns
) -> tuple[Layout, list[torch.Tensor]]:
    """Return the rows that `include` and `exclude` select; warn if there are none."""
    if include is None and not exclude:
        return layout, tensors
    layout, rows = layout.select(include, exclude)
    if not rows:
        warn_no_match("summarize", include, exclude)
    return layout, [tensors[row] for row in rows]
