"""Define `compare`: what changed between two checkpoints, with a bounded amount of memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch

from paramstats._core import moments
from paramstats._core.format import elide, one_line_name
from paramstats._core.options import Pattern
from paramstats._core.torch_private import without_modes
from paramstats.checkpoints._checksums import Checksums
from paramstats.checkpoints._compare import pairing
from paramstats.checkpoints._compare.alignment import Pair, align
from paramstats.checkpoints._compare.comparison import Change, Comparison, GroupChange, sort_changes
from paramstats.checkpoints._compare.differences import Differences, States
from paramstats.checkpoints._compare.memory import list_memory
from paramstats.checkpoints._compare.renaming import NameMap, renamed
from paramstats.checkpoints._errors import naming_errors
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._opening import list_tensors
from paramstats.checkpoints._reading import Progress, Reader, block_view, join_blocks
from paramstats.checkpoints._stored_tensors import Group, StoredTensor

Source = str | os.PathLike[str] | torch.nn.Module | Mapping[str, Any]
"""The path of a checkpoint, a model, or names and tensors."""

_GROUPS: tuple[Group, ...] = get_args(Group)
_MAX_UNREAD = 10
_MAX_EXAMPLE = 80


def compare(
    a: Source,
    b: Source,
    *,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
    map: NameMap | None = None,
    strip_a: str | None = None,
    strip_b: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Return how far each tensor of `b` is from the tensor of the same name in `a`.

    >>> import torch, tempfile, pathlib
    >>> from paramstats.checkpoints import compare
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = model.load_state_dict({"weight": torch.tensor([[3.0, 4.0]])})
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "before.pt"
    >>> torch.save({"model": model.state_dict(), "step": 7}, path)
    >>> _ = model.load_state_dict({"weight": torch.tensor([[3.0, 9.0]])})
    >>> change = compare(path, model).rows[0]
    >>> change.norm_a, change.change_norm, change.relative_change, change.changed_fraction
    (5.0, 5.0, 1.0, 0.5)

    Args:
        a, b: each a path, as in `summarize_file`, where "#" selects a part: `"last.ckpt#ema"`; or a
            model or a mapping of tensors in memory, such as a state_dict. Formats may differ.
        include, exclude: as in `summarize`; searched in the names that the checkpoints have.
        map: regular expressions and their replacements, as a dict or as pairs. They are applied to
            the names of a, as by `re.sub`, one after the other.
        strip_a, strip_b: a prefix to remove from the names of a or b, before `map`.
        progress: called with (bytes done, bytes in all) after every piece.

    Returns:
        A `Comparison`. It has a row for each tensor in both checkpoints. It names the tensors that
        are in one of them only or have different shapes.

    Raises:
        CheckpointError: (a ValueError) a path is not a checkpoint, or it is damaged.
        OSError: a file cannot be opened.
        TypeError: a or b is not one of these.
        ValueError: `map`, `strip_a` or `strip_b` cannot be applied, or gives two tensors one name.
        re.error: a pattern is not a regular expression.

    Tensors whose names do not agree are compared if their names differ only in what wrappers add
    (`module.`, `_orig_mod.`, `base_model.model.`, ...) or in what they begin with, such as `model.`
    in one of the checkpoints. `mapped` and `notes` of the result say which. The state of an
    optimizer is never compared with tensors of a model.

    Elements are subtracted in float32, or in float64 where their dtypes need it. Equal infinities,
    and NaN in both places, count as unchanged. Tensors in memory are read in pieces as those in
    files. Of a DTensor only the elements on this rank are compared, without communication.
    """
    files = Files()
    with naming_errors("compare"), without_modes(), files:
        in_a = (
            list_tensors(files, a, include, exclude)
            if isinstance(a, (str, os.PathLike))
            else list_memory(files, a, include, exclude)
        )
        in_b = (
            list_tensors(files, b, include, exclude)
            if isinstance(b, (str, os.PathLike))
            else list_memory(files, b, include, exclude)
        )
        keys_a = renamed(in_a.tensors, "a", strip_a, map)
        keys_b = renamed(in_b.tensors, "b", strip_b)
        pairs, only_in_a, only_in_b, lines = align(in_a.tensors, in_b.tensors, keys_a, keys_b)
        skipped = {x.name: pairing.why_uncompared(x, y) for x, y in pairs}
        skipped = {name: reason for name, reason in skipped.items() if reason}
        readable = [(x, y) for x, y in pairs if x.name not in skipped]
        same_shape = [(x, y) for x, y in readable if x.shape == y.shape]
        checksums = [Checksums(contents.checksums) for contents in (in_a, in_b)]
        differences = _read(files, same_shape, progress, checksums)
    skipped |= {same_shape[row][0].name: reason for row, reason in differences.skipped.items()}
    rows = [row for row in range(len(same_shape)) if row not in differences.skipped]
    changes = [
        _change(*same_shape[row], differences.states[row], differences.changed.get(row))
        for row in rows
    ]
    states = [differences.states[row] for row in rows]
    ordered = sort_changes(changes, "relative_change")
    notes = [
        *lines,
        *_notes("a", in_a.notes, only_in_a),
        *_notes("b", in_b.notes, only_in_b),
    ]
    return Comparison(
        rows=tuple(sorted(ordered, key=lambda change: change.group != "model")),
        only_in_a=tuple(x.name for x in only_in_a),
        only_in_b=tuple(y.name for y in only_in_b),
        other_shape={x.name: (x.shape, y.shape) for x, y in readable if x.shape != y.shape},
        skipped=skipped,
        mapped={x.name: y.name for x, y in pairs if x.name != y.name},
        groups=_group_changes(changes, states),
        labels={x.name: label for x, y in same_shape if (label := _label(x, y))},
        notes=tuple(notes),
        reason="" if changes else _why_empty(in_a.tensors, in_b.tensors, len(pairs)),
    )


