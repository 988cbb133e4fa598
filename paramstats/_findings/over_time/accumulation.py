"""Gradients that are never reset: they grow like the number of steps, and without noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paramstats._findings.over_time.entry import Now
from paramstats._findings.over_time.signals import SMALL_GRADIENT
from paramstats._findings.over_time.tracks import N
from paramstats._findings.structure import module_of

_MAX_STEPS = 200
"""Steps after the first entry in which gradients may be found to grow like their number."""

_MIN_NOISE, _LEAST_NOISE = 16, 0.03
"""Entries before the noise of gradients is compared, and the usual noise of batches."""


def add_to_line(now: Now, first_step: int) -> bool:
    """Add the entry to the sums for the line through log norms of gradients by log of the step.

    Returns whether it was early enough for that.
    """
    steps = now.step - first_step
    if steps > _MAX_STEPS:
        return False
    x = math.log(steps + 1)
    use = now.is_finite.to(torch.float64)
    y = now.log_grad.where(now.is_finite, use)  # 0 where it is not finite
    terms = (use, x * use, y, x * x * use, x * y, y * y)
    now.rows.sums = now.rows.sums + torch.stack(terms, 1)
    return True


def line(now: Now) -> tuple[Tensor, Tensor, Tensor]:
    """Return the exponent of growth of each gradient's norm, the norm at its start, and the error.

    The exponent is 1 for a norm that is proportional to the number of steps. The error is the root
    mean square of the deviations of the log norms from the line.
    """
    n, x, y, xx, xy, yy = now.rows.sums.unbind(1)
    centered = xy - x * y / n
    slope = centered / (xx - x * x / n)
    error = ((yy - y * y / n - slope * centered) / n).clamp(min=0).sqrt()
    return slope, (y - slope * x) / n, error


def accumulated(now: Now, trained: Tensor, steps: float) -> bool:
    """Return whether all gradients grow in proportion to the step.

    Exponential growth, as when a plateau is left, does not fit to the line. Gradients that are
    behind a weight that starts at zero do, but that of this weight does not grow.
    """
    if not is_early(steps):
        return False
    use = trained & (now.rows.sums[:, N] >= 5) & (now.relative_grad > SMALL_GRADIENT)
    slope, start, error = (x[use] for x in line(now))
    if not len(slope):
        return False
    grows = float((slope > 0.35).to(torch.float64).mean()) >= 0.9
    return bool(
        grows
        and slope[int(start.argmax())] > 0.45
        and 0.55 < float(slope.median()) < 1.4
        and float(error.median()) < 0.15
    )


def is_early(steps: float) -> bool:
    """Return whether gradients may be found to accumulate at this step."""
    return 10 <= steps <= _MAX_STEPS


def accumulated_part(now: Now) -> list[int]:
    """Return the weights of modules whose gradients alone grow in proportion to the step.

    New gradients vary from batch to batch, as those of the other weights do. A sum of gradients is
    smooth.
    """
    use = now.trained & now.plan.weights & now.is_finite & (now.rows.sums[:, N] >= _MIN_NOISE)
    slope, start, error = line(now)
    grows = use & (slope > 0.55) & (slope < 1.4) & (error < 0.15)
    grows &= (now.log_grad - start > math.log(3)) & (now.relative_grad > SMALL_GRADIENT)
    if not bool(grows.any()) or 2 * int(grows.sum()) > int(use.sum()):
        return []
    noise = now.rows.numbers["noise"]
    usual = float(noise[use & ~grows].nanmedian())
    if not usual > _LEAST_NOISE:
        return []
    names, rows = now.plan.names, set((grows & (noise < usual / 5)).nonzero()[:, 0].tolist())
    modules = {module_of(names[row]) for row in rows}
    of_modules = [row for row in use.nonzero()[:, 0].tolist() if module_of(names[row]) in modules]
    return of_modules if rows >= set(of_modules) else []
