"""The callback for Lightning's Trainer, from `lightning` or `pytorch_lightning`.

Lightning calls `on_before_optimizer_step` when gradients are accumulated, averaged over ranks and
unscaled, but not clipped yet. Fused optimizers unscale gradients in their step, so that they are
still scaled then; the precision plugin gives the scale.
"""

from __future__ import annotations

import functools
import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from paramstats._core.optional import import_optional
from paramstats._watch import check_options, ignore_scalars, watch
from paramstats._watcher import Appendable, Log, Watcher

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    # If both are installed, use the one that is imported. (A Trainer accepts both callbacks.)
    is_older = "lightning.pytorch" not in sys.modules and (
        "pytorch_lightning" in sys.modules or find_spec("lightning") is None
    )
    is_older = is_older and find_spec("pytorch_lightning") is not None
    name = "pytorch_lightning" if is_older else "lightning.pytorch"
    Callback = import_optional(name, "ParamStatsCallback").Callback


class ParamStatsCallback(Callback):
    """Logs statistics of the parameters and gradients that a Lightning Trainer trains.

    >>> from lightning.pytorch import Trainer
    >>> from paramstats.integrations.lightning import ParamStatsCallback
    >>> trainer = Trainer(callbacks=[ParamStatsCallback(every=50, stats=("norm", "zero_fraction"))])

    Args:
        every: the first optimizer step is summarized, and then each whose `trainer.global_step` is
            a multiple of this number.
        log: a function of scalars and step; default: `log_metrics` of all the trainer's loggers.
        history: a `History` or the path of its file, as in `paramstats.watch`.
        optimizer: also read the optimizers' state and the updates. Summaries are then taken after
            the optimizers' steps.
        options: the other arguments of `paramstats.watch`: `key`, `stats`, `include`,
            `distribution`, `rows`, ...

    Gradients are those of a whole batch, unscaled, and without `optimizer` not clipped yet. Names
    are those of the LightningModule's parameters. Of several optimizers, each parameter is read at
    the step of its own; what is logged has one step of each. Use `paramstats.watch` in
    `training_step` where you clip gradients yourself.

    Raises:
        TypeError, ValueError: as `paramstats.watch`.
        ValueError: when training starts, if there is no log, no history and no logger.
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
        super().__init__()
        if not isinstance(optimizer, bool):
            raise TypeError(
                "paramstats.ParamStatsCallback: expected True or False for optimizer, got "
                f"{type(optimizer).__name__}; the trainer's optimizers are used"
            )
        self._reads_optimizer = optimizer
        self._log = log
        self._history = history
        self._options: dict[str, Any] = {"every": every, "history": history, **options}
        check_options(log or ignore_scalars, every, history, options)
        self._watcher: Watcher | None = None

    @property
    def watcher(self) -> Watcher | None:
        """The watcher of the latest training, with its latest `summary`."""
        return self._watcher

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log = self._log
        if log is None and trainer.loggers:
            log = functools.partial(_to_loggers, trainer)
        if log is None and self._history is None:
            raise ValueError(
                "paramstats.ParamStatsCallback: expected a logger, got Trainer(logger=False); "
                "give log= or history="
            )
        if self._reads_optimizer:
            self._watcher = watch(pl_module, log, optimizer=trainer.optimizers, **self._options)
            self._watcher.number_with(lambda: trainer.global_step)
            return
        self._watcher = watch(pl_module, log, **self._options)
        if len(trainer.optimizers) > 1:
            self._watcher.separate(trainer.optimizers)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._reads_optimizer or self._watcher is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler = 1.0
        step = trainer.global_step
        self._watcher.step(grad_scale=scaler, step=step, optimizer=optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watcher is not None:
            self._watcher.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, error: Any) -> None:
        if self._watcher is not None:
            self._watcher.__exit__(type(error), error, None)


def _to_loggers(trainer: Trainer, scalars: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step)