compare_files = compare


def _notes(side: str, notes: Iterable[str], unpaired: list[StoredTensor]) -> list[str]:
    """Return lines on what was not read of a checkpoint."""
    unread = [tensor for tensor in unpaired if tensor.unread_reason is not None]
    lines = [f"{side}: {one_line_name(note)}" for note in notes]
    for tensor in unread[:_MAX_UNREAD]:
        lines.append(
            f"{side}: not read: {one_line_name(tensor.name)}: "
            f"{one_line_name(tensor.unread_reason or '')}"
        )
    if len(unread) > _MAX_UNREAD:
        lines.append(f"{side}: not read: ... and {len(unread) - _MAX_UNREAD:,} more")
    return lines


def _label(a: StoredTensor, b: StoredTensor) -> str:
    """Return what a reader must know of the elements of two tensors, with the sides."""
    labels = [f"{side}: {x.label}" for side, x in (("a", a), ("b", b)) if x.label]
    return "; ".join(labels)


def _why_empty(all_a: list[StoredTensor], all_b: list[StoredTensor], pairs: int) -> str:
    """Return why nothing was compared, and what to do."""
    begin = "no tensor was compared: "
    empty = [side for side, tensors in (("a", all_a), ("b", all_b)) if not tensors]
    if empty:
        return f"{begin}{' and '.join(empty)} {'have' if len(empty) > 1 else 'has'} no tensors"
    if pairs:
        return (
            f"{begin}{pairs:,} tensor{'s have' if pairs > 1 else ' has'} a name in both, but other "
            f"shapes, or could not be read"
        )
    (count_a, shown_a), (count_b, shown_b) = map(_examples, (all_a, all_b))
    return (
        f"{begin}a has {count_a} such as {shown_a}; b has {count_b} such as {shown_b}; none agree. "
        f"Say how the names of a become those of b with map (a regular expression and its "
        f"replacement), remove a prefix with strip_a or strip_b, or compare a part: FILE#PART"
    )


