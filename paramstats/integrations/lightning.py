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
from paramstats._watch import Appendable, Log, Watcher, check_options, ignore_scalars, watch

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
        options: the other arguments of `paramstats.watch`: `key`, `stats`, `include`, ...

    Gradients are those of a whole batch, unscaled and not clipped. Names are those of the
    LightningModule's parameters. If several optimizers step within a batch, the summary is taken at
    the first step. Use `paramstats.watch` in `training_step` to summarize each optimizer's step, or
    where you clip gradients yourself.

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
        **options: Any,
    ) -> None:
        super().__init__()
        self._log = log
        self._history = history
        self._options: dict[str, Any] = {"every": every, "history": history, **options}
        check_options(log or ignore_scalars, every, history, options)
        self._watcher: Watcher | None = None
        self._is_taken = False

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
        self._watcher = watch(pl_module, log, **self._options)

    def on_train_batch_start(self, *_: Any) -> None:
        self._is_taken = False

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._is_taken or self._watcher is None:
            return
        self._is_taken = True
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler = 1.0
        self._watcher.step(grad_scale=scaler, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watcher is not None:
            self._watcher.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, error: Any) -> None:
        if self._watcher is not None:
            self._watcher.__exit__(type(error), error, None)


def _to_loggers(trainer: Trainer, scalars: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step)
