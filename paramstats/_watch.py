"""Summaries at every so many steps of a training loop, handed to a logger and a history."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from paramstats._core.layout import compile_patterns
from paramstats._core.shard import LocalShard
from paramstats._core.torch_private import skip_dynamo
from paramstats._summarize import Pattern, summarize
from paramstats._summary import Summary

if TYPE_CHECKING:
    import torch.distributed as dist

Watched = torch.nn.Module | Mapping[str, torch.Tensor | LocalShard]


class Log(Protocol):
    """What takes scalars: `wandb.log`, `mlflow.log_metrics`, a Lightning logger's `log_metrics`."""

    def __call__(self, scalars: dict[str, float], step: int, /) -> object: ...


class History(Protocol):
    """What keeps summaries; `append` must not wait for their statistics."""

    def append(self, step: int, summary: Summary, /) -> object: ...


class Scaler(Protocol):
    """A gradient scaler, such as `torch.amp.GradScaler`."""

    def get_scale(self) -> float: ...


def watch(
    source: Watched,
    log: Log | None = None,
    *,
    every: int = 50,
    history: History | None = None,
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
    """Has the statistics of a model logged as it trains, by one call in the loop.

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
        log: called with `Summary.scalars()` and the step, both positional: `wandb.log`,
            `mlflow.log_metrics` and Lightning loggers' `log_metrics` fit as they are. Of several
            processes only rank 0 of the default group calls it.
        every: the first call of `Watcher.step` is due, and then the one at each multiple of this.
        history: its `append(step, summary)` is called, on rank 0, before anything is logged.
        key, stats, totals: what is logged, and as what: see `Summary.scalars`.
        params, grads, buffers, include, exclude, correction, group, async_op: see `summarize`.

    Raises:
        TypeError: `source` is neither a module nor a mapping; `log` cannot be called.
        ValueError: `every` is no whole number > 0; neither `log` nor `history` is there; a key,
            stat, pattern or correction that `scalars` or `summarize` would refuse.
    """
    if not isinstance(source, (torch.nn.Module, Mapping)):
        raise TypeError(
            "paramstats.watch: expected a module or a mapping of names to tensors, "
            f"got {type(source).__name__}"
        )
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"paramstats.watch: expected a whole number > 0 for every, got {every!r}")
    if log is None and history is None:
        raise ValueError("paramstats.watch: expected log= or history=, got neither")
    if history is not None and not callable(getattr(history, "append", None)):
        raise TypeError(f"paramstats.watch: expected a History for history, got {history!r}")
    if log is not None and not callable(log):
        raise TypeError(
            f"paramstats.watch: expected a function of scalars and step for log, got {log!r}"
        )
    logging: dict[str, Any] = {"key": key, "stats": stats, "totals": totals}
    # What rank 0 alone would stumble over while it logs is said by all, before they train.
    probe = torch.ones(1, requires_grad=True)
    probe.grad = torch.ones(1)
    summarize({"weight": probe}, correction=correction).scalars(**logging)
    reading = {
        "params": params,
        "grads": grads,
        "buffers": buffers,
        "include": None if include is None else compile_patterns(include, "include"),
        "exclude": None if exclude is None else compile_patterns(exclude, "exclude"),
        "correction": correction,
        "group": group,
        "async_op": async_op,
    }
    return Watcher(source, log, history, every, reading, logging)