def _examples(tensors: list[StoredTensor]) -> tuple[str, str]:
    """Return the number of names and some of them: the first, one of the middle, the last."""
    rows = dict.fromkeys((0, len(tensors) // 2, len(tensors) - 1))
    names = [f"'{elide(one_line_name(tensors[row].name), _MAX_EXAMPLE)}'" for row in rows]
    return f"{len(tensors):,} tensor{'s' if len(tensors) > 1 else ''}", ", ".join(names)


def _group_changes(changes: list[Change], states: list[States]) -> dict[Group, GroupChange]:
    """Return the change of all tensors of each group."""
    groups = {}
    for group in _GROUPS:
        rows = [row for row, change in enumerate(changes) if change.group == group]
        if not rows:
            continue
        of_group = [changes[row] for row in rows]
        finite_norm = math.hypot(*(moments.finalize_finite(states[row].a, 1).norm for row in rows))
        norm = math.hypot(*(change.change_norm for change in of_group))
        changed = sum(change.changed_count for change in of_group)
        groups[group] = GroupChange(
            tensors=len(of_group),
            unchanged=sum(change.changed_count == 0 for change in of_group),
            count=sum(change.count for change in of_group),
            changed_count=changed,
            norm_a=math.hypot(*(change.norm_a for change in of_group)),
            norm_b=math.hypot(*(change.norm_b for change in of_group)),
            change_norm=norm,
            relative_change=_relative(norm, finite_norm, changed),
        )
    return groups


def _relative(norm: float, finite_norm: float, changed: int) -> float:
    if not changed:
        return 0.0
    return norm / finite_norm if finite_norm else norm * math.inf if norm else 0.0


def _read(
    files: Files, pairs: list[Pair], progress: Progress | None, checksums: list[Checksums]
) -> Differences:
    """Read tensors of equal shapes, in the order of the first file."""
    differences = Differences(len(pairs))
    order = sorted(
        range(len(pairs)), key=lambda row: [part[:2] for part in pairs[row][0].parts[:1]]
    )
    blocks = (row_blocks for row in order for row_blocks in pairing.pair_blocks(row, *pairs[row]))
    total = sum(_elements(x, y) * (x.dtype.itemsize + y.dtype.itemsize) for x, y in pairs)
    done = 0
    with Reader(files, 2, checksums) as reader:
        for (piece_a, data_a), (piece_b, data_b) in reader.read(join_blocks(blocks)):
            for block_a, block_b in zip(piece_a.blocks, piece_b.blocks, strict=True):
                a, b = pairs[block_a.row]
                x, y = block_view(data_a, piece_a, block_a), block_view(data_b, piece_b, block_b)
                differences.update(
                    block_a.row, x.conj() if a.is_conj else x, y.conj() if b.is_conj else y
                )
                done += x.numel() * (x.itemsize + y.itemsize)
            if progress is not None:
                progress(done, total)
    for side, of_file, tensors in zip("ab", checksums, zip(*pairs, strict=True), strict=False):
        damage = of_file.damage(tensors).items()
        differences.skipped.update((row, f"{reason} (in {side})") for row, reason in damage)
    return differences


def _elements(*pair: StoredTensor) -> int:
    """Return the number of elements of a pair; of a DTensor only some are on this rank."""
    return min(sum(math.prod(part.sizes) for part in tensor.parts) for tensor in pair)


def _change(a: StoredTensor, b: StoredTensor, states: States, changed: int | None) -> Change:
    """Return a row of a comparison, given the elements that changed if they were counted."""
    difference = moments.finalize(states.difference, 1)
    n = states.difference.count
    if changed is None:
        changed = n - states.difference.zeros
    norm = difference.norm
    finite_norm = moments.finalize_finite(states.a, 1).norm
    return Change(
        name=a.name,
        shape=a.shape,
        dtype_a=a.dtype,
        dtype_b=b.dtype,
        count=n,
        norm_a=moments.finalize(states.a, 1).norm,
        norm_b=moments.finalize(states.b, 1).norm,
        change_norm=norm,
        relative_change=_relative(norm, finite_norm, changed),
        largest_change=difference.abs_max if n else 0.0,
        changed_count=changed,
        changed_fraction=changed / n if n else 0.0,
        group=a.group,
    )
