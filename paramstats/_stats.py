"""The statistics of one tensor, of one parameter, and of all of them as one."""

from __future__ import annotations

from typing import Any

import torch

from paramstats._core import format as rendering
from paramstats._core import moments
from paramstats._core.layout import Layout
from paramstats._core.moments import ROW, Moments, Statistics

STATS = Statistics._fields
"""Every statistic that `scalars` and `to_dict` know."""


class TensorStats:
    """The statistics of one tensor, over all its elements.

    >>> import torch, paramstats
    >>> stats = paramstats.summarize({"w": torch.tensor([0.0, 1.0, -1.0, 1.0, -1.0])})["w"]
    >>> stats.norm, stats.abs_max, stats.zero_count, stats.count
    (2.0, 1.0, 1, 5)

    Statistics are what torch gives: a NaN makes mean, norm, min and max NaN, an infinity the norm
    infinite, std of one element is NaN. `finite` has the same statistics over the finite elements
    alone. Of complex tensors, mean is the modulus of the mean; min, max and abs_max are of moduli.
    """

    __slots__ = ("_correction", "_made", "_state")

    def __init__(self, state: Moments, correction: float) -> None:
        self._state = state
        self._correction = correction
        self._made: Statistics | None = None

    @property
    def _statistics(self) -> Statistics:
        """Made when a statistic is first asked for."""
        if self._made is None:
            self._made = moments.finalize(self._state, self._correction)
        return self._made

    def _identity(self) -> tuple[object, ...]:
        """What makes two of these equal; bytes, so that NaN equals itself."""
        return ROW.pack(*self._state), self._correction

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(self._statistics.count)

    @property
    def mean(self) -> float:
        return self._statistics.mean

    @property
    def std(self) -> float:
        """Standard deviation, with the `correction` that `summarize` was given."""
        return self._statistics.std

    @property
    def var(self) -> float:
        return self._statistics.var

    @property
    def norm(self) -> float:
        """L2 norm: the square root of the sum of squares."""
        return self._statistics.norm

    @property
    def rms(self) -> float:
        """Root mean square: norm / sqrt(count)."""
        return self._statistics.rms

    @property
    def min(self) -> float:
        return self._statistics.min

    @property
    def max(self) -> float:
        return self._statistics.max

    @property
    def abs_max(self) -> float:
        return self._statistics.abs_max

    @property
    def zero_count(self) -> int:
        return int(self._statistics.zero_count)

    @property
    def zero_fraction(self) -> float:
        """Share of the elements that are zero, 0 to 1."""
        return self._statistics.zero_fraction

    @property
    def nan_count(self) -> int:
        return int(self._statistics.nan_count)

    @property
    def pos_inf_count(self) -> int:
        return int(self._statistics.pos_inf_count)

    @property
    def neg_inf_count(self) -> int:
        return int(self._statistics.neg_inf_count)

    @property
    def nonfinite_count(self) -> int:
        return int(self._statistics.nonfinite_count)

    @property
    def finite(self) -> TensorStats:
        """The same statistics over the finite elements alone."""
        statistics = moments.finalize_finite(self._state, self._correction)
        count = int(statistics.count)
        finite = TensorStats(
            self._state._replace(count=count, nans=0, pos_infs=0, neg_infs=0), self._correction
        )
        finite._made = statistics
        return finite

    def to_dict(self) -> dict[str, float]:
        """Every statistic by name; counts are int."""
        return {stat: getattr(self, stat) for stat in STATS}

    def __repr__(self) -> str:
        return f"<{rendering.one_line(self)}>"


class ParamStats(TensorStats):
    """The statistics of one parameter (or buffer), with what it is and the statistics of its gradient.

    >>> import torch, paramstats
    >>> entry = paramstats.summarize(torch.nn.Linear(3, 2))["weight"]
    >>> entry.shape, entry.dtype, entry.requires_grad, entry.grad
    ((2, 3), torch.float32, True, None)
    """

    __slots__ = ("_grad", "_layout", "_row")

    def __init__(
        self,
        state: Moments,
        correction: float,
        layout: Layout,
        row: int,
        grad: TensorStats | None,
    ) -> None:
        super().__init__(state, correction)
        self._layout = layout
        self._row = row
        self._grad = grad

    @property
    def name(self) -> str:
        return self._layout.names[self._row]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """None while a lazy parameter has no shape."""
        return self._layout.shapes[self._row]

    @property
    def dtype(self) -> torch.dtype:
        return self._layout.dtypes[self._row]

    @property
    def device(self) -> torch.device:
        return self._layout.devices[self._row]

    @property
    def requires_grad(self) -> bool:
        return self._layout.requires_grad[self._row]

    @property
    def aliases(self) -> tuple[str, ...]:
        """The other names of a tied parameter."""
        return self._layout.aliases[self._row]

    @property
    def kind(self) -> str:
        """ "param" or "buffer"."""
        return self._layout.kind(self._row)

    @property
    def grad(self) -> TensorStats | None:
        """None where there is no gradient, which is not the same as one of zeros."""
        return self._grad

    def _identity(self) -> tuple[object, ...]:
        return *super()._identity(), self._layout.row(self._row), self._grad

    def to_dict(self) -> dict[str, Any]:
        """What it is, its statistics, and those of `grad` (None, or a dict); of JSON's types."""
        return {
            "shape": None if self.shape is None else list(self.shape),
            "dtype": rendering.dtype_name(self.dtype),
            "device": str(self.device),
            "requires_grad": self.requires_grad,
            "aliases": list(self.aliases),
            "kind": self.kind,
            **super().to_dict(),
            "grad": None if self.grad is None else self.grad.to_dict(),
        }


class TotalStats(TensorStats):
    """All parameters as one, and in `grad` all gradients as one (None where there are none)."""

    __slots__ = ("_grad",)

    def __init__(self, state: Moments, correction: float, grad: TensorStats | None) -> None:
        super().__init__(state, correction)
        self._grad = grad

    @property
    def grad(self) -> TensorStats | None:
        return self._grad

    def _identity(self) -> tuple[object, ...]:
        return *super()._identity(), self._grad

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "grad": None if self.grad is None else self.grad.to_dict(),
        }
