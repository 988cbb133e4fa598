"""What changed from one checkpoint to another, read in step and never held whole."""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from paramstats._core import moments
from paramstats._core.moments import Moments
from paramstats.checkpoints import _opening as opening
from paramstats.checkpoints import _reading as reading
from paramstats.checkpoints._aligning import aligned
from paramstats.checkpoints._comparison import Change, Comparison, in_order
from paramstats.checkpoints._differences import Differences
from paramstats.checkpoints._reading import Reader, Run, boxes, pieces, run_of, view
from paramstats.checkpoints._stored import Part, Stored, check_unchanged, identities, is_dense
from paramstats.checkpoints._summarizing import Progress, selected

if TYPE_CHECKING:
    from paramstats._core.options import Pattern


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
    states = Differences(len(same))
    files = identities([*all_a, *all_b])
    _read(same, states, progress)
    check_unchanged(files)
    skipped = {x.name: x.unread or y.unread or "" for x, y in both if x.unread or y.unread}
    skipped |= {same[row][0].name: reason for row, reason in states.skipped.items()}
    changes = [
        _change(x, y, *states.rows[row], states.changed.get(row))
        for row, (x, y) in enumerate(same)
        if x.name not in skipped
    ]
    return Comparison(
        rows=tuple(in_order(changes, "relative_change")),
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


def _read(
    same: list[tuple[Stored, Stored]], states: Differences, progress: Progress | None
) -> None:
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
                x, y = (
                    z.conj() if stored.conj else z
                    for z, stored in zip((x, y), same[run_a.part], strict=True)
                )
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
        alike = _alike(sizes, x.strides, y.strides)
        limits = [(x, reading.PIECE // a.dtype.itemsize), (y, reading.PIECE // b.dtype.itemsize)]
        for box in boxes(starts, sizes, limits):
            runs = run_of(row, x, a.dtype, box), run_of(row, y, b.dtype, box)
            yield (_in_a_row(runs[0]), _in_a_row(runs[1])) if alike else runs


def _alike(sizes: tuple[int, ...], x: tuple[int, ...], y: tuple[int, ...]) -> bool:
    """Whether elements lie side by side in both and in one order, as in most checkpoints: so do
    those of the boxes they are cut to, and their order does not matter."""
    same = all(n == 1 or s == t for n, s, t in zip(sizes, x, y, strict=True))
    return same and is_dense(sizes, x)


def _in_a_row(run: Run) -> Run:
    return run._replace(sizes=(math.prod(run.sizes),), strides=(1,), is_dense=True)


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
