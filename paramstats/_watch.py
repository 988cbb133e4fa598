"""`watch`: summarize every N steps of a training loop, for a logger and a history."""

from __future__ import annotations

import contextlib
import inspect
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from paramstats._core.options import (
    Pattern,
    Scaler,
    check_keys,
    checked_stats,
    make_options,
    scale_of,
)
from paramstats._core.shard import LocalShard
from paramstats._core.torch_private import skip_dynamo
from paramstats._summarize import summarize
from paramstats._summary import Summary, is_ready_within

if TYPE_CHECKING:
    import torch.distributed as dist

    from paramstats._history import History

Watched = torch.nn.Module | Mapping[str, torch.Tensor | LocalShard]


class Log(Protocol):
    """A function that takes scalars, such as `wandb.log` or `mlflow.log_metrics`."""

    def __call__(self, scalars: dict[str, float], step: int, /) -> object: ...


class Appendable(Protocol):
    """A store of summaries, such as `History`; `append` must not wait for their statistics."""

    def append(self, step: int, summary: Summary, /) -> object: ...


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
) -> Watcher:
    """Log the statistics of a model while it trains, with one call in the training loop.

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
            each multiple of this number.
        history: a `History`, whose `append(step, summary)` is called on rank 0 before anything is
            logged; or the path of a new file, which is opened as `History(path)` on rank 0. Before
            the process group exists, the rank is that of torchrun (RANK). Pass
            `history=History(path, resume=True)` to continue an existing file, and number the steps
            with `Watcher.step(step=)`.
        key, stats, totals: what is logged and under which keys; see `Summary.scalars`.
        params, grads, buffers, include, exclude, correction, group, async_op: see `summarize`.

    Raises:
        FileExistsError: `history` is the path of a file with content.
        TypeError: `source` is neither a module nor a mapping, or `log` is not a function of
            scalars and step.
        ValueError: `every` is not a whole number > 0, neither `log` nor `history` is given, or an
            argument that `scalars` or `summarize` would refuse.
    """
    if not isinstance(source, (torch.nn.Module, Mapping)):
        raise TypeError(
            "paramstats.watch: expected a module or a mapping of names to tensors, "
            f"got {type(source).__name__}; pass the model"
        )
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"paramstats.watch: expected a whole number > 0 for every, got {every!r}")
    if log is None and history is None:
        raise ValueError("paramstats.watch: expected log= or history=, got neither")
    _check_log(log)
    # All ranks check this, so that all raise: only rank 0 logs.
    stats, _ = checked_stats(stats, "watch")
    check_keys(key, stats, totals)
    options = make_options(include, exclude, correction, 1.0, False, group is not None, async_op)
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
        "group": group,
        "async_op": async_op,
    }
    logging = {"key": key, "stats": stats, "totals": totals}
    return Watcher(source, log, history, every, reading, logging, opened)


