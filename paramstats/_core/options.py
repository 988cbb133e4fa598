"""Validate the arguments of `summarize` and `watch`, in one place."""

from __future__ import annotations

import difflib
import functools
import math
import re
import string
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch

from paramstats._core.detail_options import DetailOptions
from paramstats._core.format import one_line_name
from paramstats._core.moments import Statistics
from paramstats._core.names import Patterns, compile_patterns
from paramstats._core.torch_private import without_modes

Pattern = str | re.Pattern[str]
STATS = Statistics._fields
"""The names of all statistics."""

DISTRIBUTION_STATS = ("skewness", "kurtosis", "abs_mean")
"""The names of statistics that are read with `summarize(distribution=...)`."""

_MEANT = {
    "average": "mean",
    "avg": "mean",
    "stddev": "std",
    "stdev": "std",
    "variance": "var",
    "l2": "norm",
    "l2_norm": "norm",
    "minimum": "min",
    "maximum": "max",
    "absmax": "abs_max",
    "max_abs": "abs_max",
    "zeros": "zero_count' or 'zero_fraction",
    "sparsity": "zero_fraction",
    "nan": "nan_count",
    "nans": "nan_count",
    "inf_count": "pos_inf_count' or 'neg_inf_count",
    "infs": "nonfinite_count",
    "numel": "count",
    "gradient": "grad",
    "median": "",  # not available; not a misspelled mean
}
"""Common misspellings, and the statistic that each one means."""


class Scaler(Protocol):
    """A gradient scaler, such as `torch.amp.GradScaler`."""

    def get_scale(self) -> float: ...


class Options(NamedTuple):
    """Checked arguments of `summarize`."""

    include: Patterns | None
    exclude: Patterns
    correction: float
    grad_scale: float
    local: bool
    async_op: bool
    details: DetailOptions | None = None
    """Whose distributions and rows to read; None: none."""


DEFAULT_OPTIONS = Options(None, (), 1.0, 1.0, False, False)


_NUMBERS = (int, float)
DEFAULT_CORRECTION = 1
DEFAULT_GRAD_SCALE = 1.0
"""The very objects that `summarize` has as defaults: comparing them by identity is fast."""


@functools.lru_cache(maxsize=32)
def _scalar_options(correction: Any, grad_scale: Any) -> Options:
    """Return options that differ from the defaults in these numbers only."""
    correction = _number(correction, "correction")
    grad_scale = scale_of(grad_scale)
    _check_scale(grad_scale)
    return Options(None, (), correction, grad_scale, False, False)


def _check_scale(grad_scale: float) -> None:
    if not (math.isfinite(grad_scale) and grad_scale > 0 and math.isfinite(1 / grad_scale)):
        raise ValueError(
            f"paramstats.summarize: expected a finite number > 0 for grad_scale, got {grad_scale!r}"
            "; a GradScaler's is scaler.get_scale()"
        )


def make_options(
    include: Pattern | Iterable[Pattern] | None,
    exclude: Pattern | Iterable[Pattern] | None,
    correction: float,
    grad_scale: float | Scaler,
    local: bool,
    has_group: bool,
    async_op: bool,
) -> Options:
    """Return checked options, or raise TypeError or ValueError for the first bad argument."""
    if include is None and exclude is None and not (local or has_group or async_op):
        if correction is DEFAULT_CORRECTION and grad_scale is DEFAULT_GRAD_SCALE:
            return DEFAULT_OPTIONS
        if type(correction) in _NUMBERS and type(grad_scale) in _NUMBERS:
            numbers: Any = (correction, grad_scale)
            return _scalar_options(*numbers)
    correction = _number(correction, "correction")
    grad_scale = scale_of(grad_scale)
    _check_scale(grad_scale)
    if local and (async_op or has_group):
        other = "async_op=True" if async_op else "group="
        raise ValueError(
            f"paramstats.summarize: expected local=True without {other}, got both; local=True "
            f"reads this rank's elements and never communicates"
        )
    return Options(
        None if include is None else compile_patterns(include, "include"),
        () if exclude is None else compile_patterns(exclude, "exclude"),
        correction,
        grad_scale,
        local,
        async_op,
    )


def scale_of(grad_scale: float | Scaler, optimizer: torch.optim.Optimizer | None = None) -> float:
    """Return the number that gradients are multiplied by.

    Args:
        grad_scale: that number, or a gradient scaler, which is asked for it.
        optimizer: the optimizer of the gradients; needed if several optimizers share the scaler.

    Raises:
        ValueError: `grad_scale` is no number > 0, or the scaler has already unscaled gradients
            since its last `update`, so that its scale no longer applies to them.
    """
    if not hasattr(grad_scale, "get_scale"):
        return _number(grad_scale, "grad_scale", " > 0", "; a GradScaler's is scaler.get_scale()")
    # torch has no public way to ask whether a scaler has unscaled gradients.
    states: Mapping[int, Any] = getattr(grad_scale, "_per_optimizer_states", {})
    stages = {
        getattr(state.get("stage"), "name", "READY")
        for owner, state in states.items()
        if optimizer is None or owner == id(optimizer)
    }
    if stages - {"READY"}:
        raise ValueError(
            "paramstats: expected grad_scale=scaler before scaler.unscale_ and scaler.step, got a "
            "scaler that has unscaled gradients; call this earlier or leave grad_scale out. If the "
            "scaler serves several optimizers, name the one that is meant: "
            "watcher.step(optimizer=...)"
        )
    with without_modes():
        return float(grad_scale.get_scale())


