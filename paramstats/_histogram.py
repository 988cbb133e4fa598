"""`Histogram`: how the elements of a tensor are distributed over binary exponents."""

from __future__ import annotations

import math
from typing import Any

import torch

from paramstats._core.denormals import with_denormals
from paramstats._core.details import Distribution
from paramstats._core.estimates import below, check_quantile, checked_number, ordered
from paramstats._core.format import bars
from paramstats._core.low_precision import FORMATS, MX_FORMATS, checked_format
from paramstats._core.moments import Moments, finite_count
from paramstats._core.optional import import_optional


class Histogram:
    """Counts of the elements of a tensor by sign and binary exponent.

    >>> import torch, paramstats
    >>> x = torch.tensor([-3.0, 0.0, 1e-9, 0.5, 0.75, 1e5])
    >>> histogram = paramstats.summarize({"x": x}, distribution=True)["x"].histogram
    >>> histogram.underflow("float16"), histogram.overflow("float16")
    (0.16666666666666666, 0.16666666666666666)
    >>> edges, counts = histogram.to_numpy()
    >>> len(edges) - len(counts), int(counts.sum())
    (1, 6)

    A bin contains the magnitudes from a power of two to the next one. The counts are exact
    integers. With `grad_scale`, the edges for a gradient are powers of two divided by the scale.
    """

    __slots__ = ("_distribution", "_scale", "_state")

    def __init__(self, distribution: Distribution, state: Moments, scale: float) -> None:
        """Create the histogram of a distribution and the state of the same elements.

        Args:
            distribution, state: of the elements multiplied by `scale`.
            scale: all magnitudes are divided by it.
        """
        self._distribution = distribution
        self._state = state
        self._scale = scale

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[object, ...]:
        return self._distribution.pack(), self._state[:5], self._scale

    @property
    def count(self) -> int:
        """Number of elements."""
        return self._state.count

    @property
    def zero_count(self) -> int:
        """Number of elements that are zero."""
        return self._state.zeros

    @property
    def nan_count(self) -> int:
        """Number of NaN elements."""
        return self._state.nans

    @property
    def pos_inf_count(self) -> int:
        """Number of elements that are +infinity."""
        return self._state.pos_infs

    @property
    def neg_inf_count(self) -> int:
        """Number of elements that are -infinity."""
        return self._state.neg_infs

    @property
    def exponents(self) -> range:
        """The binary exponent e of each bin, which has the magnitudes from 2^e to below 2^(e+1).

        Before they are divided by `grad_scale`. Empty if no element is finite and not zero.
        """
        first = self._distribution.first
        return range(first, first + len(self._distribution.positive))

    @property
    def negative(self) -> tuple[int, ...]:
        """Number of negative elements in each bin of `exponents`."""
        return self._distribution.negative

    @property
    def positive(self) -> tuple[int, ...]:
        """Number of positive elements in each bin of `exponents`."""
        return self._distribution.positive

    @property
    def magnitudes(self) -> tuple[int, ...]:
        """Number of elements of either sign in each bin of `exponents`."""
        pairs = zip(self.negative, self.positive, strict=True)
        return tuple(negative + positive for negative, positive in pairs)

    @property
    def dynamic_range(self) -> float:
        """Octaves between the bins of the smallest and of the largest nonzero magnitude, both
        included; NaN if there is none. All elements of one bin have a range of 1."""
        return float(len(self.exponents)) or math.nan

    # ---- shares

    def underflow(self, dtype: torch.dtype | str, scale: float | str = 1.0) -> float:
        """Return the share of all elements that are not zero and become 0 as `dtype`.

        The share is exact where the bin of the limit is empty. Otherwise it is interpolated in this
        one bin; `underflow_bounds` says how far off it can be. NaN without elements.

        Args:
            dtype: float16, bfloat16, float8_e4m3fn, float8_e5m2 or float4_e2m1, as a name or a
                torch.dtype.
            scale: what elements are multiplied by before they are converted; or "mx": a power of
                two for each 32 elements adjacent in memory, as in the OCP Microscaling formats
                (float4 and float8 only). The powers are not limited to those of the format. Exact;
                NaN for a gradient with a `grad_scale` that is no power of two.

        Raises:
            TypeError, ValueError: another dtype, or a scale that is no finite number > 0.
        """
        return self._shares(dtype, scale, True)[1]

    def overflow(self, dtype: torch.dtype | str, scale: float | str = 1.0) -> float:
        """Return the share of all elements that are finite and too large for `dtype`.

        These are rounded above its largest finite number. Whether a conversion makes them infinite,
        NaN or the largest number depends on the format, the hardware and the version of torch.
        Arguments, errors and precision as in `underflow`.
        """
        return self._shares(dtype, scale, False)[1]

    def underflow_bounds(
        self, dtype: torch.dtype | str, scale: float | str = 1.0
    ) -> tuple[float, float]:
        """Return the least and the largest possible value of `underflow`; equal if it is exact."""
        least, _, most = self._shares(dtype, scale, True)
        return least, most

    def overflow_bounds(
        self, dtype: torch.dtype | str, scale: float | str = 1.0
    ) -> tuple[float, float]:
        """Return the least and the largest possible value of `overflow`; equal if it is exact."""
        least, _, most = self._shares(dtype, scale, False)
        return least, most

    @with_denormals
    def below(self, magnitude: float) -> float:
        """Return the share of all elements with |x| < `magnitude`, zeros included.

        Such as the share of gradients below Adam's eps. Exact at an edge of a bin, otherwise
        interpolated in one bin. NaN without elements.
        """
        magnitude = checked_number(magnitude, "a number for magnitude")
        if not self.count or math.isnan(magnitude):
            return math.nan
        if magnitude <= 0:
            return 0.0
        return (self.zero_count + self._below(magnitude, False)[1]) / self.count

    @with_denormals
    def _shares(self, dtype: Any, scale: Any, is_low: bool) -> tuple[float, float, float]:
        """Return the least possible share, the estimated one and the largest possible one."""
        name, factor = checked_format(dtype, scale)
        if not self.count:
            least = estimate = most = math.nan
        elif factor is None:
            # Elements are counted before division by `_scale`, which is exact for powers of two.
            is_exact = math.frexp(self._scale)[0] == 0.5
            counted = self._distribution.mx[2 * MX_FORMATS.index(name) + (not is_low)]
            least = estimate = most = counted if is_exact else math.nan
        elif is_low:
            least, estimate, most = self._below(FORMATS[name].flushed / factor, True)
        else:
            _, saturated, is_largest_even = FORMATS[name]
            n = sum(self.magnitudes)
            below = self._below(saturated / factor, is_largest_even)
            most, estimate, least = (n - x for x in below)
        n = max(self.count, 1)
        return least / n, estimate / n, most / n

    def _below(self, limit: float, is_included: bool) -> tuple[float, float, float]:
        limit *= self._scale
        largest = max(abs(self._state.min), abs(self._state.max))
        return below(self._distribution, largest, limit, is_included)

    @with_denormals
    def quantile(self, q: float) -> float:
        """Return the q-quantile of the finite elements, 0 <= q <= 1, as `torch.quantile` counts.

        It is interpolated between two neighboring elements in ascending order. Each of them is
        estimated in its bin, so within a factor of two. q = 0 and q = 1 give min and max. NaN
        without finite elements.

        Raises:
            TypeError, ValueError: `q` is no number, or out of range.
        """
        check_quantile(q)
        n = finite_count(self._state)
        if not n:
            return math.nan
        position = q * (n - 1)
        index = min(int(position), n - 1)
        part = position - index
        bins, least, most = (
            self._distribution.bins(self.zero_count),
            self._state.min,
            self._state.max,
        )
        low, high = (ordered(bins, min(k, n - 1), n, least, most) for k in (index, index + 1))
        if low < 0 < high:  # high - low may be infinite
            return (low * (1 - part) + high * part) / self._scale
        return min(low + (high - low) * part, high) / self._scale

    # ---- exports

    @with_denormals
    def edges(self, max_bins: int | None = None) -> tuple[list[float], list[int]]:
        """Return the edges and counts of `to_numpy` as lists; works without numpy."""
        n, octaves = len(self.exponents), 1
        if max_bins is not None:
            message = f"paramstats.Histogram: expected max_bins to be 3 or more, got {max_bins!r}"
            if not hasattr(max_bins, "__index__"):
                raise TypeError(message)
            if max_bins < 3:
                raise ValueError(message)
            octaves = max(1, -(-n // ((max_bins - 1) // 2)))
        bins = self._distribution.bins(self.zero_count, octaves)
        edges = [begin for begin, _, _ in bins] + [bins[-1][1]]
        middle = len(bins) // 2
        if n:
            edges[middle] = bins[middle - 1][1]
        else:
            edges = [-0.5, 0.5]
        return [edge / self._scale for edge in edges], [count for _, _, count in bins]

    def to_numpy(self, max_bins: int | None = None) -> tuple[Any, Any]:
        """Return (edges, counts) of all finite elements, in ascending order, as numpy arrays.

        `len(edges) == len(counts) + 1`; counts are int64. The bins of negative numbers come first,
        then one bin for zeros between the two smallest magnitudes, then the bins of positive
        numbers. Without nonzero elements, the edges are -0.5 and 0.5.

        For `matplotlib.pyplot.stairs(counts, edges)` and, with `max_bins=512`, for
        `wandb.Histogram(np_histogram=(counts, edges))`.

        Args:
            max_bins: if there are more bins, neighboring exponents share one. None: no limit;
                float32 has at most 555 bins.

        Raises TypeError or ValueError if `max_bins` is no whole number or is below 3.
        """
        numpy = import_optional("numpy", "Histogram.to_numpy")
        edges, counts = self.edges(max_bins)
        return numpy.array(edges, numpy.float64), numpy.array(counts, numpy.int64)

    @with_denormals
    def to_tensorboard(self) -> dict[str, Any]:
        """Return the keyword arguments for `SummaryWriter.add_histogram_raw`, without the tag."""
        edges, counts = self.edges()
        n, d, scale = finite_count(self._state), self._distribution, self._scale
        return {
            "min": self._state.min / scale if n else 0.0,
            "max": self._state.max / scale if n else 0.0,
            "num": n,
            "sum": d.mean / scale * n,
            "sum_squares": (d.m2 + d.mean * d.mean * n) / scale / scale,
            "bucket_limits": edges[1:],
            "bucket_counts": counts,
        }

    def sparkline(self, width: int = 32) -> str:
        """Return the counts by exponent as one line of bars, from the smallest magnitude.

        If there are more exponents than `width`, several share a bar.
        """
        return bars(self.magnitudes, width)

    def line(self, width: int = 50) -> str:
        """Return the first exponent, 8 to 32 bars and the last exponent, to fit in `width`."""
        if not self.exponents:
            return "no finite nonzero element"
        begin, end = f"2^{self.exponents[0]} ", f" 2^{self.exponents[-1]}"
        end += "" if self._scale == 1 else f" / {self._scale:g}"
        return f"{begin}{self.sparkline(min(max(width - len(begin + end), 8), 32))}{end}"

    __str__ = line

    def __repr__(self) -> str:
        return f"<Histogram of {self.count:,} elements: {self}>"
