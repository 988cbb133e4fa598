"""What an optimizer knows of a parameter: `OptimizerStats`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from paramstats._core.optimizer_record import OptimizerRecord
from paramstats._core.optimizers import MOMENTA
from paramstats._core.updates import (
    GRAD_MOMENTUM,
    LAG,
    ROWS,
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
        record, row = self._record, self._row
        found = {}
        for column, key in enumerate(record.keys, len(ROWS)):
            if record.has(column, row):
                index = record.position(column, row)
                found[key] = TensorStats(record.table, index, self._correction, 1.0)
        return MappingProxyType(found)

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
        step = self.state.get("step")
        return round(step.mean) if step is not None and math.isfinite(step.mean) else None

    @property
    def update_method(self) -> str | None:
        """How the update was found; None if it was not.

        "formula": from the state of Adam. It is exact up to the rounding of the parameter. "copy":
        from a copy of the parameter before the step. It is exact. "no gradient": the parameter had
        no gradient, so that it did not change.
        """
        return self._record.methods[self._row] or None if self._of.update is not None else None

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
            column, other = GRAD_MOMENTUM, self.state.get(key)
            if self.momentum != key:
                other = None
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
        count = self._of.count
        state = self.state
        return next((key for key in MOMENTA if key in state and state[key].count == count), None)

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

    def has(self, row: int) -> bool:
        """Return whether a row of `updates.ROWS` was computed."""
        return self._record.has(row, self._row)

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
        return f"<OptimizerStats of {', '.join(self.state)}>"


def optimizer_scalars(
    of: TotalStats, name: str, key: str, stats: Sequence[str], columns: bytes
) -> list[tuple[str, float]]:
    """Return the logger keys and values of what the optimizer knows of one entry of a summary.

    Args:
        of, name: the entry.
        key, stats: as in `Summary.scalars`.
        columns: the positions of `stats` in `Statistics`.
    """
    out: list[tuple[str, float]] = []

    def add(kind: str, stat: str, value: float) -> None:
        out.append((key.format(kind=kind, stat=stat, name=name), value))

    def add_all(kind: str, tensor: TensorStats) -> None:
        if tensor.is_read():
            values = tensor.statistics()
            for stat, column in zip(stats, columns, strict=True):
                add(kind, stat, values[column])

    optimizer, update = of.optimizer, of.update
    if update is not None:
        add_all("update", update)
        add("update", "ratio", of.update_ratio)
    if optimizer is None:
        return out
    for state_key, tensor in optimizer.state.items():
        if state_key != "step":
            add_all(state_key, tensor)
    if optimizer.has(UPDATE_GRAD):
        add("update", "cosine_grad", optimizer.cosine("update", "grad"))
    momentum = optimizer.momentum
    if momentum is not None and optimizer.has(GRAD_MOMENTUM):
        add("grad", f"cosine_{momentum}", optimizer.cosine("grad", momentum))
    if optimizer.has(LAG):
        add("optimizer", "rms", optimizer.rms)
        add("optimizer", "eps_fraction", optimizer.eps_fraction)
    return out
