"""What an optimizer knows of a parameter over a history: arrays where a summary has numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from paramstats._core.moments import NAN
from paramstats._history.tensor_series import Array, TensorSeries
from paramstats._optimizer_stats import OptimizerStats


class OptimizerSeries:
    """The state and the hyperparameters of a parameter's optimizer at every step.

    >>> import torch, paramstats
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    >>> history = paramstats.History()
    >>> for step in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(1, 3)).sum().backward()
    ...     optimizer.step()
    ...     history.append(step, paramstats.summarize(model, optimizer=optimizer))
    >>> series = history["bias"].optimizer
    >>> series.step, series.hyperparameters["lr"], series.state["exp_avg"].mean.round(3)
    (array([1., 2., 3.]), array([0.01, 0.01, 0.01]), array([0.1  , 0.19 , 0.271]))

    The names are those of `OptimizerStats`. Arrays are NaN where something is not known.
    """

    __slots__ = ("_stats", "steps")

    def __init__(
        self, steps: npt.NDArray[np.int64], stats: Sequence[OptimizerStats | None]
    ) -> None:
        self.steps = steps
        self._stats = stats

    @property
    def state(self) -> Mapping[str, TensorSeries]:
        """The statistics of each tensor of the state, by every key that any step has."""
        states = [{} if one is None else one.state for one in self._stats]
        keys = dict.fromkeys(key for state in states for key in state)
        return MappingProxyType(
            {key: TensorSeries(self.steps, [state.get(key) for state in states]) for key in keys}
        )

    @property
    def hyperparameters(self) -> Mapping[str, Array]:
        """The numbers of its parameter group, by every name that any step has, such as "lr"."""
        groups = [{} if one is None else one.hyperparameters for one in self._stats]
        names = dict.fromkeys(name for group in groups for name in group)
        return MappingProxyType(
            {name: np.array([group.get(name, NAN) for group in groups]) for name in names}
        )

    @property
    def lr(self) -> Array:
        """The learning rate."""
        return self._array(lambda one: one.lr)

    @property
    def weight_decay(self) -> Array:
        """The weight decay; 0 at steps where the optimizer has none."""
        return self._array(lambda one: one.weight_decay)

    @property
    def step(self) -> Array:
        """How many steps were made with this parameter."""
        return self._array(lambda one: NAN if one.step is None else one.step)

    @property
    def update_method(self) -> list[str | None]:
        """How the update was found at every step; see `OptimizerStats.update_method`."""
        return [None if one is None else one.update_method for one in self._stats]

    def cosine(self, a: str, b: str) -> Array:
        """Return the cosine of two tensors at every step; see `OptimizerStats.cosine`.

        Raises:
            ValueError: the cosine of these tensors is not computed.
        """
        return self._array(lambda one: one.cosine(a, b))

    @property
    def rms(self) -> Array:
        """How far Adam's second moment lags; see `OptimizerStats.rms`."""
        return self._array(lambda one: one.rms)

    @property
    def eps_fraction(self) -> Array:
        """Share of the elements with sqrt(v) < eps; see `OptimizerStats.eps_fraction`."""
        return self._array(lambda one: one.eps_fraction)

    def _array(self, value: Callable[[OptimizerStats], float]) -> Array:
        return np.array([NAN if one is None else float(value(one)) for one in self._stats])

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"<OptimizerSeries of {', '.join(self.state)}, {len(self)} steps>"
