"""The callback for Lightning's Trainer, of `lightning` or of `pytorch_lightning`.

Lightning calls `on_before_optimizer_step` where gradients are accumulated, averaged over processes,
unscaled, and not clipped yet: the moment that statistics are wanted of. Only optimizers that unscale
while they step (fused ones) are met before that; the scale is then asked of the precision plugin.
"""

from __future__ import annotations

import functools
import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from paramstats._core.optional import import_optional
from paramstats._watch import Appendable, Log, Watcher, watch

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    # Where both are installed, the one that is in use. (A Trainer takes the other's, too.)
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
        every: the first optimizer step is due, and then each whose `trainer.global_step` is a
            multiple of this.
        log: as `paramstats.watch` takes it; None: `log_metrics` of all the trainer's loggers.
        history: as `paramstats.watch` takes it.
        options: the rest of what `paramstats.watch` takes: `key`, `stats`, `include`, ...

    Gradients are those of a whole batch before clipping, unscaled. Names are those of the
    LightningModule's parameters. Of several optimizers' steps within a batch the first one counts;
    where they take turns, `paramstats.watch` in `training_step` shows each at its own moment, as
    it does where gradients are clipped by hand.

    Raises:
        TypeError, ValueError: as `paramstats.watch`.
        ValueError: when training starts, if neither a log nor a history nor a logger is there.
    """

    def __init__(
        self, every: int = 50, *, log: Log | None = None, history: Appendable | str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self._log = log
        self._history = history
        self._options: dict[str, Any] = {"every": every, "history": history, **options}
        watch(torch.nn.Module(), log or _nowhere, **self._options)  # wrong ones are told from here
        self._watcher: Watcher | None = None
        self._is_done = False

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
        self._is_done = False

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._is_done or self._watcher is None:
            return
        self._is_done = True
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


def _nowhere(scalars: dict[str, float], step: int) -> None:
    """Stands for a log until there is one."""
