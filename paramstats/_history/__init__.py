"""Summaries over training: bounded in memory, whole on disk, arrays over steps."""

from __future__ import annotations

import operator
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from paramstats._core.layout import Layout, no_such_name
from paramstats._core.optional import import_optional
from paramstats._core.options import STATS
from paramstats._history.file import Reader
from paramstats._history.journal import Journal
from paramstats._history.lines import Entry
from paramstats._history.thinning import Thinned
from paramstats._summary import Summary, layout_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from paramstats._history.series import ParamSeries, TotalSeries

Names = str | re.Pattern[str] | Iterable[str | re.Pattern[str]]

_MAX_BYTES = 256 << 20

_MOST_LINES = 10
"""More than these are hard to follow one by one."""

_MOST_CHOSEN = 20
"""More than these nobody follows, who asked for them or not."""


class History:
    """Summaries by step: append each, then look at any parameter's statistics over training.

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

    Args:
        path: a file that takes every entry as it comes, a line each (JSON Lines; docs/history.md
            has the format). An existing one is continued: its entries are read first, and what a
            crash broke at its end is cut off, with a warning. It is locked until `close`: where
            another history has it open, a warning says so, and this one's entries stay in memory.
            None: memory alone.
        max_bytes: how much memory the entries may take. One takes 144 bytes a parameter. When
            they are too many, every second one is dropped, all but the first and the latest, and
            from then on entries are kept at the coarser spacing: they span the whole run evenly,
            however long it becomes. The first and the latest stay at any bound. The file keeps
            all.

    Raises:
        ValueError: `path` is a file of another kind, broken in its middle, or has lines that make
            no sense; `max_bytes` is no size.

    Iteration gives (step, summary) pairs. `history[name]` gives arrays over `history.steps`, under
    the names that the statistics have in a summary: `.mean`, `.grad.norm`, ...; `history.total` is all
    as one. In a distributed run one process, as a rule the first, should have a `path`.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, max_bytes: int = _MAX_BYTES
    ) -> None:
        if type(max_bytes) is not int or max_bytes <= 0:
            raise ValueError(
                f"paramstats.History: expected a number of bytes > 0 for max_bytes, "
                f"got {max_bytes!r}"
            )
        self._kept = Thinned(max_bytes)
        self._journal = Journal(None if path is None else os.path.realpath(path))
        self._went_back = False
        self._take(self._journal.open())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, max_bytes: int = _MAX_BYTES) -> History:
        """The history that a file holds; the file stays as it is, whatever is appended later.

        A file that ends in the middle of a line, as a crash leaves it, gives what is before the
        cut, with a warning that says how many lines were lost.

        Raises:
            ValueError: a file of another kind, one with a broken line before whole ones, or with a
                line that is JSON and makes no sense.
        """
        history = cls(max_bytes=max_bytes)
        history._take(Reader(os.fspath(path)))
        return history

    def append(self, step: int, summary: Summary) -> None:
        """Adds an entry; waits for no GPU: statistics on their way are taken when they are here.

        Steps increase. A step that is not beyond the last one is that of a run that went back, to
        a checkpoint say: entries from that step on are dropped, here and whenever the file is read
        again; the first time a warning says so.

        Raises:
            TypeError: `step` is no whole number, or `summary` no `Summary`.
            ValueError: `step` does not fit into 64 bits.
        """
        step = _checked_step(step)
        if not isinstance(summary, Summary):
            raise TypeError(
                f"paramstats.History: expected a Summary, got {type(summary).__name__} "
                f"at step {step}; pass paramstats.summarize(model)"
            )
        with self._journal.lock:
            last = self._kept.entries[-1].step if self._kept.entries else step - 1
            if step <= last and not self._went_back:
                self._went_back = True
                warnings.warn(
                    f"paramstats.History: step {step} comes after step {last}, as in a run that "
                    f"went back: earlier entries from step {step} on are dropped",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._journal.add(self._kept.add(step, None, summary))

    def wait(self) -> History:
        """Waits until all statistics are here and, where there is a file, in it; returns this."""
        with self._journal.lock:
            self._journal.settle(wait=True)
        return self

    def close(self) -> None:
        """Writes what is not written yet and lets go of the file; the entries stay, and another one
        opens it again."""
        with self._journal.lock:
            self._journal.settle(wait=True)
            self._journal.close()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the entries that are in memory to a file, for `load`. A file that is there is
        replaced by the whole new one at once, or stays as it was."""
        with self._journal.lock:
            self._journal.settle(wait=True)
            self._journal.save(os.path.realpath(path), self._kept.entries)

    # ---- what is there

    def __len__(self) -> int:
        return len(self._kept.entries)

    def __iter__(self) -> Iterator[tuple[int, Summary]]:
        return iter([(entry.step, entry.summary) for entry in self._kept.entries])

    def __contains__(self, name: object) -> bool:
        return any(name in summary for summary in self._one_of_each_layout())

    def __getitem__(self, name: str) -> ParamSeries:
        if name not in self:
            known = [known for s in self._one_of_each_layout() for known in layout_of(s).index]
            raise KeyError(no_such_name(name, known, len(self.names)))
        import_optional("numpy", "History")
        from paramstats._history.series import ParamSeries

        return ParamSeries(self.steps, [summary.get(name) for _, summary in self])

    @property
    def total(self) -> TotalSeries:
        """All parameters as one at every step, and in `grad` all gradients as one."""
        import_optional("numpy", "History")
        from paramstats._history.series import TotalSeries

        totals = [summary.total for _, summary in self]
        return TotalSeries(self.steps, totals, [total.grad for total in totals])

    @property
    def names(self) -> tuple[str, ...]:
        """The first name of every tensor that was there at any step, in order of appearance."""
        return tuple(dict.fromkeys(name for s in self._one_of_each_layout() for name in s))

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """The steps of the entries, increasing."""
        numpy = import_optional("numpy", "History")
        steps: npt.NDArray[np.int64] = numpy.array([step for step, _ in self], dtype=numpy.int64)
        return steps

    def to_pandas(self, stats: Sequence[str] = STATS) -> pandas.DataFrame:
        """A long DataFrame: a row for each step and tensor, columns as in `Summary.to_pandas`.

        >>> import torch, paramstats
        >>> history = paramstats.History()
        >>> for step in range(2):
        ...     history.append(step, paramstats.summarize({"w": torch.ones(4), "b": torch.ones(1)}))
        >>> history.to_pandas(stats=("norm",)).loc[1, "norm"].to_dict()
        {'w': 2.0, 'b': 1.0}

        Args:
            stats: which statistics; those of gradients begin with `grad_`. NaN where there was no
                gradient, or the tensor could not be read.
        """
        frames = import_optional("pandas", "History.to_pandas")
        from paramstats._history.series import joined, rows

        stats = (stats,) if isinstance(stats, str) else tuple(stats)
        columns = [*stats, *(f"grad_{stat}" for stat in stats)]
        index = [(step, name) for step, summary in self for name in summary]
        frame: pandas.DataFrame = frames.DataFrame(
            joined([rows(summary, stats) for _, summary in self], len(columns)),
            index=frames.MultiIndex.from_tuples(index, names=("step", "name")),
            columns=columns,
        )
        return frame

    def __repr__(self) -> str:
        entries = self._kept.entries
        span = f", steps {entries[0].step} to {entries[-1].step}" if entries else ""
        return f"<History of {len(self)} summaries of {len(self.names)} tensors{span}>"

    # ---- pictures

    def plot(
        self,
        names: Names | None = None,
        stat: str = "norm",
        kind: str = "grad",
        *,
        ax: Axes | None = None,
    ) -> Figure:
        """Lines over steps, each labelled at its end; without `names` the whole model.

        >>> import torch, paramstats
        >>> history = paramstats.History()
        >>> for step in range(3):
        ...     history.append(step, paramstats.summarize({"w": torch.full((4,), float(step))}))
        >>> figure = history.plot("w", "norm", kind="param")
        >>> figure.axes[0].get_title(loc="left")
        'parameter L2 norm'

        Args:
            names: names, or regular expressions searched in them, one or several; "total" is all
                as one. None: every tensor, from eleven on as a `heatmap`. More than twenty that
                were chosen make one, too, which has no row for the total.
            stat: a figure, by its name in `TensorStats`, or "min_update_ratio", whatever `kind` says.
            kind: "grad" for the gradients', "param" for the tensors' own.
            ax: matplotlib axes to draw in. None: a new figure, without pyplot; a notebook shows it.

        Returns:
            The `matplotlib.figure.Figure`; `savefig` writes it.

        Raises:
            TypeError: `names` is neither.
            ValueError: nothing to draw, a name that is not there, an unknown `stat` or `kind`.

        The statistics' axis is logarithmic where sizes (norm, std, ...) span more than a factor of 20,
        and zeros are then off the picture. Steps at which a chosen tensor held NaN or infinities
        are marked.
        """
        import_optional("matplotlib", "History.plot")
        from paramstats._history import plotting

        plotting.check(self, stat, kind)
        if names is None:
            found, most = list(self.names), _MOST_LINES
        else:
            found, most = plotting.chosen(self, names), _MOST_CHOSEN
        if len(found) > most:
            from paramstats._history import heatmap

            return heatmap.heatmap(self, found, stat, kind, ax)
        return plotting.lines(self, found, stat, kind, ax)

    def heatmap(
        self,
        stat: str = "norm",
        kind: str = "grad",
        *,
        names: Names | None = None,
        ax: Axes | None = None,
    ) -> Figure:
        """A row for each tensor, a column for each entry at its step, colours by magnitude.

        Arguments as in `plot`. Rows are labelled by name, or, where there are too many, by module.
        NaN and infinities, zeros and missing gradients have colours of their own. Beyond 900
        entries neighbours share a column, which shows the greatest of them, and NaN if any is.
        """
        import_optional("matplotlib", "History.heatmap")
        from paramstats._history import heatmap, plotting

        plotting.check(self, stat, kind)
        found = plotting.chosen(self, self.names if names is None else names)
        return heatmap.heatmap(self, found, stat, kind, ax)

    def _one_of_each_layout(self) -> list[Summary]:
        """The first summary of each layout, in order of appearance."""
        first: dict[Layout, Summary] = {}
        for _, summary in self:
            first.setdefault(layout_of(summary), summary)
        return list(first.values())

    def _take(self, entries: Iterable[Entry]) -> None:
        for step, number, summary in entries:
            self._kept.add(_checked_step(step), number, summary)
        self._kept.take_spacing()


def _checked_step(step: Any) -> int:
    try:
        whole = operator.index(step)
    except TypeError:
        raise TypeError(
            f"paramstats.History: expected a whole number for step, got {step!r}"
        ) from None
    if not -(1 << 63) <= whole < 1 << 63:
        raise ValueError(f"paramstats.History: expected a step of 64 bits, got {whole}")
    return whole