class Watcher:
    """The object that `watch` returns; call its `step` once per optimizer step.

    >>> import torch, paramstats
    >>> model = torch.nn.Linear(3, 2)
    >>> with paramstats.watch(model, log=print, stats="norm", include="bias") as watcher:
    ...     model(torch.ones(1, 3)).sum().backward()
    ...     watcher.step(step=7)
    ...     watcher.summary["bias"].grad.max  # doctest: +ELLIPSIS
    {'param_norm/bias': ..., 'grad_norm/bias': 1.4142135623730951, ...} 7
    1.0

    Statistics of CPU tensors are logged immediately. Pending statistics from a GPU are logged by
    the next call of `step`, so that the loop does not wait for them. Loggers see the steps in
    order. `close`, or the end of a `with` block, logs the last. If an error ends the block, it
    waits for statistics for a second at most.
    """

    def __init__(
        self,
        source: Watched,
        log: Log | None,
        history: Appendable | None,
        every: int,
        reading: Mapping[str, Any],
        logging: Mapping[str, Any],
        opened: History | None = None,
    ) -> None:
        self._source = source
        self._log = log
        self._history = history
        self._every = every
        self._reading = reading
        self._logging = logging
        self._opened = opened
        self._step = -1
        self._next = 0
        self._unlogged: tuple[int, Summary] | None = None
        self._summary: Summary | None = None

    def __repr__(self) -> str:
        source = type(self._source).__name__
        return f"<Watcher of a {source}, every {self._every} steps, at step {self._step}>"

    @property
    def summary(self) -> Summary | None:
        """The latest summary; None before the first."""
        return self._summary

    @property
    def history(self) -> Appendable | None:
        """The history that summaries are appended to, if there is one on this rank."""
        return self._history

    @skip_dynamo
    def step(
        self,
        *,
        grad_scale: float | Scaler = 1.0,
        step: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Count a step, and take a summary if one is due.

        Call it after backward, before gradients are unscaled, clipped or used. A call that is not
        due costs one comparison. For sharded models it is a collective call: make it on every rank.

        Args:
            grad_scale: the factor that the loss was multiplied by, or the gradient scaler itself.
                The scaler is asked on due steps only, because that makes the CPU wait for the GPU.
                Leave it out after `scaler.unscale_`.
            step: the number of the step; None: the last one plus 1, starting at 0. A number lower
                than the last, as after a restart, is due.
            optimizer: the optimizer of these gradients; needed if several share the scaler.

        Raises:
            ValueError: the scaler has unscaled gradients since its last `update`.

        It also raises what `summarize` and `log` raise. Statistics are passed to `log` only once;
        the next call continues with the next step.
        """
        if self.is_due(step):
            self.give(self._step, self.take(grad_scale, optimizer))
        elif self._unlogged is not None:
            self.flush()

    def is_due(self, step: int | None = None) -> bool:
        """Count a step and return whether a summary is due.

        `step` calls `is_due`, `take` and `give`. Callbacks that summarize and log at different
        times call these three methods directly.
        """
        last = self._step
        self._step = step = last + 1 if step is None else operator.index(step)
        if last <= step < self._next:
            return False
        self._next = step - step % self._every + self._every
        return True

    def take(
        self, grad_scale: float | Scaler = 1.0, optimizer: torch.optim.Optimizer | None = None
    ) -> Summary:
        """Return a summary of the model as it is now; arguments as in `step`."""
        scale = scale_of(grad_scale, optimizer)
        return summarize(self._source, grad_scale=scale, **self._reading)

    def give(self, step: int, summary: Summary) -> None:
        """Append a summary to the history and log it."""
        self._summary = summary
        if not _is_first_rank():
            return
        if self._history is not None:
            self._history.append(step, summary)
        if self._log is not None:
            unlogged, self._unlogged = self._unlogged, (step, summary)  # kept if logging raises
            self._send(unlogged)
            if summary.ready():
                self.flush()

    def flush(self) -> None:
        """Wait for what has not been logged yet, and log it."""
        unlogged, self._unlogged = self._unlogged, None
        self._send(unlogged)

    def close(self) -> None:
        """Log what has not been logged yet, and close a history that `watch` has opened."""
        try:
            self.flush()
            if self._summary is not None:
                with contextlib.suppress(Exception):  # ranks that do not log take part in it, too
                    self._summary.wait()
        finally:
            if self._opened is not None:
                self._opened.close()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # After an error the statistics may never arrive: other ranks may have ended.
        if kind is None or self._summary is None or is_ready_within(self._summary, 1):
            self.close()
        elif self._opened is not None:
            self._opened.__exit__(kind, error, trace)

    def _send(self, unlogged: tuple[int, Summary] | None) -> None:
        if unlogged is not None and self._log is not None:
            step, summary = unlogged
            self._log(summary.scalars(**self._logging), step)


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
    if not _is_first_rank() or (not _has_group() and os.environ.get("RANK", "0") != "0"):
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


def _has_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_first_rank() -> bool:
    return not _has_group() or torch.distributed.get_rank() == 0
