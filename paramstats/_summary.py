"""What the caller holds: a mapping from names to statistics."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from paramstats._core import moments
from paramstats._core.backend import active
from paramstats._core.layout import Layout, no_such_name
from paramstats._core.moments import ABSENT, Moments
from paramstats._core.optional import import_optional
from paramstats._core.reference import finished
from paramstats._core.torch_private import skip_dynamo
from paramstats._stats import STATS, ParamStats, TensorStats, TotalStats

if TYPE_CHECKING:
    import pandas

    from paramstats._core.reference import Transfer
    from paramstats._findings import Findings, Thresholds


class Summary(Mapping[str, ParamStats]):
    """Statistics by parameter name, in `named_parameters()` order; a read-only snapshot.

    >>> import torch, paramstats
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    >>> summary = paramstats.summarize(model)
    >>> list(summary)
    ['0.weight', '0.bias', '1.weight', '1.bias']
    >>> summary["0.weight"].shape, summary.total.count
    ((3, 4), 23)

    A tied parameter answers to all its names; iteration gives the first. Statistics are ready, or, of
    tensors on a GPU, on their way: reading one waits for this summary's transfer alone.
    """

    __slots__ = (
        "_correction",
        "_diverged",
        "_grad_scale",
        "_layout",
        "_local",
        "_pending",
        "_skipped",
        "_table",
    )

    def __init__(
        self,
        layout: Layout,
        table: bytes,
        correction: float,
        grad_scale: float,
        pending: Sequence[Transfer] = (),
        skipped: Mapping[str, str] = MappingProxyType({}),
        diverged: Mapping[str, str] = MappingProxyType({}),
        local: bool = False,
    ) -> None:
        self._layout = layout
        self._table = table
        self._correction = correction
        self._grad_scale = grad_scale
        self._pending = tuple(pending)
        self._skipped = skipped
        self._diverged = diverged
        self._local = local

    # ---- the mapping

    @skip_dynamo
    def __getitem__(self, name: str) -> ParamStats:
        row = self._layout.index.get(name)
        if row is None:
            raise KeyError(no_such_name(name, self._layout.index, len(self)))
        grad = self._state(len(self) + row)
        return ParamStats(
            self._state(row),
            self._correction,
            self._layout,
            row,
            None if grad.count == ABSENT else TensorStats(grad, self._correction),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.names)

    def __len__(self) -> int:
        return len(self._layout)

    def __contains__(self, name: object) -> bool:
        return name in self._layout.index

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Summary):
            return NotImplemented
        return self._identity() == other._identity()

    __hash__ = None  # type: ignore[assignment]  # as every Mapping

    def _identity(self) -> tuple[object, ...]:
        self.wait()
        rows = [self._layout.row(row) for row in range(len(self))]
        return rows, self._layout.parameters, self._table, self._correction, self._grad_scale

    # ---- beyond the mapping

    @property
    @skip_dynamo
    def total(self) -> TotalStats:
        """All parameters merged into one, each counted once; `.grad`: all gradients likewise.

        Buffers do not count, nor what could not be read. Of complex parameters `norm` and counts
        are exact; `mean` and `std` take the modulus of each one's mean.
        """
        return self._as_one(0, self._layout.parameters)

    @property
    def skipped(self) -> Mapping[str, str]:
        """Why a tensor could not be read, by name; empty when all is well."""
        return MappingProxyType(dict(self._skipped))

    @property
    def diverged(self) -> Mapping[str, str]:
        """Of a sharded model, what should be the same on several processes and is not, by name,
        with the ranks that differ; empty when all is well. A gradient is "NAME (gradient)".

        Copies are compared by their statistics, to the last bit: what changes none of them, such as
        the lowest bit of one element among millions, may pass.
        """
        return MappingProxyType(dict(self._diverged))

    @property
    def is_local(self) -> bool:
        """Whether these are the statistics of this process's part of a sharded model alone."""
        return self._local

    @skip_dynamo
    def ready(self) -> bool:
        """Whether reading a statistic would not wait."""
        return all(transfer.ready() for transfer in self._pending)

    @skip_dynamo
    def wait(self) -> Summary:
        """Waits until all statistics are here, and returns this summary."""
        pending = self._pending  # once: another thread may be waiting, too, and be done first
        if pending:
            self._table = finished(self._table, pending)
            self._pending = ()
        return self

    @skip_dynamo
    def scalars(
        self,
        key: str = "{kind}_{stat}/{name}",
        stats: Sequence[str] = ("mean", "std", "norm", "zero_fraction"),
        totals: bool = True,
    ) -> dict[str, float]:
        """A flat dict of floats, as loggers take it; without what could not be read.

        >>> import torch, paramstats
        >>> summary = paramstats.summarize({"w": torch.ones(4)})
        >>> summary.scalars(stats=("mean", "norm"), totals=False)
        {'param_mean/w': 1.0, 'param_norm/w': 2.0}

        Args:
            key: a format string with fields `kind` ("param", "grad" or "buffer"), `stat`, `name`.
            stats: names of statistics, out of those that `TensorStats` has.
            totals: also `total` and its gradient, under the name "total".

        Raises:
            ValueError: an unknown stat or field, or a key that would stand for two statistics.
        """
        self.wait()
        stats = (stats,) if isinstance(stats, str) else tuple(stats)
        for stat in stats:
            if stat not in STATS:
                raise ValueError(
                    f"paramstats.scalars: expected stats out of {', '.join(STATS)}, got '{stat}'"
                )
        keys = self._layout.keys(_checked_template(key), stats)
        which = [STATS.index(stat) for stat in stats]
        out = active().scalars(self._table, keys.rows, which, self._correction, self._grad_scale)
        expected = len(out) if keys.are_distinct else len(stats) * self._count(_is_read)
        if totals:
            total = self.total
            for kind, statistics in (("param", total), ("grad", total.grad)):
                if statistics is not None and _is_read(statistics._state):
                    expected += len(stats)
                    values = [float(statistics._statistics[position]) for position in which]
                    out.update(zip(keys.total[kind], values, strict=True))
        if len(out) != expected:
            raise ValueError(
                f"paramstats.scalars: expected a key for each statistic, got {len(out)} keys for "
                f"{expected} statistics from '{key}'; use {{kind}}, {{stat}} and {{name}}, and "
                f"totals=False where a parameter is called 'total'"
            )
        return out

    @skip_dynamo
    def to_dict(self) -> dict[str, Any]:
        """`{"params": {name: ...}, "total": ...}`, nested, of JSON's types alone.

        Of a sharded model also `diverged` and `is_local`, where they say anything.
        NaN and infinities are floats, which `json.dumps` and `json.loads` carry.
        """
        return {
            "params": {name: entry.to_dict() for name, entry in self.items()},
            "total": self.total.to_dict(),
            **self._about(),
        }

    def _about(self) -> dict[str, Any]:
        """What a reader of a sharded model's statistics must know."""
        about: dict[str, Any] = {}
        if self._diverged:
            about["diverged"] = dict(self._diverged)
        if self._local:
            about["is_local"] = True
        return about

    @skip_dynamo
    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame with a row per parameter; columns of gradients begin with `grad_`.

        Its `attrs` say of a sharded model what `to_dict` says beside the statistics.
        """
        frames = import_optional("pandas", "to_pandas", "pandas")
        rows = {}
        for name, entry in self.items():
            record = entry.to_dict()
            grad = record.pop("grad")
            record["shape"] = entry.shape
            rows[name] = {
                **record,
                **{f"grad_{stat}": grad[stat] if grad else float("nan") for stat in STATS},
            }
        frame: pandas.DataFrame = frames.DataFrame.from_dict(rows, orient="index")
        frame = frame.rename_axis("name")
        frame.attrs.update(self._about())
        return frame

    @skip_dynamo
    def findings(self, thresholds: Thresholds | None = None) -> Findings:
        """The health check: what asks for a look, the most severe first; empty where all is well.

        >>> import torch, paramstats
        >>> summary = paramstats.summarize({"head.weight": torch.zeros(10, 64)})
        >>> print(summary.findings())
        WARNING dead weight: All that passes is lost: was it initialised, loaded, pruned?
            head.weight  all 640 elements zero

        Each `Finding` has `severity`, `code`, `name`, `value`, `threshold` and one line of
        `advice`. Thresholds and their sources: `Thresholds`.
        """
        from paramstats._findings import Thresholds
        from paramstats._findings.rules import find

        return find(self, thresholds or Thresholds())

    @skip_dynamo
    def table(
        self,
        width: int | None = None,
        *,
        sort_by: str | None = None,
        limit: int | None = None,
        kind: str | None = None,
        color: bool = False,
    ) -> str:
        """An aligned table: a line a tensor, blocks of the module tree as one, the total below.

        >>> import torch, paramstats
        >>> weights = {"a": torch.ones(2), "b": torch.tensor([0.0, 3.0]), "c": torch.zeros(2)}
        >>> print(paramstats.summarize(weights).table(sort_by="norm", limit=2))
        parameter       shape    mean    std   norm  zeros
        ──────────────────────────────────────────────────
        b               [2]       1.5  2.121      3    50%
        a               [2]         1      0  1.414     0%
        ... and 1 more
        ──────────────────────────────────────────────────
        total               6  0.8333  1.169  3.317    50%

        Findings of warning level and above stand beside their tensor.

        Args:
            width: columns to fit in, by eliding names in the middle and leaving out columns, those
                of means first. None: the terminal's; outside a terminal nothing is elided.
            sort_by: a statistic, such as "norm", "std" or "grad.norm", the largest first, NaN before
                it; "-norm": the smallest first; "name": by name. None: the model's order.
            limit: at most so many tensors.
            kind: "param", "grad" or "buffer": the statistics of those alone, with min and max.
            color: with a terminal's escape codes (needs rich). `print(summary)` has them by itself
                on a terminal; `rich.print(summary)` anywhere.

        Raises:
            ValueError: an unknown statistic or kind, or a limit below 0.
        """
        from paramstats import _display as report

        made = report.table(self, sort_by, limit, kind)
        return report.colored(made, width) if color else report.plain(made, width)

    @skip_dynamo
    def __str__(self) -> str:
        from paramstats import _display as report

        return report.for_print(report.table(self))

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from paramstats import _display as report

        yield from report.rich_lines(report.table(self), options.max_width)

    def __repr__(self) -> str:
        n = len(self)
        grads = self._count(lambda state: state.count != ABSENT) - n
        where = ", this process's part of them" if self._local else ""
        return f"<Summary of {len(self)} tensors, {grads} with gradients{where}>"

    def _repr_html_(self) -> str:
        from paramstats import _display as report

        return report.html(self)

    def __reduce__(self) -> tuple[Any, ...]:
        self.wait()
        state = (self._layout, self._table, self._correction, self._grad_scale)
        return Summary, (*state, (), dict(self._skipped), dict(self._diverged), self._local)

    def _state(self, row: int) -> Moments:
        self.wait()
        state = moments.row(self._table, row)
        return self._unscaled(state) if row >= len(self) else state

    def _as_one(self, begin: int, end: int) -> TotalStats:
        """The tensors [begin, end) merged, and their gradients."""
        n, grad = len(self), None
        if any(self._state(n + row).count != ABSENT for row in range(begin, end)):
            grad = TensorStats(self._merged(n + begin, n + end), self._correction)
        return TotalStats(self._merged(begin, end), self._correction, grad)

    def _merged(self, begin: int, end: int) -> Moments:
        state = moments.row(active().merge_rows(self._table, begin, end), 0)
        return self._unscaled(state) if begin >= len(self) and end > begin else state

    def _unscaled(self, state: Moments) -> Moments:
        if self._grad_scale == 1:
            return state
        return moments.scaled(state, 1 / self._grad_scale)

    def _count(self, condition: Callable[[Moments], bool]) -> int:
        """How many rows, of tensors and gradients, are so."""
        return sum(condition(moments.row(self._table, row)) for row in range(2 * len(self)))


def _is_read(state: Moments) -> bool:
    return not moments.is_unread(state)


@functools.lru_cache(maxsize=16)
def _checked_template(key: str) -> str:
    fields = {field for _, field, _, _ in string.Formatter().parse(key) if field is not None}
    unknown = fields - {"kind", "stat", "name"}
    if unknown:
        raise ValueError(
            f"paramstats.scalars: expected the fields kind, stat and name in key, got "
            f"'{', '.join(sorted(unknown))}' in '{key}'"
        )
    return key
