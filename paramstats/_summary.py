"""`Summary`: a mapping from parameter names to statistics."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from paramstats import _display as display
from paramstats._core import moments
from paramstats._core.details import NO_DETAILS
from paramstats._core.layout import Layout
from paramstats._core.names import no_such_name
from paramstats._core.options import STATS, Pattern, make_options, warn_no_match
from paramstats._core.record import Deferred, FileSource, Record
from paramstats._core.torch_private import skip_dynamo
from paramstats._findings import Findings, Thresholds
from paramstats._findings.rules import find
from paramstats._findings.thresholds import make_thresholds
from paramstats._scalars import scalars
from paramstats._stats import ParamStats, TotalStats

if TYPE_CHECKING:
    import pandas


class Summary(Mapping[str, ParamStats]):
    """Statistics by parameter name, in `named_parameters()` order; a read-only snapshot.

    >>> import torch, paramstats
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    >>> summary = paramstats.summarize(model)
    >>> list(summary)
    ['0.weight', '0.bias', '1.weight', '1.bias']
    >>> summary["0.weight"].shape, summary.total.count
    ((3, 4), 23)

    A tied parameter can be looked up under all its names; iteration gives the first. Statistics of
    tensors on a GPU may be pending: reading one waits for the transfer of this summary only. With
    `async_op=True`, the exchange with other ranks may be pending, and with it the names.
    """

    __slots__ = ("_deferred", "_ready")

    def __init__(self, record: Record | None, deferred: Deferred | None = None) -> None:
        """Create a summary from a record or from a deferred record.

        Raises TypeError for any other mapping; torch's `default_convert` then makes a dict.
        """
        if type(record) is not Record and record is not None:
            raise TypeError(f"paramstats.Summary: expected a record, got {type(record).__name__}")
        self._ready = record
        self._deferred = deferred

    @property
    def _record(self) -> Record:
        """The record; waits if it is still being computed."""
        record = self._ready
        if record is None:
            deferred = self._deferred  # read once: another thread may finish first
            record = self._ready if deferred is None else deferred.result()
            assert record is not None
            self._ready = record
            self._deferred = None
        return record

    @property
    def _description(self) -> Record:
        """The record without its statistics, which is usually known before they are."""
        deferred = self._deferred
        record = None if deferred is None else deferred.record()
        return self._record if record is None else record

    # ---- the mapping

    @skip_dynamo
    def __getitem__(self, name: str) -> ParamStats:
        record = self._ready or self._record
        row = record.layout.index.get(name)
        if row is None:
            raise KeyError(no_such_name(name, record.layout.index, len(self)))
        return ParamStats(record, row)

    def get(self, name: str, default: Any = None) -> Any:
        """Return `self[name]`, or `default` if there is no such tensor."""
        if name in self:
            return self[name]
        return default

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            hint = f"; did you mean summary.total.{name}?" if name in (*STATS, "grad") else ""
            raise AttributeError(f"'Summary' object has no attribute {name!r}{hint}", name=name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._description.layout.names)

    def __len__(self) -> int:
        return len(self._description.layout)

    def __contains__(self, name: object) -> bool:
        return name in self._description.layout.index

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Summary):
            return NotImplemented
        return self._identity() == other._identity()

    __hash__ = None  # type: ignore[assignment]  # as every Mapping

    def _identity(self) -> tuple[object, ...]:
        layout, table, correction, grad_scale, *_, optimizer, details, _ = self._record
        asked_for = {row: one.asked_for for row, one in details.items()}
        details = {row: one for row, one in asked_for.items() if any(one)}
        rows = [layout.row(row) for row in range(len(layout))]
        return rows, layout.parameters, table, correction, grad_scale, optimizer, details

    # ---- beyond the mapping

    @property
    @skip_dynamo
    def total(self) -> TotalStats:
        """The statistics of all parameters together; `.grad` has those of all gradients together.

        Each parameter counts once. Buffers and tensors that could not be read do not count. All
        tensors of a mapping, such as a `state_dict()`, are parameters and count. Those of a
        checkpoint file count if they are the model's, not an optimizer's or others. For complex
        parameters, `norm` and the counts are exact; `mean` and `std` use the absolute value of each
        parameter's mean. There is a histogram if all of the tensors have one; see
        `summarize(distribution=...)`.
        """
        record = self._ready or self._record
        merged = record.merged(0, record.layout.parameters)  # Record.total doubles the time
        optimizer, details = None, NO_DETAILS
        if record.optimizer is not None or record.details:
            *_, optimizer, details, _ = record.total()
        return TotalStats(merged, record.correction, record.grad_scale, optimizer, 0, details)

    @property
    def skipped(self) -> Mapping[str, str]:
        """Why a tensor could not be read, by name; empty if all were read."""
        return MappingProxyType(dict(self._description.skipped))

    @property
    def diverged(self) -> Mapping[str, str]:
        """Tensors whose replicas differ between ranks, by name, with the ranks that differ.

        A gradient is named "NAME (gradient)". Replicas are compared by their statistics, to the
        last bit. A difference that changes no statistic, such as the lowest bit of one element
        among millions, is not seen. Waits for an exchange in the background.
        """
        return MappingProxyType(dict(self._description.diverged))

    @property
    def is_local(self) -> bool:
        """Whether the statistics cover only this rank's shards."""
        deferred = self._deferred
        record = self._ready if deferred is None else deferred.record()
        return record is not None and record.is_local  # without one, all ranks are asked

    @property
    def file(self) -> FileSource | None:
        """Groups, labels and notes of a checkpoint file; None if the tensors are not those of one.

        `file.groups` has "model", "optimizer" or "other" for every tensor, by name. `file.labels`
        says what is unusual about the elements of a tensor. `file.notes` are lines about what else
        is in the file. See `paramstats.checkpoints.summarize_file`.
        """
        return self._description.file

    @skip_dynamo
    def ready(self) -> bool:
        """Return whether reading a statistic would not wait."""
        deferred = self._deferred
        return deferred is None or deferred.ready()

    @skip_dynamo
    def wait(self) -> Summary:
        """Wait until all statistics are available, and return this summary."""
        _ = self._record
        return self

    @skip_dynamo
    def filter(
        self,
        include: Pattern | Iterable[Pattern] | None = None,
        exclude: Pattern | Iterable[Pattern] | None = None,
    ) -> Summary:
        """Return a summary of some of the tensors, without reading them again.

        >>> import torch, paramstats
        >>> summary = paramstats.summarize(torch.nn.Linear(3, 2))
        >>> list(summary.filter(exclude="bias"))
        ['weight']

        Args:
            include, exclude: regular expressions, as in `summarize`.

        `total` of the result covers its tensors only.
        """
        options = make_options(include, exclude, 1, 1.0, False, False, False)
        record = self._record.select(options.include, options.exclude)
        if not len(record.layout):
            warn_no_match("Summary.filter", include, exclude, stacklevel=3)
        return Summary(record)

    @skip_dynamo
    def scalars(
        self,
        *,
        key: str = "{kind}_{stat}/{name}",
        stats: Sequence[str] = ("mean", "std", "norm", "zero_fraction"),
        totals: bool = True,
        depth: int | None = None,
    ) -> dict[str, float]:
        """Return a flat dict of floats for a logger, without tensors that were not read.

        >>> import torch, paramstats
        >>> summary = paramstats.summarize({"net.0.w": torch.ones(4), "net.1.w": torch.ones(5)})
        >>> summary.scalars(stats=("mean", "norm"), totals=False)
        ... # doctest: +NORMALIZE_WHITESPACE, +ELLIPSIS
        {'param_mean/net.0.w': 1.0, 'param_norm/net.0.w': 2.0,
         'param_mean/net.1.w': 1.0, 'param_norm/net.1.w': 2.236...}
        >>> summary.scalars(stats="norm", totals=False, depth=1)
        {'param_norm/net': 3.0}

        Args:
            key: a format string with the fields `kind` ("param", "grad" or "buffer"), `stat` and
                `name`. With `summarize(optimizer=...)`, `kind` is also "update" or a key of the
                optimizer's state, such as "exp_avg", and there are `update_ratio/NAME`,
                `grad_cosine_exp_avg/NAME`, `update_cosine_grad/NAME`, `optimizer_rms/NAME` and
                `optimizer_eps_fraction/NAME`. Their `kind` is the part before the first "_".
            stats: names of statistics, those that `TensorStats` has. "skewness", "kurtosis" and
                "abs_mean" are left out where the distribution was not read. The five keys above are
                always included.
            totals: whether to add the statistics of `total` and its gradient, under the name
                "total".
            depth: merge the tensors of each module into one value, where module names are cut to
                this many parts. None: one value per tensor.

        Raises:
            ValueError: an unknown statistic, a malformed key, a key that stands for two values, or
                a depth below 1.
        """
        return scalars(self._record, key, stats, totals, depth)

    @skip_dynamo
    def to_dict(self) -> dict[str, Any]:
        """Return `{"params": {name: ...}, "total": ...}`, nested, with types that JSON knows.

        For a sharded model it also has `diverged` and `is_local`, where they are not empty or
        False. NaN and infinities stay floats: `json.dumps` writes NaN and Infinity, and
        `json.loads` reads them.
        """
        return {
            "params": {name: entry.to_dict() for name, entry in self.items()},
            "total": self.total.to_dict(),
            **self._sharding(),
        }

    def _sharding(self) -> dict[str, Any]:
        record = self._record
        sharding: dict[str, Any] = {"diverged": dict(record.diverged)} if record.diverged else {}
        if record.is_local:
            sharding["is_local"] = True
        return sharding

    @skip_dynamo
    def to_pandas(self) -> pandas.DataFrame:
        """Return a DataFrame with a row per tensor; columns of gradients begin with `grad_`.

        With `summarize(optimizer=...)`, there are also columns of the update (`update_`) and of
        each key of the optimizer's state but the step (such as `exp_avg_`), and `update_ratio`,
        `update_cosine_grad`, `grad_cosine_exp_avg` (or another momentum), `optimizer_rms` and
        `optimizer_eps_fraction`. They are NaN where something is not known.

        For a sharded model, its `attrs` hold what `to_dict` adds.
        """
        frame = display.frame(self._record)
        frame.attrs.update(self._sharding())
        return frame

    @skip_dynamo
    def findings(
        self, thresholds: Thresholds | Mapping[str, float] | None = None, **changes: float
    ) -> Findings:
        """Run the health check: return what needs attention, the most severe first.

        >>> import torch, paramstats
        >>> summary = paramstats.summarize({"head.weight": torch.zeros(10, 64)})
        >>> summary.findings()
        WARNING zero weight: All weights are zero, so nothing passes through this layer. Check
          initialization, loading and pruning.
            head.weight  all 640 elements zero

        Each `Finding` has `severity`, `code`, `name`, `value`, `threshold`, `message` and
        `advice`. The result is empty if nothing was found.

        Args:
            thresholds: the limits, as `Thresholds` or as a dict of those that differ from the
                defaults.
            changes: limits that differ, by name: `summary.findings(sparse_weight=0.5)`. See
                `Thresholds` for the names.

        Raises:
            TypeError: there is no threshold of that name.
            ValueError: a threshold is not a number of 0 or more.
        """
        return find(self._record, make_thresholds(thresholds, changes))

    @skip_dynamo
    def table(
        self,
        *,
        width: int | None = None,
        sort_by: str | None = None,
        limit: int | None = None,
        kind: str | None = None,
        trainable: bool = False,
        color: bool = False,
    ) -> str:
        """Return an aligned table: a line per tensor and per block of modules, the total last.

        >>> import torch, paramstats
        >>> weights = {"a": torch.ones(2), "b": torch.tensor([0.0, 3.0]), "c": torch.zeros(2)}
        >>> print(paramstats.summarize(weights).table(sort_by="norm", limit=2))
        parameter       shape    mean    std   norm  zero_fraction
        ──────────────────────────────────────────────────────────
        b               [2]       1.5  2.121      3            50%
        a               [2]         1      0  1.414             0%
        ... and 1 more
        ──────────────────────────────────────────────────────────
        total               6  0.8333  1.169  3.317            50%

        Headings are the names of statistics, those of gradients with "grad." in front. The shape
        of a block or the total is its number of elements. Findings of severity WARNING and above
        are shown next to their tensor.

        Where updates are known, there is a column for `update_ratio`, and if some elements did not
        change, one for `update.zero_fraction`.

        Args:
            width: the number of columns to fit in. Columns are left out and long names are
                shortened where necessary. None: the width of the terminal; unlimited if standard
                output is not a terminal.
            sort_by: a statistic, such as "norm", "grad.norm", "update.norm" or "update_ratio", or
                one of the optimizer's state, such as "exp_avg.norm": the largest first, after NaN.
                "-norm": the smallest first. "name": by name. None: the order of the model.
            limit: show at most this many tensors.
            kind: show only the statistics of "param", "grad", "update" or "buffer", with min and
                max. "grad" and "update" leave out frozen parameters. For a checkpoint file,
                "buffer" shows what is not the model's.
            trainable: show only parameters that require a gradient.
            color: add escape codes for a terminal (needs rich). `print(summary)` adds them on a
                terminal; `rich.print(summary)` always does.

        Raises:
            ValueError: an unknown statistic or kind, or a limit below 0.
        """
        table = display.table(self._record, sort_by, limit, kind, trainable)
        return display.colored(table, width) if color else display.plain(table, width)

    @skip_dynamo
    def __str__(self) -> str:
        return display.for_print(display.table(self._record))

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield from display.rich_lines(display.table(self._record), options.max_width)

    def __repr__(self) -> str:
        """Describe the summary. Never waits for other ranks and never raises."""
        deferred = self._deferred
        if deferred is not None and deferred.record() is None and not deferred.ready():
            return "<Summary that is not ready>"
        try:
            record = self._record
        except Exception as error:
            return f"<Summary that failed: {error}>"
        n = len(record.layout)
        grads = sum(not moments.is_absent(record.table, n + row) for row in range(n))
        where = ", this rank's part of them" if record.is_local else ""
        return f"<Summary of {n} tensors, {grads} with gradients{where}>"

    def _repr_html_(self) -> str:
        return display.html(self._record)

    def __reduce__(self) -> tuple[Any, ...]:
        record = self._record
        return Summary, (
            record._replace(
                skipped=dict(record.skipped),
                diverged=dict(record.diverged),
                details=dict(record.details),
            ),
        )


def record_of(summary: Summary) -> Record:
    """Return the record of a summary, waiting for it if it is still being computed."""
    return summary._record


def layout_of(summary: Summary) -> Layout:
    """Return the layout of a summary; waits only where other ranks decide what is in it."""
    return summary._description.layout


def lacks_gradients(summary: Summary) -> bool:
    """Return whether parameters require a gradient and none has one.

    Does not wait: False if other ranks decide, and have not decided yet, what the summary has.
    """
    deferred = summary._deferred
    record = summary._ready if deferred is None else deferred.record()
    if record is None or not any(record.layout.requires_grad):
        return False
    n = len(record.layout)
    return all(moments.is_absent(record.table, n + row) for row in range(n))


def is_ready_within(summary: Summary, seconds: float) -> bool:
    """Return whether reading a statistic does not wait after at most `seconds` from now."""
    end = time.monotonic() + seconds
    while not summary.ready():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True
