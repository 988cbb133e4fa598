"""`History`: summaries by step, bounded in memory, complete on disk, as arrays and as plots."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from paramstats._core.layout import Layout, no_such_name
from paramstats._core.optional import import_optional
from paramstats._core.options import STATS, checked_stats
from paramstats._history.file import Reader
from paramstats._history.journal import Journal
from paramstats._history.json_lines import Entry
from paramstats._history.selection import Names, check_plot, choose
from paramstats._history.thinning import ThinnedEntries
from paramstats._summary import Summary, layout_of, record_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from paramstats._history.series import ParamSeries, TotalSeries

_MAX_BYTES = 256 << 20

_MAX_LINES, _MAX_CHOSEN_LINES = 10, 20
"""Maximum number of lines in `plot`, for a whole model and for selected tensors."""


class History:
    """Summaries by step: append one at each step, then look at any statistic over training.

    >>> import torch, paramstats
    >>> model = torch.nn.Linear(3, 2)
    >>> history = paramstats.History()
    >>> for step in range(0, 100, 10):
    ...     model(torch.ones(1, 3)).sum().backward()
    ...     history.append(step, paramstats.summarize(model))
    >>> history["bias"].grad.mean
    array([ 1.,  2.,  3.,  4.,  5.,  6.,  7.,  8.,  9., 10.])
    >>> len(history), history.steps[-1], history.names
    (10, np.int64(90), ('weight', 'bias'))

    Iterating gives (step, summary) pairs. `history[name]` has an array over `history.steps` for
    each statistic, under the same name as in a summary: `.mean`, `.grad.norm`. `history.total` has
    those of all parameters together.

    Args:
        path: a file to write every entry to (JSON Lines; docs/history.md describes the format). An
            existing file is continued: its entries are read first, and an incomplete end (after a
            crash) is removed with a warning. The file is locked until `close`; a second
            `History` on it warns and keeps its own entries in memory only. None: memory only. In a
            distributed run, only one rank should have a path.
        max_bytes: limit for the entries in memory. An entry takes 144 bytes per parameter. At the
            limit, every second entry is dropped, except the first and the latest, and later entries
            are kept at that wider spacing. So the entries always span the whole run evenly. The
            first and the latest entry are kept at any limit. The file keeps every entry.

    Raises:
        ValueError: `path` is not a history file, or has a broken or invalid line (an incomplete end
            after a crash is allowed); or `max_bytes` is not a whole number above 0.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, max_bytes: int = _MAX_BYTES
    ) -> None:
        if type(max_bytes) is not int or max_bytes <= 0:
            raise ValueError(
                f"paramstats.History: expected a number of bytes > 0 for max_bytes, "
                f"got {max_bytes!r}"
            )
        self._kept = ThinnedEntries(max_bytes)
        self._journal = Journal(None if path is None else os.path.realpath(path))
        self._warned_going_back = False
        self._read(self._journal.open())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, max_bytes: int = _MAX_BYTES) -> History:
        """Return the history in a file. Entries appended to it later are not written to the file.

        If the file ends within a line, as after a crash, all lines before are read, and a warning
        says how many were lost.

        Raises:
            ValueError: not a history file, or a broken or invalid line (an incomplete end after a
                crash is allowed).
        """
        history = cls(max_bytes=max_bytes)
        history._read(Reader(os.fspath(path)))
        return history

    def append(self, step: int, summary: Summary) -> None:
        """Add the summary of a step.

        It does not wait for a GPU: pending statistics are written to the file by a later
        `append`, `wait` or `close`.

        Steps increase. If `step` is not greater than the last one, the run went back, for example
        to a checkpoint: all entries from `step` on are dropped, now and whenever the file is read.
        The first time, a warning says so.

        Raises:
            TypeError: `step` is not a whole number, or `summary` is not a `Summary`.
            ValueError: `step` does not fit into 64 bits.
        """
        step = _checked_step(step)
        if not isinstance(summary, Summary):
            raise TypeError(
                f"paramstats.History.append: expected a Summary, got {type(summary).__name__} "
                f"at step {step}; pass paramstats.summarize(model)"
            )
        with self._journal.lock:
            last = self._kept.entries[-1].step if self._kept.entries else step - 1
            if step <= last and not self._warned_going_back:
                self._warned_going_back = True
                warnings.warn(
                    f"paramstats.History.append: step {step} comes after step {last}, so the run "
                    f"went back: earlier entries from step {step} on are dropped",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._journal.add(self._kept.add(step, None, summary))

    def wait(self) -> History:
        """Wait until all statistics are available and written to the file; return this history."""
        with self._journal.lock:
            self._journal.settle(wait=True)
        return self

    def close(self) -> None:
        """Write the remaining entries, then unlock and close the file.

        The entries stay in memory. A later `append` opens the file again.
        """
        with self._journal.lock:
            self._journal.settle(wait=True)
            self._journal.close()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the entries in memory to a file, for `load`.

        An existing file is replaced in one step, or left as it is if writing fails.
        """
        with self._journal.lock:
            self._journal.settle(wait=True)
            self._journal.save(os.path.realpath(path), self._kept.entries)

    # ---- entries and arrays

    def __len__(self) -> int:
        return len(self._kept.entries)

    def __iter__(self) -> Iterator[tuple[int, Summary]]:
        return iter([(entry.step, entry.summary) for entry in self._kept.entries])

    def __contains__(self, name: object) -> bool:
        return any(name in layout.index for layout in self._layouts())

    def __getitem__(self, name: str) -> ParamSeries:
        if name not in self:
            known = [known for layout in self._layouts() for known in layout.index]
            raise KeyError(no_such_name(name, known, len(self.names)))
        import_optional("numpy", "History")
        from paramstats._history.series import ParamSeries

        return ParamSeries(self.steps, [summary.get(name) for _, summary in self])

    @property
    def total(self) -> TotalSeries:
        """The statistics of all parameters together, at every step; `.grad` has the gradients'."""
        import_optional("numpy", "History")
        from paramstats._history.series import TotalSeries

        return TotalSeries(self.steps, [summary.total for _, summary in self])

    @property
    def names(self) -> tuple[str, ...]:
        """The first name of every tensor of any step, in order of appearance."""
        return tuple(dict.fromkeys(name for layout in self._layouts() for name in layout.names))

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """The steps of the entries, increasing."""
        numpy = import_optional("numpy", "History")
        steps: npt.NDArray[np.int64] = numpy.array([step for step, _ in self], dtype=numpy.int64)
        return steps

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
                there is no gradient.
        """
        frames = import_optional("pandas", "History.to_pandas")
        names, positions = checked_stats(stats, "History.to_pandas")
        from paramstats._history.cells import table_of

        columns = [*names, *(f"grad_{name}" for name in names)]
        index = [(step, name) for step, summary in self for name in summary]
        frame: pandas.DataFrame = frames.DataFrame(
            table_of([record_of(summary) for _, summary in self], positions),
            index=frames.MultiIndex.from_tuples(index, names=("step", "name")),
            columns=columns,
        )
        return frame

    def __repr__(self) -> str:
        entries = self._kept.entries
        span = f", steps {entries[0].step} to {entries[-1].step}" if entries else ""
        return f"<History of {len(self)} summaries of {len(self.names)} tensors{span}>"

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
            stat: a statistic of `TensorStats`, or "min_update_ratio", which ignores `kind`.
            kind: "grad" for gradients, "param" for the tensors themselves.
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

    def _draw(
        self,
        method: str,
        names: Names | None,
        stat: str,
        kind: str,
        ax: Axes | None,
        max_lines: int,
    ) -> Figure:
        import_optional("matplotlib", f"History.{method}")
        from paramstats._history import cells, heatmap, line_plot

        function = f"paramstats.History.{method}"
        if not len(self):
            raise ValueError(f"{function}: expected entries, got an empty history")
        check_plot(function, stat, kind)
        chosen = choose(function, names, self._layouts())
        has_total = "total" in chosen and "total" not in self
        tensors = chosen[:-1] if has_total else chosen
        records = [record_of(summary) for _, summary in self]
        data = cells.collect(self.steps, records, tensors, stat, kind)
        is_heatmap = len(chosen) > max_lines
        if has_total and not is_heatmap:
            if stat == "min_update_ratio":
                raise ValueError(f"{function}: expected names for min_update_ratio, got 'total'")
            data = cells.with_total(data, self.total)
        if data.is_empty():
            what = "gradients" if kind == "grad" else "statistics"
            remedy = "; kind='param' draws the tensors themselves" if kind == "grad" else ""
            raise ValueError(f"{function}: expected {what}, got none at any step{remedy}")
        return heatmap.draw_heatmap(data, ax) if is_heatmap else line_plot.draw_lines(data, ax)

    def _layouts(self) -> list[Layout]:
        """Return the distinct layouts, in order of appearance."""
        return list(dict.fromkeys(layout_of(summary) for _, summary in self))

    def _read(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._kept.add(*entry)
        self._kept.adopt_spacing()


def _checked_step(step: Any) -> int:
    try:
        whole = operator.index(step)
    except TypeError:
        raise TypeError(
            f"paramstats.History.append: expected a whole number for step, got {step!r}"
        ) from None
    if not -(1 << 63) <= whole < 1 << 63:
        raise ValueError(f"paramstats.History.append: expected a step of 64 bits, got {whole}")
    return whole
