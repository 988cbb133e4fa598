"""Look at the entries of a history: summaries by step, arrays, tables and plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from paramstats._core.layout import Layout
from paramstats._core.names import no_such_name
from paramstats._core.optional import import_optional
from paramstats._core.options import DISTRIBUTION_STATS, STATS, checked_stats, split_stats
from paramstats._core.torch_private import skip_dynamo
from paramstats._findings import Findings, Thresholds
from paramstats._findings.over_time import Monitor
from paramstats._findings.thresholds import make_thresholds
from paramstats._history.json_lines import Entry
from paramstats._history.selection import Names
from paramstats._summary import Summary, layout_of, record_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from paramstats._history.series import ParamSeries, TotalSeries

_MAX_LINES, _MAX_CHOSEN_LINES = 10, 20
"""Maximum number of lines in `plot`, for a whole model and for selected tensors."""


class Views:
    """The part of `History` that only reads entries."""

    def _entries(self) -> list[Entry]:
        """Return the entries in memory, after waiting for their statistics."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._entries())

    def __iter__(self) -> Iterator[tuple[int, Summary]]:
        return iter([(entry.step, entry.summary) for entry in self._entries()])

    def __contains__(self, name: object) -> bool:
        return any(name in layout.index for layout in layouts_of(self._entries()))

    def __getitem__(self, name: str) -> ParamSeries:
        entries = self._entries()
        layouts = layouts_of(entries)
        if not any(name in layout.index for layout in layouts):
            known = dict.fromkeys(known for layout in layouts for known in layout.index)
            raise KeyError(no_such_name(name, known, len(names_of(layouts))))
        import_optional("numpy", "History")
        from paramstats._history.series import ParamSeries

        return ParamSeries(_steps(entries), [entry.summary.get(name) for entry in entries])

    @property
    def total(self) -> TotalSeries:
        """The statistics of all parameters together, at every step; `.grad` has the gradients'."""
        import_optional("numpy", "History")
        from paramstats._history.series import TotalSeries

        entries = self._entries()
        return TotalSeries(_steps(entries), [entry.summary.total for entry in entries])

    @property
    def names(self) -> tuple[str, ...]:
        """The first name of every tensor of any step, in order of appearance."""
        return tuple(names_of(layouts_of(self._entries())))

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """The steps of the entries, increasing."""
        return _steps(self._entries())

    @skip_dynamo
    def findings(
        self, thresholds: Thresholds | Mapping[str, float] | None = None, **changes: float
    ) -> Findings:
        """Run the health check over time: return what changed, the most severe first.

        >>> import torch, paramstats
        >>> model = torch.nn.Linear(8, 8)
        >>> history = paramstats.History()
        >>> for step in range(12):
        ...     model.weight.grad = torch.full((8, 8), 1e5 if step == 10 else 1.0)
        ...     history.append(step, paramstats.summarize(model))
        >>> finding = history.findings()[0]
        >>> finding.code.name, finding.name, finding.step, finding.end
        ('GRADIENT_SPIKE', 'weight', 10, None)

        It has the findings of changes between entries, and those of single summaries that last: in
        three of the latest five entries that were checked. `Finding.step` is the step at which it
        began, and `Finding.end` the one at which it had ended; None if it lasts. Findings of equal
        severity are in the order of their first step, so that what left its past first comes first.

        The entries in memory are used; `watch(on_finding=...)` uses every entry while it is taken.

        Args:
            thresholds, changes: as for `Summary.findings`.

        Raises:
            TypeError: there is no threshold of that name.
            ValueError: a threshold is not a number of 0 or more.
        """
        monitor = Monitor(make_thresholds(thresholds, changes))
        for entry in self._entries():
            monitor.add(entry.step, record_of(entry.summary))
        return monitor.findings()

    def to_pandas(self, stats: str | Sequence[str] = STATS) -> pandas.DataFrame:
        """Return a DataFrame with a row per step and tensor; columns as in `Summary.to_pandas`.

        >>> import torch, paramstats
        >>> history = paramstats.History()
        >>> for step in range(2):
        ...     history.append(step, paramstats.summarize({"w": torch.ones(4), "b": torch.ones(1)}))
        >>> history.to_pandas(stats=("norm",)).loc[1, "norm"].to_dict()
        {'w': 2.0, 'b': 1.0}

        Args:
            stats: names of statistics. Columns of gradients begin with `grad_`; they are NaN where
                there is no gradient. With `summarize(optimizer=...)`, there are also columns of
                updates (`update_`), of the optimizer's state (such as `exp_avg_`), and those of
                `Summary.to_pandas` that need two tensors, such as `update_ratio`. By default,
                "skewness", "kurtosis" and "abs_mean" are added if an entry has distributions.
        """
        frames = import_optional("pandas", "History.to_pandas")
        plain, own = split_stats(stats)
        chosen, _ = checked_stats(plain, "History.to_pandas")
        from paramstats._history.cells import columns_of

        entries = self._entries()
        records = [record_of(entry.summary) for entry in entries]
        details = (detail for record in records for detail in record.details.values())
        if stats is STATS and any(detail.distribution for detail in details):
            own = DISTRIBUTION_STATS
        names = [name for entry in entries for name in entry.summary]
        steps = _steps(entries).repeat([len(entry.summary) for entry in entries])
        frame: pandas.DataFrame = frames.DataFrame(
            columns_of(records, (*chosen, *own)),
            index=frames.MultiIndex.from_arrays((steps, names), names=("step", "name")),
        )
        return frame

    # ---- plots

    def plot(
        self,
        names: Names | None = None,
        *,
        stat: str = "norm",
        kind: str = "grad",
        ax: Axes | None = None,
    ) -> Figure:
        """Draw a statistic over steps: a line per tensor, labelled at its end.

        >>> import torch, paramstats
        >>> history = paramstats.History()
        >>> for step in range(3):
        ...     history.append(step, paramstats.summarize({"w": torch.full((4,), float(step))}))
        >>> figure = history.plot("w", stat="norm", kind="param")
        >>> figure.axes[0].get_title(loc="left")
        'parameter L2 norm'

        Args:
            names: one or several names, or regular expressions to search in the names. "total" is
                all parameters together. None: all tensors. With more than twenty selected tensors
                (ten if None), a `heatmap` without the total is drawn.
            stat: a statistic of `TensorStats`; "skewness", "kurtosis" and "abs_mean" need
                `summarize(distribution=...)`. Others ignore `kind`: "update_ratio",
                "optimizer_rms", "optimizer_eps_fraction", "update_cosine_grad" and, with the key of
                the momentum, "grad_cosine_exp_avg", which need `summarize(optimizer=...)`; and
                "min_update_ratio".
            kind: "grad" for gradients, "param" for the tensors themselves; with an optimizer also
                "update", or a key of the optimizer's state, such as "exp_avg".
            ax: matplotlib axes to draw in. None: a new figure, which a notebook displays.

        Returns:
            The `matplotlib.figure.Figure`. `savefig` writes it to a file.

        Raises:
            TypeError: `names` are not names or patterns.
            ValueError: nothing to draw, or an unknown name, `stat` or `kind`.

        The axis is logarithmic if norms, standard deviations and other magnitudes span more than a
        factor of 20; zeros are not shown on a logarithmic axis. Steps with NaN or Inf are marked.
        """
        max_lines = _MAX_LINES if names is None else _MAX_CHOSEN_LINES
        return self._draw("plot", names, stat, kind, ax, max_lines)

    def heatmap(
        self,
        names: Names | None = None,
        *,
        stat: str = "norm",
        kind: str = "grad",
        ax: Axes | None = None,
    ) -> Figure:
        """Draw a statistic over steps as colors: a row per tensor, a column per entry.

        Arguments and errors are those of `plot`. Rows are labelled by tensor, or by module if there
        are too many. NaN and infinities, zeros and missing gradients have their own colors. Beyond
        900 entries, neighbors share a column: it shows the largest magnitude, and NaN if any.
        """
        return self._draw("heatmap", names, stat, kind, ax, max_lines=0)

    def distribution(self, name: str, *, kind: str = "param", ax: Axes | None = None) -> Figure:
        """Draw how the elements of a tensor are distributed over magnitudes, over steps.

        >>> import torch, paramstats
        >>> history = paramstats.History()
        >>> for step in range(3):
        ...     source = {"w": torch.linspace(-1, 1, 99) * step}
        ...     history.append(step, paramstats.summarize(source, distribution=True))
        >>> history.distribution("w").axes[0].get_title(loc="left")
        'parameter distribution of w'

        A heat map with a row for the magnitudes from each power of two to the next one, and a
        column per entry. The color is the share of all elements, of both signs together. Zeros have
        a row of their own at the bottom, NaN and infinities one at the top. Beyond 900 entries,
        neighbors share a column: it shows the largest share of each row.

        Args:
            name: the name of a tensor, or "total" for all parameters together.
            kind: "param" for the tensor itself, "grad" for its gradient.
            ax: matplotlib axes to draw in. None: a new figure, which a notebook displays.

        Returns:
            The `matplotlib.figure.Figure`. `savefig` writes it to a file.

        Raises:
            KeyError: there is no tensor of that name.
            ValueError: an unknown `kind`, or no entry has the distribution, because it needs
                `summarize(distribution=...)`.

        Gradients are divided by `grad_scale`, so that a row may begin between two powers of two. If
        the scale changes by other factors than powers of two, magnitudes are moved by a factor of
        up to 1.42, and the label of the axis says so.
        """
        import_optional("matplotlib", "History.distribution")
        from paramstats._history.distribution_map import draw_distribution

        function = "paramstats.History.distribution"
        return draw_distribution(function, self._entries(), name, kind, ax)

    def _draw(self, method: str, *arguments: Any, **options: Any) -> Figure:
        import_optional("matplotlib", f"History.{method}")
        from paramstats._history.drawing import draw

        return draw(f"paramstats.History.{method}", self._entries(), *arguments, **options)


def layouts_of(entries: Sequence[Entry]) -> list[Layout]:
    """Return the distinct layouts, in order of appearance."""
    return list(dict.fromkeys(layout_of(entry.summary) for entry in entries))


def names_of(layouts: Sequence[Layout]) -> dict[str, None]:
    """Return the first name of every tensor of any layout, in order of appearance."""
    return dict.fromkeys(name for layout in layouts for name in layout.names)


def _steps(entries: Sequence[Entry]) -> npt.NDArray[np.int64]:
    numpy = import_optional("numpy", "History")
    steps: npt.NDArray[np.int64] = numpy.array([entry.step for entry in entries], numpy.int64)
    return steps
