"""What the rules look at, and what they ask of a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from paramstats._findings import Thresholds

if TYPE_CHECKING:
    from paramstats._stats import ParamStats, TensorStats


class Model(NamedTuple):
    """What the rules look at: all entries, and what is usual in this model."""

    entries: list[ParamStats]
    diverged: dict[str, str]
    grad_scale: float
    median: float
    """Of the norms of weights' gradients; NaN where there are none."""
    thresholds: Thresholds
    trains: bool
    """Whether anything is to be trained: a state_dict is not, and nothing in it is frozen."""
    has_gradients: bool
    is_waking: bool
    """Whether zeros that multiply, such as a LoRA's B, hold gradients back until they move."""


def is_weight(entry: ParamStats) -> bool:
    """Two or more dimensions longer than one: no bias, normalisation or class token."""
    return (
        entry.kind == "param"
        and entry.shape is not None
        and sum(size > 1 for size in entry.shape) >= 2
    )


def wakes(entry: ParamStats) -> bool:
    """Whether it is all zeros and has a gradient: a LoRA's B, a last layer or a normalisation that
    begins at zero, starts to live with its first step."""
    return entry.zero_fraction == 1 and entry.grad is not None and entry.grad.norm > 0


def is_added(entry: ParamStats) -> bool:
    """A bias or a table of positions, by its name: zeros in it hold nothing back."""
    own = entry.name.rpartition(".")[2]
    return "bias" in own or "pos" in own


def elements(count: int, stats: TensorStats) -> str:
    kinds = [
        f"{n:,} {name}"
        for n, name in (
            (stats.nan_count, "NaN"),
            (stats.pos_inf_count, "+Inf"),
            (stats.neg_inf_count, "-Inf"),
        )
        if n
    ]
    return f"{', '.join(kinds)} of {stats.count:,}"
