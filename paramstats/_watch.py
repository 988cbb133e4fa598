"""`watch`: summarize every N steps of a training loop, for a logger and a history."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from paramstats._core.detail_options import Selection, make_detail_options
from paramstats._core.optimizers import make_request
from paramstats._core.options import Pattern, check_keys, checked_stats, make_options, split_stats
from paramstats._health_checks import HealthChecks, OnFinding
from paramstats._optimizer_hooks import UpdateMethod, check_optimizers
from paramstats._watcher import Appendable, Log, Watched, Watcher, has_group, is_first_rank

if TYPE_CHECKING:
    import torch.distributed as dist

    from paramstats._history import History


def watch(
    source: Watched,
    log: Log | None = None,
    *,
    every: int = 50,
    history: Appendable | str | os.PathLike[str] | None = None,
    key: str = "{kind}_{stat}/{name}",
    stats: Sequence[str] = ("mean", "std", "norm", "zero_fraction"),
    totals: bool = True,
    params: bool = True,
    grads: bool = True,
    buffers: bool = False,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
    correction: float = 1,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
    optimizer: Any = None,
    update: UpdateMethod = "auto",
    distribution: Selection = False,
    rows: Selection = False,
    on_finding: OnFinding | None = None,
    health: bool = False,
) -> Watcher:
    """Log the statistics of a model while it trains.

    With the optimizer, no call in the training loop is needed:

    >>> import torch, paramstats
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> def log(scalars, step):
    ...     print(step, round(scalars["update_mean/bias"], 6))
    >>> watcher = paramstats.watch(model, optimizer=optimizer, every=2, log=log)
    >>> for step in range(4):
    ...     model(torch.ones(1, 3)).sum().backward()
    ...     optimizer.step()
    0 -0.1
    2 -0.3

    Without it, call `Watcher.step` after backward:

    >>> import torch, paramstats
    >>> model = torch.nn.Linear(3, 2)
    >>> def log(scalars, step):
    ...     print(step, scalars["grad_mean/weight"])
    >>> watcher = paramstats.watch(model, every=2, log=log)
    >>> for step in range(4):
    ...     model(torch.ones(1, 3)).sum().backward()
    ...     watcher.step()
    0 1.0
    2 3.0

    Args:
        source: the model, or a mapping of names to tensors.
        log: called as `log(scalars, step)` with the result of `Summary.scalars()`. `wandb.log`,
            `mlflow.log_metrics` and the `log_metrics` of Lightning's loggers can be passed as they
            are. In a distributed run only rank 0 of the default group calls it.
        every: summarize at the first call of `Watcher.step`, then at the first call at or after
            each multiple of this number. With `optimizer`, steps of the optimizer are counted.
        history: a `History`, whose `append(step, summary)` is called on rank 0 before anything is
            logged; or the path of a new file, which is opened as `History(path)` on rank 0. Before
            the process group exists, the rank is that of torchrun (RANK). Pass
            `history=History(path, resume=True)` to continue an existing file, and number the steps
            with `Watcher.step(step=)`.
        key, stats, totals: what is logged and under which keys; see `Summary.scalars`.
        params, grads, buffers, include, exclude, correction, group, async_op: see `summarize`.
        optimizer: a `torch.optim.Optimizer` or several. A summary is then taken after each due step
            of the optimizer, without calls of `Watcher.step`. Its gradients are those that the
            optimizer used, so after clipping; to see them before, leave `optimizer` out and call
            `Watcher.step`. It also has the optimizer's state and the update: see `ParamStats`.
            Steps that a gradient scaler skips do not count, except those of fused optimizers, after
            which the next step is due instead. Of several optimizers, each parameter
            is read at the step of its own; a summary has one step of each.
        update: how the change of the parameters by a step is found. "formula": from the state of
            `torch.optim.Adam` or AdamW, exact up to the rounding of the parameter. "copy": from a
            copy of the parameters during due steps, exact; `Watcher.copy_bytes` is its size.
            "auto": the formula for float32 and float64 parameters of Adam and AdamW, otherwise a
            copy. None: not at all. If there is too little memory for a copy, training continues
            without, and a warning is issued.
        distribution, rows: what else is read: see `summarize`. They add no keys by themselves:
            statistics of the distribution are logged if `stats` names them ("skewness", "kurtosis"
            and "abs_mean"). `log` finds the histograms and rows of its step in `Watcher.summary`.
        on_finding: called as `on_finding(finding)` for each `Finding` of the health check over
            time: once when it begins, and once when it ends, with `finding.end` set. A problem of
            many tensors is one finding. `Watcher.close` reports what the last step says. See
            `History.findings` for what it finds. It is called after `log`, on the same rank and in
            the order of steps. What it raises comes out of the training loop, as of `log`.
        health: whether to read the distribution and the rows of all tensors, which some rules of
            the health check need: dead units by index, equal rows, heavy tails and what float8
            would lose. A due step then takes about ten times as long.

    If parameters require a gradient and none has one at a due step, a RuntimeWarning says so once.

    Raises:
        FileExistsError: `history` is the path of a file with content.
        TypeError: `source` is neither a module nor a mapping, `log` is not a function of scalars
            and step, or `on_finding` is not a function.
        ValueError: `every` is not a whole number > 0, none of `log`, `history` and `on_finding` is
            given, an argument that `scalars` or `summarize` would refuse, an optimizer without a
            parameter of `source`, or `stats` names statistics of the distribution without
            `distribution` or `health`.
    """
    if not isinstance(source, (torch.nn.Module, Mapping)):
        raise TypeError(
            "paramstats.watch: expected a module or a mapping of names to tensors, "
            f"got {type(source).__name__}; pass the model"
        )
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"paramstats.watch: expected a whole number > 0 for every, got {every!r}")
    if update not in ("auto", "formula", "copy", None):
        raise ValueError(
            f"paramstats.watch: expected 'auto', 'formula', 'copy' or None for update, "
            f"got {update!r}"
        )
    if update != "auto" and optimizer is None:
        raise ValueError(
            f"paramstats.watch: expected an optimizer for update={update!r}, got none; pass "
            f"optimizer="
        )
    optimizers = () if optimizer is None else make_request(optimizer, "watch").optimizers
    check_optimizers(source, optimizers)
    if log is None and history is None and on_finding is None:
        raise ValueError("paramstats.watch: expected log=, history= or on_finding=, got none")
    _check_log(log)
    if on_finding is not None and not callable(on_finding):
        raise TypeError(
            f"paramstats.watch: expected a function of a finding for on_finding, got {on_finding!r}"
        )
    # All ranks check this, so that all raise: only rank 0 logs.
    plain, of_distributions = split_stats(stats)
    stats = checked_stats(plain, "watch")[0] + of_distributions
    check_keys(key, stats, totals)
    options = make_options(include, exclude, correction, 1.0, False, group is not None, async_op)
    details = make_detail_options(health or distribution, health or rows)
    if of_distributions and (details is None or details.distribution == ()):
        raise ValueError(
            f"paramstats.watch: expected distribution= with {of_distributions[0]!r} in stats, got "
            f"none; pass distribution=True"
        )
    opened: History | None = None
    if isinstance(history, (str, os.PathLike)):
        history = opened = _open_history(history)
    elif history is not None and (
        isinstance(history, (type, list)) or not callable(getattr(history, "append", None))
    ):
        raise TypeError(
            f"paramstats.watch: expected a History or a path for history, got {history!r}"
        )
    reading = {
        "params": params,
        "grads": grads,
        "buffers": buffers,
        "include": options.include,
        "exclude": options.exclude or None,
        "correction": correction,
        **({} if details is None else details.arguments()),
        "group": group,
        "async_op": async_op,
    }
    logging = {"key": key, "stats": stats, "totals": totals}
    checks = HealthChecks(on_finding, grads)
    return Watcher(
        source, log, history, every, reading, logging, opened, optimizers, update, checks
    )


def check_options(log: Log | None, every: int, history: object, options: dict[str, Any]) -> None:
    """Raise what `watch` would raise for these arguments, without opening a history's file.

    Trainers' callbacks call it when they are created, before they know the model and the loggers.
    """
    if isinstance(history, (str, os.PathLike)):
        log = log or ignore_scalars
    else:
        options = {**options, "history": history}
    watch(torch.nn.Module(), log, every=every, **options)


def ignore_scalars(scalars: dict[str, float], step: int) -> None:
    """Do nothing; a log for `check_options`."""


def _check_log(log: object) -> None:
    """Raise TypeError if `log` cannot be called as `log(scalars, step)`."""
    if log is None:
        return
    if not callable(log):
        raise TypeError(
            f"paramstats.watch: expected a function of scalars and step for log, got {log!r}"
        )
    try:
        signature = inspect.signature(log, follow_wrapped=False)
    except (TypeError, ValueError):  # some builtins have no signature
        return
    try:
        arguments = signature.bind({}, 0).arguments
    except TypeError:
        arguments = None
    # The second argument of LightningModule.log_dict is not a step.
    if arguments is None or "prog_bar" in arguments:
        raise TypeError(
            f"paramstats.watch: expected log to take (scalars, step), got {log!r}; pass "
            f"log=lambda scalars, step: ... that calls it"
        )


def _open_history(path: str | os.PathLike[str]) -> History | None:
    """Open a new file on rank 0, of the default group or of torchrun before there is a group."""
    if not is_first_rank() or (not has_group() and os.environ.get("RANK", "0") != "0"):
        return None
    from paramstats._history import History

    try:
        return History(path)
    except FileExistsError:
        raise FileExistsError(
            f"paramstats.watch: expected a new file for history, got {os.fspath(path)!r}, which "
            f"exists; pass another path, or, to continue it, "
            f"history=paramstats.History(path, resume=True) and watcher.step(step=number)"
        ) from None
