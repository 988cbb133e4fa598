"""`History`: summaries by step, bounded in memory and complete on disk."""

from __future__ import annotations

import operator
import os
import warnings
from typing import Any

from paramstats._history import writer as files
from paramstats._history.journal import Journal
from paramstats._history.json_lines import HEADER, Entry
from paramstats._history.reader import Reader
from paramstats._history.store import Store
from paramstats._history.thinning import ThinnedEntries
from paramstats._history.views import Views, layouts_of, names_of
from paramstats._summary import Summary, layout_of

_MAX_BYTES = 256 << 20

_Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class History(Views):
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
    those of all parameters together. `.update`, `.update_ratio` and `.optimizer` are known at steps
    with `summarize(optimizer=...)`; `.histogram`, `.skewness`, `.kurtosis` and `.abs_mean` at those
    with `summarize(distribution=...)`.

    Args:
        path: a new file to write every entry to (JSON Lines; docs/history.md describes the format).
            None: memory only. In a distributed run, only one rank should have a path.
        resume: continue the file if it exists: its entries are read first. An incomplete end (after
            a crash) is removed, with a warning.
        max_bytes: limit for the entries in memory. An entry takes 144 bytes per parameter, with
            `summarize(optimizer=...)` about 300 more, and 72 for each key of the state: about 660
            with Adam. Each distribution takes about 0.4 to 1.5 KB more, for a tensor and for a
            gradient; with `summarize(rows=...)`, 48 bytes for each row. At the limit, every second
            entry is dropped, except the first and the latest, and later entries are kept at that
            wider spacing. So the entries always span the whole run evenly. The first and the latest
            entry are kept at any limit. The file keeps every entry.

    Raises:
        FileExistsError: `path` has entries or other content, and `resume` is not set.
        OSError: the file cannot be created or read.
        ValueError: `path` is not a history file, or has a broken or invalid line (an incomplete end
            after a crash is allowed); it is not a regular file; or `max_bytes` is not a whole
            number above 0.
    """

    def __init__(
        self,
        path: _Path | None = None,
        *,
        resume: bool = False,
        max_bytes: int = _MAX_BYTES,
    ) -> None:
        if type(max_bytes) is not int or max_bytes <= 0:
            raise ValueError(
                f"paramstats.History: expected a number of bytes > 0 for max_bytes, "
                f"got {max_bytes!r}"
            )
        store = Store(ThinnedEntries(max_bytes))
        if path is not None:
            path = _resolved(path, "History")
            files.create(path)
            with Reader(path) as reader:
                if reader.status.st_size > len(HEADER) and not resume:
                    raise _exists(path)
                _read(reader, store.kept)
                try:
                    store.writer = files.Writer(reader, store.kept.last_serial)
                except files.ChangedError:  # another process has begun to write
                    raise _exists(path) from None
        self._journal = Journal(store)
        self._warned_going_back = False
        self._reported = 0  # missing entries that `close` has warned about

    @classmethod
    def load(
        cls,
        path: _Path,
        *,
        max_bytes: int = _MAX_BYTES,
    ) -> History:
        """Return the history in a file. Entries appended to it later are not written to the file.

        If the file ends within a line, as after a crash, all lines before are read, and a warning
        says how many were lost.

        Raises:
            OSError: the file cannot be read.
            ValueError: not a history file, or a broken or invalid line (an incomplete end after a
                crash is allowed).
        """
        history = cls(max_bytes=max_bytes)
        kept = history._journal.store.kept
        with Reader(_resolved(path, "History.load")) as reader:
            _read(reader, kept)
        return history

    def append(self, step: int, summary: Summary) -> None:
        """Add the summary of a step.

        It does not wait for statistics that are not available yet, because a GPU or other ranks are
        still at work: a later call of `append`, `wait` or `close` records them. If they never
        become available, for example because a rank has ended, the entry is left out with a
        warning.

        Steps increase. If `step` is not greater than the last one, the run went back, for example
        to a checkpoint: all entries from `step` on are dropped, now and whenever the file is read.
        The first time, a warning says so.

        If the file cannot be written, a warning says so once, and later calls try again.

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
        last = self._journal.last_step
        self._journal.append(step, summary)
        if step <= last and not self._warned_going_back:
            self._warned_going_back = True
            warnings.warn(
                f"paramstats.History.append: step {step} comes after step {last}, so the run "
                f"went back: earlier entries from step {step} on are dropped",
                RuntimeWarning,
                stacklevel=2,
            )

    def wait(self) -> History:
        """Wait until all statistics are available and written to the file; return this history."""
        self._journal.settle()
        return self

    def close(self) -> None:
        """Wait for all statistics and write them; warn if the file lacks entries.

        The history can still be used: no file is open between two calls. If an error ends a `with`
        block, it waits for a second at most, because other ranks may have ended.
        """
        self._warn_missing(self._journal.settle())

    def __enter__(self) -> History:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:  # the statistics may never arrive: other ranks may have ended
            self._warn_missing(self._journal.settle_within(1), len(self._journal))

    def save(self, path: _Path) -> None:
        """Write the entries in memory to a file, for `load`.

        An existing file is replaced in one step and keeps its mode, or it is left as it is if
        writing fails. The history's own file already has every entry and is not replaced.

        Raises:
            OSError: the file cannot be written.
            ValueError: `path` is a folder, a device, a pipe or a socket.
        """
        path = _resolved(path, "History.save")
        store = self._journal.settle()
        if store.writer is None or not store.writer.is_file(path):
            files.save(path, store.kept.entries[:])
        elif store.missing:
            raise OSError(
                f"paramstats.History.save: {path!r} lacks {store.missing} entries and cannot be "
                f"written; pass another path"
            )

    def __repr__(self) -> str:
        entries = self._journal.store.kept.entries[:]  # does not wait
        tensors = len(names_of(layouts_of(entries)))
        span = f", steps {entries[0].step} to {entries[-1].step}" if entries else ""
        pending = f", {len(self._journal)} pending" if len(self._journal) else ""
        return f"<History of {len(entries)} summaries of {tensors} tensors{span}{pending}>"

    def _warn_missing(self, store: Store, pending: int = 0) -> None:
        """Warn if the file lacks more entries than the last such warning said."""
        missing = store.missing + pending
        if store.writer is not None and missing > self._reported:
            self._reported = missing
            warnings.warn(
                f"paramstats.History: {store.writer.path!r} lacks {missing} "
                f"{'entry' if missing == 1 else 'entries'}; save(path) writes those in memory to "
                f"another file",
                RuntimeWarning,
                stacklevel=3,
            )

    def _entries(self) -> list[Entry]:
        """Return the entries in memory, after waiting for their statistics."""
        return self._journal.settle().kept.entries[:]


def _exists(path: str) -> FileExistsError:
    return FileExistsError(
        f"paramstats.History: expected a new file, got {path!r}, which exists; pass resume=True "
        f"to continue it, or another path"
    )


def _read(reader: Reader, kept: ThinnedEntries) -> None:
    """Add the entries of a file to those in memory."""
    for entry in reader:
        kept.add(entry.step, entry.summary, layout_of(entry.summary), entry.number)
    kept.adopt_spacing()


def _resolved(path: _Path, function: str) -> str:
    """Return an absolute path without symbolic links, so that a change of folder has no effect."""
    try:
        name = os.fsdecode(path)
    except TypeError:
        raise TypeError(
            f"paramstats.{function}: expected the path of a file, got {path!r}"
        ) from None
    if not name or "\0" in name:
        raise ValueError(f"paramstats.{function}: expected the path of a file, got {path!r}")
    return os.path.realpath(name)


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