class Watcher:
    """What `watch` returns: `step` is called once for each optimizer step.

    >>> import torch, paramstats
    >>> model = torch.nn.Linear(3, 2)
    >>> with paramstats.watch(model, log=print, stats="norm", include="bias") as watcher:
    ...     model(torch.ones(1, 3)).sum().backward()
    ...     watcher.step(step=7)
    ...     watcher.summary["bias"].grad.max  # doctest: +ELLIPSIS
    {'param_norm/bias': ..., 'grad_norm/bias': 1.4142135623730951, ...} 7
    1.0

    Statistics that are ready when they are taken, as those of tensors on the CPU, are logged at once.
    Others are logged by the next call of `step`: by then the device has another step's work to do
    while this one waits for the last one's statistics, and loggers still meet steps in order. The
    last are logged by `close`, or when a `with` block ends.
    """

    def __init__(
        self,
        source: Watched,
        log: Log | None,
        history: History | None,
        every: int,
        reading: Mapping[str, Any],
        logging: Mapping[str, Any],
    ) -> None:
        self._source = source
        self._log = log
        self._history = history
        self._every = every
        self._reading = reading
        self._logging = logging
        self._step = -1
        self._next = 0
        self._late: tuple[int, Summary] | None = None
        self._summary: Summary | None = None

    def __repr__(self) -> str:
        what = type(self._source).__name__
        return f"<Watcher of a {what}, every {self._every} steps, at step {self._step}>"

    @property
    def summary(self) -> Summary | None:
        """The latest; None before the first."""
        return self._summary

    @skip_dynamo
    def step(
        self,
        *,
        grad_scale: float | Scaler = 1.0,
        step: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Summarizes if a summary is due; else it costs a comparison.

        Call it after backward and before gradients are unscaled, clipped or used. On every
        process: of sharded models it is a collective call.

        Args:
            grad_scale: what the loss was multiplied by: a gradient scaler, which is asked on due
                steps only (on a GPU it makes the caller wait), or its `get_scale()`. Nothing where
                `unscale_` has been called already.
            optimizer: whose gradients these are, where a scaler serves several.
            step: its number; None: one more than the last, from 0. A number lower than the last,
                as after a restart, is due.

        Raises:
            ValueError: the scaler has unscaled gradients since its last `update`.
            Whatever `summarize` and `log` raise. Statistics are not offered to `log` twice; the next
            call goes on with the next step.
        """
        if self.is_due(step):
            self.give(self._step, self.take(grad_scale, optimizer))
        elif self._late is not None:
            self._log_late()

    def is_due(self, step: int | None = None) -> bool:
        """Counts a step, and tells whether it is one to summarize: the first part of `step`, for
        callers that must `take` and `give` at two places."""
        last = self._step
        self._step = step = last + 1 if step is None else operator.index(step)
        if last < step < self._next:
            return False
        self._next = step - step % self._every + self._every
        return True

    def take(
        self, grad_scale: float | Scaler = 1.0, optimizer: torch.optim.Optimizer | None = None
    ) -> Summary:
        """A summary of this moment: the second part of `step`."""
        scale = _scale(grad_scale, optimizer)
        return summarize(self._source, grad_scale=scale, **self._reading)

    def give(self, step: int, summary: Summary) -> None:
        """Keeps and logs a summary: the third part of `step`."""
        self._summary = summary
        if not _is_first_process():
            return
        if self._history is not None:
            self._history.append(step, summary)
        if self._log is not None:
            late, self._late = self._late, (step, summary)  # kept also if logging the last fails
            self._send(late)
            if summary.ready():
                self._log_late()

    def close(self) -> None:
        """Logs what is not logged yet, and waits for it."""
        self._log_late()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # After an error statistics may never come: other processes may have ended.
        if kind is None or (self._late is not None and self._late[1].ready()):
            self.close()

    def _log_late(self) -> None:
        late, self._late = self._late, None
        self._send(late)

    def _send(self, late: tuple[int, Summary] | None) -> None:
        if late is not None and self._log is not None:
            step, summary = late
            self._log(summary.scalars(**self._logging), step)


def _scale(grad_scale: float | Scaler, optimizer: torch.optim.Optimizer | None) -> float:
    """The number; refuses a scaler whose scale is not that of the gradients any more."""
    if not hasattr(grad_scale, "get_scale"):
        return grad_scale
    # By optimizer, since the last update; torch has no public word for it.
    states: Mapping[int, Any] = getattr(grad_scale, "_per_optimizer_states", {})
    stages = {
        getattr(state.get("stage"), "name", "READY")
        for owner, state in states.items()
        if optimizer is None or owner == id(optimizer)
    }
    if stages - {"READY"}:
        raise ValueError(
            "paramstats.watch: expected step(grad_scale=scaler) before scaler.unscale_ and "
            "scaler.step, got a scaler that has unscaled gradients; call step earlier, or "
            "leave grad_scale out; where it serves several optimizers, name the one: optimizer="
        )
    return grad_scale.get_scale()


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or (
        distributed.get_rank() == 0
    )
