"""The statistics of one parameter, and of all parameters together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from paramstats._core import moments
from paramstats._core.details import NO_DETAILS, Details
from paramstats._core.format import dtype_name, one_line_name, shape
from paramstats._core.moments import ROW
from paramstats._core.optimizer_record import OptimizerRecord
from paramstats._core.record import Record
from paramstats._core.updates import UPDATE, ratio
from paramstats._display import one_tensor
from paramstats._optimizer_stats import OptimizerStats
from paramstats._tensor_stats import TensorStats


class TotalStats(TensorStats):
    """The statistics of all parameters together; `grad` has those of all gradients together."""

    __slots__ = ("_grad", "_grad_scale", "_optimizer", "_row")

    def __init__(
        self,
        table: bytes,
        correction: float,
        grad_scale: float,
        optimizer: OptimizerRecord | None,
        row: int,
        details: Details = NO_DETAILS,
        grad_row: int = 1,
        row_count: int | None = None,
    ) -> None:
        """Create the statistics of two rows: one for the parameters and one for the gradients.

        Args:
            table: the two rows.
            correction, grad_scale: as in `Record`.
            optimizer, row: the record of the optimizers, and the row of these parameters in it.
            details: has what else was read of `row`, and of `grad_row` for the gradients.
            row_count: as in `TensorStats`.
        """
        # Faster than super().
        TensorStats.__init__(self, table, 0, correction, 1.0, details.get(row), row_count)
        self._grad_scale = grad_scale
        self._optimizer = optimizer
        self._row = row
        self._grad: TensorStats | None = None
        if not moments.is_absent(table, 1):
            of_grad = details.get(grad_row)
            self._grad = TensorStats(table, 1, correction, grad_scale, of_grad, row_count)

    @property
    def grad(self) -> TensorStats | None:
        """The statistics of the gradient, or None if there is none."""
        return self._grad

    @property
    def update(self) -> TensorStats | None:
        """The statistics of dw, the change by the last step; None if it is not known.

        `zero_fraction` is the share of the elements that did not change. See
        `OptimizerStats.update_method` for how dw was found and how precise it is.
        """
        record = self._optimizer
        if record is None or not record.has(UPDATE, self._row):
            return None
        return TensorStats(record.table, record.position(UPDATE, self._row), self._correction, 1.0)

    @property
    def update_ratio(self) -> float:
        """The relative size of the last step: the norm of dw divided by that of the parameter.

        The parameter is that after the step. NaN if the update is not known, infinite if the
        parameter is zero.
        """
        update = self.update
        return math.nan if update is None else ratio(update.norm, self.norm)

    @property
    def optimizer(self) -> OptimizerStats | None:
        """What the optimizer knows of it; None without `summarize(optimizer=...)`, or if no
        optimizer has it."""
        record = self._optimizer
        if record is None or record.hyperparameters[self._row] is None:
            return None
        return OptimizerStats(record, self._row, self, self._correction, self._grad_scale)

    def _identity(self) -> tuple[object, ...]:
        record = self._optimizer
        of_optimizer = None if record is None else record.identity(self._row)
        return *super()._identity(), self._grad, of_optimizer

    def to_dict(self) -> dict[str, Any]:
        """Return every statistic by name, and those of `grad` as a dict or None.

        With `summarize(optimizer=...)`, also `update`, `update_ratio` and `optimizer`.
        """
        out = {
            **super().to_dict(),
            "grad": None if self.grad is None else self.grad.to_dict(),
        }
        if self._optimizer is not None:
            update, optimizer = self.update, self.optimizer
            out["update"] = None if update is None else update.to_dict()
            out["update_ratio"] = self.update_ratio
            out["optimizer"] = None if optimizer is None else optimizer.to_dict()
        return out

    def _one_line(self) -> str:
        grad, update = self._grad, self.update
        return (
            super()._one_line()
            + (f" grad({one_tensor.values(grad)})" if grad else "")
            + (f" update({one_tensor.values(update)})" if update else "")
        )

    def _detail_lines(self) -> Iterator[str]:
        yield from super()._detail_lines()
        if self._grad:
            yield from one_tensor.details(self._grad, "grad ")


class ParamStats(TotalStats):
    """The statistics of one parameter or buffer, its properties, and its gradient's statistics.

    >>> import torch, paramstats
    >>> entry = paramstats.summarize(torch.nn.Linear(3, 2))["weight"]
    >>> entry.shape, entry.dtype, entry.requires_grad, entry.grad
    ((2, 3), torch.float32, True, None)

    `grad` is None where there is no gradient, which differs from a gradient of zeros.
    """

    __slots__ = ("_file", "_layout")

    def __init__(self, record: Record, row: int) -> None:
        table, begin = record.table, row * ROW.size
        gradient = len(table) // 2 + begin
        own = table[begin : begin + ROW.size] + table[gradient : gradient + ROW.size]
        numbers = record.correction, record.grad_scale
        grad_row = len(record.layout) + row
        shape = record.layout.shapes[row]
        row_count = None if shape is None else shape[0] if shape else 0
        TotalStats.__init__(
            self, own, *numbers, record.optimizer, row, record.details, grad_row, row_count
        )
        self._layout = record.layout
        self._file = record.file

    @property
    def name(self) -> str:
        """The name of the tensor; for a tied parameter, its first name."""
        return self._layout.names[self._row]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape; None for a lazy parameter that has none yet."""
        return self._layout.shapes[self._row]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the elements."""
        return self._layout.dtypes[self._row]

    @property
    def device(self) -> torch.device:
        """The device that holds the tensor."""
        return self._layout.devices[self._row]

    @property
    def requires_grad(self) -> bool:
        """Whether the tensor requires a gradient."""
        return self._layout.requires_grad[self._row]

    @property
    def aliases(self) -> tuple[str, ...]:
        """The other names of a tied parameter."""
        return self._layout.aliases[self._row]

    @property
    def kind(self) -> str:
        """Either "param" or "buffer"; for a checkpoint file "param", "optimizer" or "other"."""
        return self._layout.kind(self._row) if self._file is None else self._file.kind(self.name)

    def _identity(self) -> tuple[object, ...]:
        return *super()._identity(), self._layout.row(self._row)

    def to_dict(self) -> dict[str, Any]:
        """Return its properties, its statistics and those of `grad`, as types that JSON knows."""
        return {
            "shape": None if self.shape is None else list(self.shape),
            "dtype": dtype_name(self.dtype),
            "device": str(self.device),
            "requires_grad": self.requires_grad,
            "aliases": list(self.aliases),
            "kind": self.kind,
            **super().to_dict(),
        }

    def _one_line(self) -> str:
        device = "" if self.device.type == "cpu" else f" {self.device}"
        count = f" n={self.count:,}" if self.shape is not None and len(self.shape) > 1 else ""
        what = f"{one_line_name(self.name)}: {dtype_name(self.dtype)} {shape(self.shape)}"
        return f"{what}{count}{device} {super()._one_line()}"


def with_distribution(record: Record) -> Iterator[tuple[int, bool, TensorStats]]:
    """Yield (row of a tensor, whether it is the gradient, statistics) of all distributions."""
    for row, one in sorted(record.details.items()):
        if one.distribution is not None:
            is_grad, tensor = divmod(row, len(record.layout))
            scale = record.grad_scale if is_grad else 1.0
            stats = TensorStats(record.table, row, record.correction, scale, one)
            yield tensor, bool(is_grad), stats
