"""The callback for the Trainer of `transformers`.

That Trainer has no event between backward and clipping. `on_pre_optimizer_step` comes after
gradients are unscaled and clipped (`max_grad_norm` is 1 by default), and `on_substep_end` is not
called for the last part of an accumulation.

So on due steps, hooks of autograd take the summary at the end of backward (`AfterBackward`); other
steps have no hooks. accelerate's `sync_gradients` identifies the last part of an accumulation.
Gradients are still scaled then; the scaler belongs to the optimizer that accelerate has wrapped.
The summary that was taken last is logged at `on_pre_optimizer_step`.
"""

from __future__ import annotations

import copy
import os
import warnings
from typing import TYPE_CHECKING, Any

from paramstats._core.optional import import_optional
from paramstats._summary import Summary
from paramstats._watch import check_options, watch
from paramstats._watcher import Appendable, Log, Watcher
from paramstats.integrations._after_backward import AfterBackward

if TYPE_CHECKING:
    from accelerate.state import GradientState
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
    from transformers import TrainingArguments as Arguments
else:
    TrainerCallback = import_optional("transformers", "ParamStatsCallback").TrainerCallback
    GradientState = import_optional("accelerate.state", "ParamStatsCallback").GradientState


class ParamStatsCallback(TrainerCallback):
    """Logs statistics of the parameters and gradients that a transformers Trainer trains.

    >>> from paramstats.integrations.transformers import ParamStatsCallback, reporters
    >>> def add_to(trainer):
    ...     log = reporters(trainer)  # wandb, TensorBoard, ...: what report_to names
    ...     trainer.add_callback(ParamStatsCallback(every=50, log=log, stats=("norm",)))

    Args:
        every: the first optimizer step is summarized, and then each whose number is a multiple of
            this number. Steps are numbered from 1, as in the Trainer's own logs.
        log: a function of scalars and step, such as `reporters(trainer)`.
        history: a `History` or the path of its file, as in `paramstats.watch`.
        optimizer: also read the optimizer's state and the updates. Summaries are then taken after
            the optimizer's steps.
        options: the other arguments of `paramstats.watch`: `key`, `stats`, `include`,
            `distribution`, `rows`, ...

    Gradients are those of a whole batch, averaged over ranks, unscaled, and without `optimizer` not
    clipped yet. Names are those of the model that the Trainer was given.

    Raises:
        TypeError, ValueError: as `paramstats.watch`.
    """

    def __init__(
        self,
        every: int = 50,
        *,
        log: Log | None = None,
        history: Appendable | str | os.PathLike[str] | None = None,
        optimizer: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(optimizer, bool):
            raise TypeError(
                "paramstats.ParamStatsCallback: expected True or False for optimizer, got "
                f"{type(optimizer).__name__}; the trainer's optimizers are used"
            )
        self._reads_optimizer = optimizer
        self._options: dict[str, Any] = {"log": log, "every": every, "history": history, **options}
        check_options(log, every, history, options)
        self._watcher: Watcher | None = None
        self._hooks: AfterBackward | None = None
        self._scaler: Any = None
        self._taken: Summary | None = None

    @property
    def watcher(self) -> Watcher | None:
        """The watcher of the latest training, with its latest `summary`."""
        return self._watcher

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._watcher is not None:  # an earlier training may have failed; its hooks are removed
            self._watcher.close()
        if not self._reads_optimizer:
            self._watcher = watch(kwargs["model"], **self._options)
            return
        self._watcher = watch(kwargs["model"], optimizer=kwargs["optimizer"], **self._options)
        self._watcher.number_with(lambda: state.global_step + 1)

    def on_step_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._unhook()
        if self._reads_optimizer or self._watcher is None:
            return
        if self._watcher.is_due(state.global_step + 1):
            self._scaler = getattr(kwargs["optimizer"], "scaler", None)
            self._hooks = AfterBackward(kwargs["model"].parameters(), self._take)

    def _take(self) -> None:
        if self._watcher is not None and GradientState().sync_gradients:
            self._taken = self._watcher.take(1.0 if self._scaler is None else self._scaler)

    def on_pre_optimizer_step(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._reads_optimizer or self._watcher is None:
            return
        is_due, taken = self._hooks is not None, self._taken
        self._unhook()
        if taken is not None:
            self._watcher.give(state.global_step + 1, taken)
            return
        self._watcher.flush()  # the last summary is complete by now
        if is_due:
            warnings.warn(
                "paramstats.ParamStatsCallback: nothing is logged at step "
                f"{state.global_step + 1}, because no hook saw a gradient; "
                "FullyShardedDataParallel and DeepSpeed are not supported here",
                RuntimeWarning,
                stacklevel=2,
            )

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_training_stop:  # reporters are closed at on_train_end
            self.on_train_end(args, state, control)

    def on_train_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._unhook()
        if self._watcher is not None:
            self._watcher.close()

    def _unhook(self) -> None:
        hooks, self._hooks, self._taken = self._hooks, None, None
        if hooks is not None:
            hooks.remove()


def reporters(trainer: Trainer) -> Log:
    """Return a log for `ParamStatsCallback` that writes to everything in the Trainer's `report_to`.

    >>> from paramstats.integrations.transformers import ParamStatsCallback, reporters
    >>> def add_to(trainer):
    ...     trainer.add_callback(ParamStatsCallback(log=reporters(trainer)))

    `Trainer.log` would also print every statistic and keep it in `log_history`. The reporters put
    `train/` before the keys, as they do for the Trainer's own.

    Raises:
        ValueError: the Trainer has no reporter because its `report_to` is empty.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    kinds = tuple(set(INTEGRATION_TO_CALLBACK.values()))

    def found() -> list[Any]:
        return [one for one in trainer.callback_handler.callbacks if isinstance(one, kinds)]

    if not found():
        raise ValueError(
            "paramstats.reporters: expected a Trainer with reporters, "
            f"got report_to={trainer.args.report_to!r}; name one there, such as 'tensorboard'"
        )

    def log(scalars: dict[str, float], step: int) -> None:
        state = copy.copy(trainer.state)
        state.global_step = step
        for one in found():
            one.on_log(
                trainer.args, state, trainer.control, logs=dict(scalars), model=trainer.model
            )

    return log
