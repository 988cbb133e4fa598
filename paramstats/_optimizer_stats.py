"""What an optimizer knows of a parameter: `OptimizerStats`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from paramstats._core.optimizer_record import MOMENTA, OptimizerRecord
from paramstats._core.updates import (
    GRAD_MOMENTUM,
    LAG,
    UPDATE_GRAD,
    cosine,
    eps_fraction,
    root_mean,
)
from paramstats._tensor_stats import TensorStats

if TYPE_CHECKING:
    from paramstats._stats import TotalStats


class OptimizerStats:
    """The state of a parameter's optimizer, its hyperparameters, and products with the gradient.

    >>> import torch, paramstats
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    >>> model(torch.ones(1, 3)).sum().backward()
    >>> optimizer.step()
    >>> entry = paramstats.summarize(model, optimizer=optimizer)["bias"]
    >>> entry.optimizer.step, entry.optimizer.lr, round(entry.optimizer.state["exp_avg"].mean, 6)
    (1, 0.01, 0.1)
    >>> round(entry.optimizer.cosine("grad", "exp_avg"), 6), round(entry.optimizer.rms, 6)
    (1.0, 1.0)
    """

    __slots__ = ("_correction", "_grad_scale", "_of", "_record", "_row")

    def __init__(
        self,
        record: OptimizerRecord,
        row: int,
        of: TotalStats,
        correction: float,
        grad_scale: float,
    ) -> None:
        self._record = record
        self._row = row
        self._of = of  # the statistics of the parameter
        self._correction = correction
        self._grad_scale = grad_scale

    @property
    def state(self) -> Mapping[str, TensorStats]:
        """The statistics of every tensor and number in the state, by key, such as "exp_avg"."""
        found = {key: self._state_of(key) for key in self._record.keys}
        return MappingProxyType({key: x for key, x in found.items() if x is not None})

    def _state_of(self, key: str) -> TensorStats | None:
        """Return the statistics of one tensor of the state."""
        record, row = self._record, self._row
        column = record.column(key)
        if column is None or not record.has(column, row):
            return None
        return TensorStats(record.table, record.position(column, row), self._correction, 1.0)

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """The numbers of its parameter group, such as "lr"; "beta1" and "beta2" for betas."""
        return MappingProxyType(dict(self._record.hyperparameters[self._row] or {}))

    @property
    def lr(self) -> float:
        """The learning rate; NaN if it is a tensor on a device."""
        return self.hyperparameters.get("lr", math.nan)

    @property
    def weight_decay(self) -> float:
        """The weight decay; 0 if there is none."""
        return self.hyperparameters.get("weight_decay", 0.0)

    @property
    def step(self) -> int | None:
        """How many steps were made with this parameter; None if the optimizer does not count."""
        step = self._state_of("step")
        return round(step.mean) if step is not None and math.isfinite(step.mean) else None

    @property
    def update_method(self) -> str | None:
        """How the update was found; None if it was not.

        "formula": from the state of Adam. It is exact up to the rounding of the parameter. "copy":
        from a copy of the parameter before the step. It is exact. "no gradient": the parameter had
        no gradient, so that it did not change.
        """
        update = self._of.update
        is_known = update is not None and update.is_read()
        return self._record.methods[self._row] if is_known else None

    def cosine(self, a: str, b: str) -> float:
        """Return the cosine of the angle between two tensors, from -1 to 1.

        Args:
            a, b: "grad" and the key of the momentum, such as "exp_avg"; or "update" and "grad".

        NaN if one of them is missing, is zero or has elements that are NaN or infinite.

        Raises:
            ValueError: the cosine of these tensors is not computed.
        """
        grad, names = self._of.grad, {a, b}
        if names == {"update", "grad"}:
            column, other = UPDATE_GRAD, self._of.update
        elif len(names) == 2 and "grad" in names and (names - {"grad"}) & set(MOMENTA):
            (key,) = names - {"grad"}
            column, other = GRAD_MOMENTUM, None
            if self.momentum == key:
                other = self._state_of(key)
        else:
            raise ValueError(
                f"paramstats.OptimizerStats.cosine: expected 'update' and 'grad', or 'grad' and "
                f"one of {', '.join(MOMENTA)}, got {a!r} and {b!r}"
            )
        products = self._record.state(column, self._row)
        if grad is None or other is None or not products.count == grad.count == other.count:
            return math.nan
        return cosine(products, grad.norm, other.norm, self._grad_scale)

    @property
    def momentum(self) -> str | None:
        """The key of the state that is compared with the gradient; None if there is none."""
        return self._record.momentum(self._row, self._of.count)

    @property
    def rms(self) -> float:
        """How far Adam's second moment lags: sqrt(mean(g^2 / max(v, eps^2))).

        v is the bias-corrected second moment. The result is about 1 while gradients keep their
        size. Above it, they grow faster than v follows, which precedes spikes of the loss
        (Wortsman et al. 2023). NaN for other optimizers and without a gradient.
        """
        lag = self._record.state(LAG, self._row)
        return root_mean(lag, self._grad_scale)

    @property
    def eps_fraction(self) -> float:
        """Share of the elements with sqrt(v) < eps, whose updates Adam's eps makes smaller."""
        return eps_fraction(self._record.state(LAG, self._row))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as types that JSON knows."""
        momentum = self.momentum
        return {
            "state": {key: stats.to_dict() for key, stats in self.state.items()},
            "hyperparameters": dict(self.hyperparameters),
            "update_method": self.update_method,
            "cosine_grad_momentum": math.nan if not momentum else self.cosine("grad", momentum),
            "cosine_update_grad": self.cosine("update", "grad"),
            "rms": self.rms,
            "eps_fraction": self.eps_fraction,
        }

    def __repr__(self) -> str:
        numbers = {"lr": self.hyperparameters.get("lr"), "step": self.step}
        known = [f"{name}={value:g}" for name, value in numbers.items() if value is not None]
        keys = [key for key in self.state if key != "step"]
        return f"<OptimizerStats {' '.join(known)} state: {', '.join(keys) or 'none'}>"
