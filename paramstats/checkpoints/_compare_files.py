"""Define `compare_files`: what changed between two checkpoints, with a bounded amount of memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

from paramstats._core import moments
from paramstats._core.options import Pattern
from paramstats._core.torch_private import without_modes
from paramstats.checkpoints import _pairing as pairing
from paramstats.checkpoints._checksums import Checksums
from paramstats.checkpoints._comparison import Change, Comparison, sort_changes
from paramstats.checkpoints._differences import Differences, States
from paramstats.checkpoints._errors import naming_errors
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._opening import list_tensors
from paramstats.checkpoints._reading import Progress, Reader, block_view, join_blocks
from paramstats.checkpoints._stored_tensors import StoredTensor


def compare_files(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Return how far each tensor of checkpoint `b` is from the tensor of the same name in `a`.

    >>> import torch, tempfile, pathlib
    >>> from paramstats.checkpoints import compare_files
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> torch.save({"w": torch.tensor([3.0, 4.0])}, folder / "a.pt")
    >>> torch.save({"w": torch.tensor([3.0, 9.0])}, folder / "b.pt")
    >>> change = compare_files(folder / "a.pt", folder / "b.pt").rows[0]
    >>> change.norm_a, change.change_norm, change.relative_change, change.changed_fraction
    (5.0, 5.0, 1.0, 0.5)

    Args:
        a, b: paths of checkpoints, as in `summarize_file`; their formats may differ.
        include, exclude: as in `summarize`.
        progress: called with (bytes done, bytes in all) after every piece.

    Returns:
        A `Comparison`. It has a row for each tensor in both checkpoints, the largest relative
        change first. It names the tensors that are in one of them only or have different shapes.

    Raises:
        CheckpointError: (a ValueError) a path is not a checkpoint, or it is damaged.
        OSError: a file cannot be opened.

    If the checkpoints have no name in common, a prefix such as "model." is removed from the names
    of one of them. `prefix_a` and `prefix_b` of the result name it.

    Elements are subtracted in float32, or in float64 where their dtypes need it. Equal infinities,
    and NaN in both places, count as unchanged.
    """
    with naming_errors("compare_files"), without_modes(), Files() as files:
        contents = [list_tensors(files, path, include, exclude) for path in (a, b)]
        all_a, all_b, prefix_a, prefix_b = pairing.without_prefixes(
            contents[0].tensors, contents[1].tensors
        )
        pairs = list(pairing.pair_tensors(all_a, all_b))
        skipped = {x.name: x.unread_reason or y.unread_reason or "" for x, y in pairs}
        skipped = {name: reason for name, reason in skipped.items() if reason}
        readable = [(x, y) for x, y in pairs if x.name not in skipped]
        same_shape = [(x, y) for x, y in readable if x.shape == y.shape]
        checksums = [Checksums(of_file.checksums) for of_file in contents]
        differences = _read(files, same_shape, progress, checksums)
        changes = [
            _change(x, y, differences.states[row], differences.changed.get(row))
            for row, (x, y) in enumerate(same_shape)
            if row not in differences.skipped
        ]
    names_a, names_b = pairing.all_names(all_a), pairing.all_names(all_b)
    skipped |= {same_shape[row][0].name: reason for row, reason in differences.skipped.items()}
    return Comparison(
        rows=tuple(sort_changes(changes, "relative_change")),
        only_in_a=tuple(x.name for x in all_a if names_b.isdisjoint(x.names)),
        only_in_b=tuple(y.name for y in all_b if names_a.isdisjoint(y.names)),
        other_shape={x.name: (x.shape, y.shape) for x, y in readable if x.shape != y.shape},
        skipped=skipped,
        prefix_a=prefix_a,
        prefix_b=prefix_b,
    )


def _read(
    files: Files,
    pairs: list[pairing.Pair],
    progress: Progress | None,
    checksums: list[Checksums],
) -> Differences:
    """Read tensors of equal shapes, in the order of the first file."""
    differences = Differences(len(pairs))
    order = sorted(
        range(len(pairs)), key=lambda row: [part[:2] for part in pairs[row][0].parts[:1]]
    )
    blocks = (row_blocks for row in order for row_blocks in pairing.pair_blocks(row, *pairs[row]))
    total = sum(math.prod(x.shape) * (x.dtype.itemsize + y.dtype.itemsize) for x, y in pairs)
    done = 0
    with Reader(files, 2) as reader:
        for filled in reader.read(join_blocks(blocks)):
            for of_file, (piece, data) in zip(checksums, filled, strict=True):
                of_file.update(piece.path, piece.begin, data)
            (piece_a, data_a), (piece_b, data_b) = filled
            for block_a, block_b in zip(piece_a.blocks, piece_b.blocks, strict=True):
                a, b = pairs[block_a.row]
                x, y = block_view(data_a, piece_a, block_a), block_view(data_b, piece_b, block_b)
                differences.update(
                    block_a.row, x.conj() if a.is_conj else x, y.conj() if b.is_conj else y
                )
                done += x.numel() * (x.itemsize + y.itemsize)
            if progress is not None:
                progress(done, total)
    for of_file, tensors in zip(checksums, zip(*pairs, strict=True), strict=False):
        differences.skipped.update(of_file.damage(tensors))
    return differences


def _change(a: StoredTensor, b: StoredTensor, states: States, changed: int | None) -> Change:
    """Return a row of a comparison, given the elements that changed if they were counted."""
    difference = moments.finalize(states.difference, 1)
    n = states.difference.count
    if changed is None:
        changed = n - states.difference.zeros
    norm = difference.norm
    relative_change = 0.0
    if changed:
        finite_norm = moments.finalize_finite(states.a, 1).norm
        relative_change = norm / finite_norm if finite_norm else norm * math.inf if norm else 0.0
    return Change(
        name=a.name,
        shape=a.shape,
        dtype_a=a.dtype,
        dtype_b=b.dtype,
        count=n,
        norm_a=moments.finalize(states.a, 1).norm,
        norm_b=moments.finalize(states.b, 1).norm,
        change_norm=norm,
        relative_change=relative_change,
        largest_change=difference.abs_max if n else 0.0,
        changed_count=changed,
        changed_fraction=changed / n if n else 0.0,
    )
