"""`Watcher`: takes summaries of a model while it trains, for a logger and a history."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from paramstats._core.optimizer_state import unwrapped
from paramstats._core.optimizers import Request, make_request
from paramstats._core.options import Scaler, scale_of
from paramstats._core.shard import LocalShard
from paramstats._core.torch_private import skip_dynamo
from paramstats._health_checks import HealthChecks
from paramstats._optimizer_hooks import (
    OptimizerHooks,
    UpdateMethod,
    selected_tensors,
    tensors_of_step,
)
from paramstats._rounds import Rounds
from paramstats._summarize import summarize
from paramstats._summary import Summary, is_ready_within

if TYPE_CHECKING:
    from paramstats._history import History

Watched = torch.nn.Module | Mapping[str, torch.Tensor | LocalShard]


class Log(Protocol):
    """A function that takes scalars, such as `wandb.log` or `mlflow.log_metrics`."""

    def __call__(self, scalars: dict[str, float], step: int, /) -> object: ...


class Appendable(Protocol):
    """A store of summaries, such as `History`; `append` must not wait for their statistics."""

    def append(self, step: int, summary: Summary, /) -> object: ...


class Watcher:
    """The object that `watch` returns.

    Without `watch(optimizer=...)`, call its `step` once per optimizer step.

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
        optimizers: tuple[torch.optim.Optimizer, ...] = (),
        update: UpdateMethod = "auto",
        checks: HealthChecks | None = None,
    ) -> None:
        self._source = source
        self._log = log
        self._history = history
        self._reading = reading
        self._logging = logging
        self._opened = opened
        self._checks = checks or HealthChecks(None, False)
        self._rounds = Rounds(every, max(1, len(optimizers)), self.give)
        self._unlogged: tuple[int, Summary] | None = None
        self._summary: Summary | None = None
        self._logged: Summary | None = None  # while `log` runs
        self._separate: tuple[torch.optim.Optimizer, ...] = ()
        self._hooks: OptimizerHooks | None = None
        if optimizers:
            self._hooks = OptimizerHooks(source, optimizers, update, reading, self._rounds)
            if self._checks.need_statistics and reading["params"]:
                self._hooks.before_next = self._check_before

    def __repr__(self) -> str:
        source, rounds = type(self._source).__name__, self._rounds
        return f"<Watcher of a {source}, every {rounds.every} steps, at step {rounds.number}>"

    @property
    def copy_bytes(self) -> int:
        """The memory that copies of parameters take during a due step, in bytes on this rank.

        0 where updates are computed from Adam's state, or not at all; see `watch(update=...)`.
        """
        return 0 if self._hooks is None else self._hooks.copy_bytes()

    @property
    def summary(self) -> Summary | None:
        """The latest summary; None before the first. While `log` runs, the one that is logged.

        With several optimizers, it has the parameters of those that have made this step.
        """
        if self._logged is not None:
            return self._logged
        unfinished = self._rounds.summary()
        return self._summary if unfinished is None else unfinished

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
            optimizer: the optimizer of these gradients; needed after `separate`, or if several
                optimizers share the scaler.

        Raises:
            RuntimeError: `watch` was given the optimizer, whose steps are watched.
            ValueError: the scaler has unscaled gradients since its last `update`.

        It also raises what `summarize` and `log` raise. Statistics are passed to `log` only once;
        the next call continues with the next step.
        """
        if self._hooks is not None:
            raise RuntimeError(
                "paramstats.Watcher.step: expected a watcher without optimizer, got one that "
                "watches the steps of its optimizer; remove this call, or optimizer= of watch"
            )
        if self._separate:
            self._step_of(self._separate.index(unwrapped(optimizer)), grad_scale, step)
        elif self.is_due(step):
            self.give(self._rounds.number, self.take(grad_scale, optimizer))
        elif self._unlogged is not None:
            self.flush()

    def is_due(self, step: int | None = None) -> bool:
        """Count a step and return whether a summary is due.

        `step` calls `is_due`, `take` and `give`. Callbacks that summarize and log at different
        times call these three methods directly.
        """
        return self._rounds.begin(0, step)

    def take(
        self, grad_scale: float | Scaler = 1.0, optimizer: torch.optim.Optimizer | None = None
    ) -> Summary:
        """Return a summary of the model as it is now; arguments as in `step`."""
        scale = scale_of(grad_scale, optimizer)
        return summarize(self._source, grad_scale=scale, **self._reading)

    def number_with(self, number: Callable[[], int]) -> None:
        """Number the steps of optimizers with a function, which returns that of the next step.

        Trainers count steps, too, and continue to count after a restart.
        """
        self._rounds.number_with = number

    def separate(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Read the parameters of several optimizers each at a step of its own.

        The gradients of the others may be old then, as in the training of a GAN. Call `step` before
        the step of each optimizer, and give it the optimizer. What is logged has one step of each.
        """
        self._separate = make_request(optimizers, "Watcher.separate").optimizers
        self._rounds = Rounds(self._rounds.every, len(self._separate), self.give)

    def _step_of(self, i: int, grad_scale: float | Scaler, step: int | None) -> None:
        """Count a step of one of the separate optimizers, and read its parameters if it is due."""
        self.flush()
        if self._rounds.begin(i, step):
            scale = scale_of(grad_scale, self._separate[i])
            layout, tensors = selected_tensors(self._source, self._reading)
            only = tensors_of_step(self._separate, i, set(map(id, tensors)))
            request = Request((), only=only)
            reading = {**self._reading, "optimizer": request, "grad_scale": scale}
            self._rounds.add(summarize(self._source, **reading), layout)

    def give(self, step: int, summary: Summary) -> None:
        """Append a summary to the history, log it and check it."""
        self._summary = summary
        if not is_first_rank():
            return
        if self._history is not None:
            self._history.append(step, summary)
        if self._hooks is None:  # an optimizer may clear gradients in its step
            self._checks.warn_without_gradients(step, summary)
        if self._log is not None or self._checks.need_statistics:
            unlogged, self._unlogged = self._unlogged, (step, summary)  # kept if logging raises
            self._send(unlogged)
            if summary.ready():
                self.flush()
            elif self._hooks is not None:
                self._hooks.before_next = self.flush

    def _check_before(self) -> None:
        """Read the parameters before the first step: NaN in them is not the optimizer's fault."""
        selection = {name: self._reading[name] for name in ("include", "exclude")}
        if is_first_rank() and not selected_tensors(self._source, self._reading)[0].is_sharded:
            self._checks.add_before(summarize(self._source, grads=False, **selection))

    def flush(self) -> None:
        """Wait for what has not been logged yet, and log it."""
        unlogged, self._unlogged = self._unlogged, None
        self._send(unlogged)

    def close(self) -> None:
        """Log what has not been logged yet, and close a history that `watch` has opened.

        Steps of the optimizer are not watched any more.
        """
        if self._hooks is not None:
            self._hooks.remove()
        try:
            self._rounds.finish()
            self.flush()
            self._checks.finish()
            self._checks.report()
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
        else:
            if self._hooks is not None:
                self._hooks.remove()
            if self._opened is not None:
                self._opened.__exit__(kind, error, trace)

    def _send(self, unlogged: tuple[int, Summary] | None) -> None:
        if unlogged is None:
            self._checks.report()  # what is left after an error
            return
        step, summary = unlogged
        self._checks.add(step, summary)
        outer, self._logged = self._logged, summary  # `log` may call `close`
        try:
            if self._log is not None:
                self._log(summary.scalars(**self._logging), step)
            self._checks.report()
        finally:
            self._logged = outer


def has_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_first_rank() -> bool:
    return not has_group() or torch.distributed.get_rank() == 0
