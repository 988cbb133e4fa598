"""The states of many tensors at many steps as one array, for pictures of a whole run.

A `ParamStats` for each cell would take a minute for a long run; the formulae here are those of
moments.py over arrays, and give the same statistics to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from paramstats._core.layout import Layout
from paramstats._core.moments import ABSENT, INF, NAN, Moments
from paramstats._history.series import Array, least_change
from paramstats._summary import Summary, record_of

Bools = npt.NDArray[np.bool_]

_COUNTS = Moments._fields[:5]
_STATE = np.dtype([(name, np.int64 if name in _COUNTS else np.float64) for name in Moments._fields])
"""As a state lies in a table of rows: moments.ROW."""


class States:
    """The states of tensors, or of their gradients, by name and entry; without those that could not
    be read."""

    def __init__(self, summaries: Sequence[Summary], names: Sequence[str], kind: str) -> None:
        shape = (len(names), len(summaries))
        self._states = np.zeros(shape, _STATE)
        self._states["mean"] = NAN
        self._shapes = np.zeros(shape, np.int64)
        self._correction = np.array([record_of(summary).correction for summary in summaries])
        known: dict[Layout, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
        shapes: dict[object, int] = {}
        for column, summary in enumerate(summaries):
            layout = record_of(summary).layout
            if layout not in known:
                rows = np.array([layout.index.get(name, -1) for name in names], dtype=np.int64)
                own = [shapes.setdefault(shape, len(shapes) + 1) for shape in layout.shapes]
                known[layout] = rows, np.array([*own, 0])[rows]
            rows, self._shapes[:, column] = known[layout]
            there = np.nonzero(rows >= 0)[0]
            table = np.frombuffer(record_of(summary).table, _STATE)
            found = table[rows[there] + (len(summary) if kind == "grad" else 0)]
            if kind == "grad" and record_of(summary).grad_scale != 1:
                factor = 1 / record_of(summary).grad_scale
                for name in ("mean", "m2", "m2", "min", "max"):
                    found[name] *= factor
            self._states[there, column] = found
        self._states["mean"][self._states["count"] == ABSENT] = NAN

    @property
    def has_nonfinite(self) -> Bools:
        s = self._states
        found: Bools = ~np.isnan(s["mean"]) & (s["nans"] + s["pos_infs"] + s["neg_infs"] > 0)
        return found

    def statistics(self, stat: str) -> Array:
        """What `moments.finalize` gives; NaN where nothing was read."""
        with np.errstate(all="ignore"):
            made = self._statistics(stat)
        return np.where(np.isnan(self._states["mean"]), NAN, made)

    def min_update_ratio(self) -> Array:
        """`ParamSeries.min_update_ratio` of each."""
        s = self._states
        norm = self.statistics("norm")
        known = ~np.isnan(norm) & ~self.has_nonfinite
        count, mean, m2 = (np.where(known, s[name], NAN) for name in ("count", "mean", "m2"))
        return least_change(count, mean, m2, norm, self._shapes[:, 1:] == self._shapes[:, :-1])

    def _statistics(self, stat: str) -> Array:
        s = self._states
        count, nans, pos, neg = (s[name] for name in ("count", "nans", "pos_infs", "neg_infs"))
        n = count - nans - pos - neg
        others = {
            "count": count,
            "zero_count": s["zeros"],
            "nan_count": nans,
            "pos_inf_count": pos,
            "neg_inf_count": neg,
            "nonfinite_count": count - n,
        }
        if stat in others:
            return np.asarray(others[stat], dtype=np.float64)
        if stat == "zero_fraction":
            return np.asarray(s["zeros"] / np.where(count > 0, count, NAN))
        if stat in ("std", "var"):
            freedom = np.maximum(n - self._correction, 0)
            var = np.where(freedom > 0, s["m2"] / freedom, np.where(s["m2"] == 0, NAN, INF))
            var = np.where((n == 0) | (n != count), NAN, var)
            return np.sqrt(var) if stat == "std" else var
        finite = self._of_finite(stat, n)
        infinite = {
            "mean": np.where(neg == 0, INF, np.where(pos == 0, -INF, NAN)),
            "min": np.where(neg > 0, -INF, np.where(n > 0, s["min"], INF)),
            "max": np.where(pos > 0, INF, np.where(n > 0, s["max"], -INF)),
        }.get(stat, INF)
        return np.where(n == count, finite, np.where(nans > 0, NAN, infinite))

    def _of_finite(self, stat: str, n: npt.NDArray[np.int64]) -> Array:
        s = self._states
        if stat == "norm":
            return np.where(n == 0, 0.0, _hypot(np.sqrt(s["m2"]), s["mean"] * np.sqrt(n)))
        if stat == "rms":
            made = _hypot(np.sqrt(s["m2"] / n), s["mean"])
        elif stat == "abs_max":
            made = np.maximum(np.abs(s["min"]), np.abs(s["max"]))
        else:
            made = s[stat]
        return np.where(n == 0, NAN, made)


def _hypot(x: Array, y: Array) -> Array:
    """Python's own: numpy's may differ in the last bit."""
    both = map(math.hypot, x.ravel().tolist(), y.ravel().tolist())
    return np.fromiter(both, np.float64, x.size).reshape(x.shape)