@without_modes()
def _number(value: Any, argument: str, condition: str = "", remedy: str = "") -> float:
    try:
        if not getattr(value, "ndim", 0) and math.isfinite(value):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last two are torch's
        pass
    raise ValueError(
        f"paramstats.summarize: expected a finite number{condition} for {argument}, "
        f"got {value!r}{remedy}"
    )


@functools.lru_cache(maxsize=16)
def _columns(stats: tuple[str, ...], function: str) -> bytes:
    for name in stats:
        if name not in STATS:
            # Gradients have columns and keys of their own.
            plain = str(name).removeprefix("grad.").removeprefix("grad_")
            raise ValueError(
                f"paramstats.{function}: expected each of stats to be one of {', '.join(STATS)}, "
                f"got {name!r}{did_you_mean(plain)}"
            )
    return bytes(STATS.index(name) for name in stats)


def checked_stats(
    stats: str | Iterable[str], function: str = "scalars"
) -> tuple[tuple[str, ...], bytes]:
    """Return the names of statistics, and their positions in `STATS`.

    Raises ValueError with the likely name at one that does not exist.
    """
    try:
        names = (stats,) if isinstance(stats, str) else tuple(stats)
        return names, _columns(names, function)
    except TypeError:  # not iterable, or names that cannot be hashed
        raise TypeError(
            f"paramstats.{function}: expected stats to be names of statistics, got {stats!r}"
        ) from None


def split_stats(stats: str | Iterable[str]) -> tuple[Any, tuple[str, ...]]:
    """Return the names of statistics that every tensor has, and those of distributions."""
    try:
        names = (stats,) if isinstance(stats, str) else tuple(stats)
        own = tuple(name for name in names if name in DISTRIBUTION_STATS)
    except TypeError:  # reported by `checked_stats`
        return stats, ()
    return (tuple(name for name in names if name not in own), own) if own else (names, own)


def did_you_mean(name: object) -> str:
    """Return "; did you mean 'std'?" for "stddev", and "" for a name without a likely meaning."""
    text = str(name).lower()
    meant = _MEANT.get(text)
    if meant is None and text.startswith(("grad_", "grad.")) and text[5:] in STATS:
        meant = f"grad.{text[5:]}"
    if meant is None:
        meant = next(iter(difflib.get_close_matches(text, STATS, n=1, cutoff=0.7)), None)
    return f"; did you mean '{meant}'?" if meant else ""


@functools.lru_cache(maxsize=16)
def checked_key(key: str) -> str:
    """Return `key`, a format string for the keys of `Summary.scalars`.

    Raises ValueError where it is malformed or has fields other than kind, stat and name.
    """
    if not isinstance(key, str):
        raise TypeError(f"paramstats.scalars: expected a format string for key, got {key!r}")
    try:
        unknown = [field for field in _fields(key) if field not in ("kind", "stat", "name")]
        if not unknown:
            key.format(kind="param", stat="mean", name="weight")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"paramstats.scalars: expected a format string for key, got {key!r}: "
            f"{one_line_name(str(error))}"
        ) from None
    if unknown:
        raise ValueError(
            f"paramstats.scalars: expected the fields kind, stat and name in key, got "
            f"{unknown[0]!r} in {key!r}"
        )
    return key


def _fields(key: str) -> Iterator[str]:
    """Yield the fields of a format string, those in format specifiers included."""
    for _, field, specifier, _ in string.Formatter().parse(key):
        if field is not None:
            yield field
            yield from _fields(specifier or "")


def check_keys(key: str, stats: tuple[str, ...], totals: bool) -> None:
    """Raise ValueError if `key` gives two statistics of one parameter the same key.

    Summary.scalars would raise it, too, but in a distributed run only on the rank that logs.
    """
    names = ("weight", "total") if totals else ("weight",)
    keys = [
        checked_key(key).format(kind=kind, stat=stat, name=name)
        for kind in ("param", "grad")
        for stat in stats
        for name in names
    ]
    if len(set(keys)) < len(keys):
        raise duplicate_keys(key, len(set(keys)), len(keys))


def duplicate_keys(key: str, keys: int, statistics: int) -> ValueError:
    """Return the error for a key that stands for two statistics."""
    return ValueError(
        f"paramstats.scalars: expected a key for each statistic, got {keys} keys for {statistics} "
        f"statistics from {key!r}; use {{kind}}, {{stat}} and {{name}}, and totals=False where a "
        f"parameter is called 'total'"
    )


def warn_no_match(function: str, include: Any, exclude: Any, stacklevel: int = 4) -> None:
    """Warn that `include` and `exclude`, as given or compiled, select no tensor."""
    given = []
    for patterns in (include, exclude):
        several = [patterns] if isinstance(patterns, (str, re.Pattern)) else list(patterns or ())
        texts = [getattr(pattern, "pattern", pattern) for pattern in several]
        given.append(repr(texts[0] if len(texts) == 1 else texts or None))
    warnings.warn(
        f"paramstats.{function}: no name matches include={given[0]}, exclude={given[1]}",
        RuntimeWarning,
        stacklevel=stacklevel,
    )
