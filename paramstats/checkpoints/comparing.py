"""What changed from one checkpoint to another, read in step and never held whole."""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from paramstats import moments
from paramstats.checkpoints import opening, reading
from paramstats.checkpoints.aligning import aligned
from paramstats.checkpoints.comparison import Change, Comparison
from paramstats.checkpoints.reading import Reader, Run, boxes, pieces, run_of, view
from paramstats.checkpoints.states import read_table
from paramstats.checkpoints.stored import Part, Stored
from paramstats.checkpoints.summarizing import Progress, selected
from paramstats.moments import Moments

if TYPE_CHECKING:
    from paramstats.summarize import Pattern

_MOST = (1 << 15) - 1
"""Elements compared at a time: fewer than torch and the engine share among threads. Threads that
wait for the next few elements would keep the processors from the one that reads."""

_IN_FLOAT32 = frozenset(
    {
        *(torch.float32, torch.bfloat16, torch.float16, torch.bool),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *(torch.int8, torch.uint8, torch.int16, torch.uint16),
    }
)
"""Types whose elements are float32's, so that a difference there is zero only between equals."""

_LONG = frozenset({torch.int64, torch.uint64})


def compare_files(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """How far each tensor of checkpoint `b` is from the one of its name in `a`.

    >>> import torch, tempfile, pathlib
    >>> from paramstats.checkpoints import compare_files
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> torch.save({"w": torch.tensor([3.0, 4.0])}, folder / "a.pt")
    >>> torch.save({"w": torch.tensor([3.0, 9.0])}, folder / "b.pt")
    >>> change = compare_files(folder / "a.pt", folder / "b.pt").rows[0]
    >>> change.norm_a, change.change_norm, change.relative_change, change.changed_fraction
    (5.0, 5.0, 1.0, 0.5)

    Args:
        a, b: as in `summarize_file`; their formats may differ.
        include, exclude: as in `summarize`.
        progress: called with (bytes done, bytes in all) after every piece.

    Returns:
        A `Comparison`: a row for each tensor in both, the largest relative change first, and the
        names of those that are in one alone or have another shape.

    Raises:
        CheckpointError: (a ValueError) a file is no checkpoint, or a broken one.
        OSError: it cannot be opened.

    Where the two have no name in common, a prefix such as "model." that keeps those of one apart
    is left out of its names; `prefix_a` and `prefix_b` say so.

    Elements are subtracted in float32, or in float64 where their types demand it. Equal infinities
    and NaN in both places are no change.
    """
    all_a, all_b, prefix_a, prefix_b = aligned(
        selected(opening.read(a), include, exclude), selected(opening.read(b), include, exclude)
    )
    both = list(_matched(all_a, all_b))
    of_a, of_b = ({name for t in tensors for name in t.names} for tensors in (all_a, all_b))
    same = [(x, y) for x, y in both if x.shape == y.shape and not (x.unread or y.unread)]
    states = _States(len(same))
    _read(same, states, progress)
    skipped = {x.name: x.unread or y.unread or "" for x, y in both if x.unread or y.unread}
    skipped |= {same[row][0].name: reason for row, reason in states.skipped.items()}
    changes = [
        _change(x, y, *states.rows[row], states.changed.get(row))
        for row, (x, y) in enumerate(same)
        if x.name not in skipped
    ]
    return Comparison(
        rows=tuple(sorted(changes, key=_most_first)),
        only_in_a=tuple(x.name for x in all_a if not of_b.intersection(x.names)),
        only_in_b=tuple(y.name for y in all_b if not of_a.intersection(y.names)),
        other_shape={
            x.name: (x.shape, y.shape)
            for x, y in both
            if x.shape != y.shape and x.name not in skipped
        },
        skipped=skipped,
        prefix_a=prefix_a,
        prefix_b=prefix_b,
    )


def _matched(all_a: list[Stored], all_b: list[Stored]) -> Iterator[tuple[Stored, Stored]]:
    """What has a name in common, under the first such name: a tied tensor of one checkpoint may be
    several in the other."""
    of_b = {name: row for row, tensor in enumerate(all_b) for name in tensor.names}
    for x in all_a:
        rows = dict.fromkeys(of_b[name] for name in x.names if name in of_b)
        for row in rows:
            name = next(name for name in x.names if name in all_b[row].names)
            yield x._replace(name=name), all_b[row]


def _most_first(change: Change) -> tuple[bool, float]:
    """A NaN before all numbers: it is what to look at."""
    relative = change.relative_change
    return (False, 0.0) if math.isnan(relative) else (True, -relative)


def _read(same: list[tuple[Stored, Stored]], states: _States, progress: Progress | None) -> None:
    order = sorted(range(len(same)), key=lambda row: [part[:2] for part in same[row][0].parts[:1]])

    def runs() -> Iterator[tuple[Run, Run]]:
        for row in order:
            yield from _in_step(row, *same[row])

    total = sum(math.prod(x.shape) * (x.dtype.itemsize + y.dtype.itemsize) for x, y in same)
    done = 0
    with Reader(2) as reader:
        for (piece_a, data_a), (piece_b, data_b) in reader.read(pieces(runs())):
            for run_a, run_b in zip(piece_a.runs, piece_b.runs, strict=True):
                x, y = view(data_a, piece_a, run_a), view(data_b, piece_b, run_b)
                states.update(run_a.part, x, y)
                done += x.numel() * (x.itemsize + y.itemsize)
            if progress is not None:
                progress(done, total)


def _in_step(row: int, a: Stored, b: Stored) -> Iterator[tuple[Run, Run]]:
    """The same elements of both, a box at a time."""
    for x, y in _near(a.parts, b.parts):
        starts = tuple(map(max, x.starts, y.starts))
        ends = [
            min(s + n, t + m)
            for s, n, t, m in zip(x.starts, x.sizes, y.starts, y.sizes, strict=True)
        ]
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        if any(size <= 0 for size in sizes):
            continue
        limits = [_limit(x, a.dtype), _limit(y, b.dtype)]
        for box in boxes(starts, sizes, limits):
            yield run_of(row, x, a.dtype, box), run_of(row, y, b.dtype, box)


def _near(all_x: tuple[Part, ...], all_y: tuple[Part, ...]) -> Iterator[tuple[Part, Part]]:
    """All pairs that have elements in common, and few that have none: of thousands of parts, not
    each against each."""
    by_box = {(y.starts, y.sizes): y for y in all_y}
    left = []
    for x in all_x:
        y = by_box.pop((x.starts, x.sizes), None)
        if y is None:
            left.append(x)
        else:  # sharded alike; no other part has any of these elements
            yield x, y
    if not left or not by_box:
        return
    places = list(zip(*(y.starts for y in by_box.values()), strict=True))
    d = max(range(len(places)), key=lambda d: len(set(places[d])))
    others = sorted(by_box.values(), key=lambda y: y.starts[d])
    begins = [y.starts[d] for y in others]
    longest = max(y.sizes[d] for y in others)
    for x in left:
        first = bisect.bisect_right(begins, x.starts[d] - longest)
        for y in others[first : bisect.bisect_left(begins, x.starts[d] + x.sizes[d])]:
            yield x, y


def _limit(part: Part, dtype: torch.dtype) -> tuple[Part, int]:
    return part, min(reading.PIECE // dtype.itemsize, _MOST)


class _States:
    """The states of a's elements, b's and their differences, of every tensor in both."""

    def __init__(self, tensors: int) -> None:
        self.rows = [(Moments(), Moments(), Moments())] * tensors
        self.changed: dict[int, int] = {}
        """Elements that changed, where the differences cannot tell."""
        self.skipped: dict[int, str] = {}

    def update(self, row: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Takes in some elements of a, and those of b in the same places."""
        try:
            if x.is_complex() or y.is_complex():
                wide = torch.complex128
            elif x.dtype in _IN_FLOAT32 and y.dtype in _IN_FLOAT32:
                wide = torch.float32
            else:
                wide = torch.float64
            if x.dtype in _LONG and x.dtype == y.dtype:  # float64 does not tell all of them apart
                differ = (x.view(torch.int64) != y.view(torch.int64)).sum()
                self.changed[row] = self.changed.get(row, 0) + int(differ)
            d = y.to(wide) - x.to(wide)
            states = _states([_real(x), _real(y), _real(d)])
            if moments.finite_count(states[2]) < states[2].count:
                states[2] = _states([_real(_without_equals(x, y, wide))])[0]
        except (RuntimeError, NotImplementedError) as error:  # a type that torch only names
            self.skipped[row] = f"{type(error).__name__}: {error}".splitlines()[0]
            return
        before = self.rows[row]
        self.rows[row] = (
            moments.merge(before[0], states[0]),
            moments.merge(before[1], states[1]),
            moments.merge(before[2], states[2]),
        )


def _real(x: torch.Tensor) -> torch.Tensor:
    """Complex numbers by their moduli, whose norm and maximum are theirs."""
    return x.to(torch.complex128).abs() if x.is_complex() else x


def _without_equals(x: torch.Tensor, y: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """The difference where equal infinities, and NaN in both places, make none."""
    if not wide.is_complex:
        wide = torch.float64
    x, y = x.to(wide), y.to(wide)
    return (y - x).masked_fill((x == y) | (x.isnan() & y.isnan()), 0)


def _states(tensors: list[torch.Tensor]) -> list[Moments]:
    table, skipped = read_table(tensors)
    for reason in skipped.values():
        raise NotImplementedError(reason)
    return [moments.row(table, row) for row in range(len(tensors))]


def _change(
    x: Stored, y: Stored, a: Moments, b: Moments, difference: Moments, changed: int | None
) -> Change:
    norm_a, norm_b = moments.finalize(a, 1).norm, moments.finalize(b, 1).norm
    d = moments.finalize(difference, 1)
    n = difference.count
    changed = n - difference.zeros if changed is None else changed
    return Change(
        name=x.name,
        shape=x.shape,
        dtype_a=x.dtype,
        dtype_b=y.dtype,
        count=n,
        norm_a=norm_a,
        norm_b=norm_b,
        change_norm=d.norm,
        relative_change=_ratio(d.norm, moments.finalize_finite(a, 1).norm) if changed else 0.0,
        largest_change=d.abs_max if n else 0.0,
        changed_count=changed,
        changed_fraction=changed / n if n else 0.0,
    )


def _ratio(change: float, norm: float) -> float:
    """Of zeros, infinitely much."""
    if norm == 0:
        return math.nan if math.isnan(change) else math.inf if change else 0.0
    return change / norm
