"""A Summary of a checkpoint's files, without ever holding more than a few pieces of them."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable

import torch

from paramstats._core.layout import Layout, compile_patterns, passes
from paramstats._core.moments import ABSENT, ROW, unread
from paramstats._core.options import Pattern
from paramstats._core.record import Record
from paramstats._summary import Summary
from paramstats.checkpoints import _opening as opening
from paramstats.checkpoints._reading import Reader, pieces, runs_of
from paramstats.checkpoints._states import States
from paramstats.checkpoints._stored import Stored, check_unchanged, identities

Progress = Callable[[int, int], None]
"""Told the bytes that are done and the bytes there are, after every piece."""


def summarize_file(
    path: str | os.PathLike[str],
    *,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
    correction: float = 1,
    progress: Progress | None = None,
) -> Summary:
    """The statistics of all tensors in a checkpoint, as `summarize` has them of loaded ones.

    >>> import torch, tempfile, pathlib
    >>> from paramstats.checkpoints import summarize_file
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.pt"
    >>> torch.save({"w": torch.ones(4)}, path)
    >>> summarize_file(path)["w"].norm
    2.0

    Args:
        path: a `.safetensors` file; one of `torch.save`; the `.index.json` of several of these; a
            folder with one of them, or one that `torch.distributed.checkpoint` wrote.
        include, exclude, correction: as in `summarize`.
        progress: called with (bytes done, bytes in all) after every piece.

    Returns:
        A `Summary` in the order of the file. Nested dicts give dotted names. What has no elements
        that can be read is in `skipped`.

    Raises:
        CheckpointError: (a ValueError) the file is no checkpoint, or a broken one.
        OSError: it cannot be opened.

    Nothing in a file is imported or called, and no more than two pieces of 4 MB are held.
    """
    if not math.isfinite(correction):
        raise ValueError(f"paramstats: expected a finite number for correction, got {correction!r}")
    tensors = selected(opening.read(path), include, exclude)
    files = identities(tensors)
    table, skipped = _read(tensors, progress)
    check_unchanged(files)
    if skipped:
        first, *others = skipped
        more = f" (and {len(others)} more)" if others else ""
        warnings.warn(
            f"paramstats: {first!r}{more} could not be read, statistics are NaN: {skipped[first]}",
            RuntimeWarning,
            stacklevel=2,
        )
    return Summary(Record(_layout(tensors), table, float(correction), skipped=skipped))


def selected(
    tensors: list[Stored],
    include: Pattern | Iterable[Pattern] | None,
    exclude: Pattern | Iterable[Pattern] | None,
) -> list[Stored]:
    """The tensors with a name that `include` and `exclude` leave."""
    included = None if include is None else compile_patterns(include, "include")
    excluded = () if exclude is None else compile_patterns(exclude, "exclude")
    if included is None and not excluded:
        return tensors
    left = [t for t in tensors if any(passes(name, included, excluded) for name in t.names)]
    if tensors and not left:
        warnings.warn(
            f"paramstats: no name of {len(tensors):,} passes include and exclude",
            RuntimeWarning,
            stacklevel=3,
        )
    return left


def _layout(tensors: list[Stored]) -> Layout:
    return Layout(
        tuple(t.name for t in tensors),
        tuple(t.aliases for t in tensors),
        len(tensors),
        tuple(t.shape for t in tensors),
        tuple(t.dtype for t in tensors),
        (torch.device("cpu"),) * len(tensors),
        tuple(t.requires_grad for t in tensors),
    )


def _read(tensors: list[Stored], progress: Progress | None) -> tuple[bytes, dict[str, str]]:
    """The table of a summary, and why a tensor could not be read, by name."""
    owners = [row for row, tensor in enumerate(tensors) for _ in tensor.parts]
    parts = [(part, tensor.dtype) for tensor in tensors for part in tensor.parts]
    order = sorted(range(len(parts)), key=lambda i: (parts[i][0].path, parts[i][0].offset))
    total = sum(run.nbytes for i in order for run in runs_of(i, *parts[i])) if progress else 0
    done = 0
    states = States(len(parts))
    with Reader() as reader:
        runs = ((run,) for i in order for run in runs_of(i, *parts[i]))
        for ((piece, data),) in reader.read(pieces(runs)):
            states.update(piece, data)
            if progress is not None:
                done += sum(run.nbytes for run in piece.runs)
                progress(done, total)
    skipped = {t.name: t.unread for t in tensors if t.unread is not None}
    skipped |= {tensors[owners[i]].name: reason for i, reason in states.skipped.items()}
    merged, first = [], 0
    for tensor in tensors:
        merged.append(states.merged(range(first, first + len(tensor.parts))))
        first += len(tensor.parts)
    rows = [
        ROW.pack(*(unread(math.prod(t.shape)) if t.name in skipped else state))
        for t, state in zip(tensors, merged, strict=True)
    ]
    return b"".join(rows) + ROW.pack(*unread(ABSENT)) * len(tensors), skipped
