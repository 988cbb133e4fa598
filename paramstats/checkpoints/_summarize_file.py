"""Define `summarize_file`: the statistics of a checkpoint, with a bounded amount of memory."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from typing import get_args

import torch

from paramstats._core.denormals import threads_with_denormals
from paramstats._core.forked import threads_that_exist
from paramstats._core.format import one_line_name
from paramstats._core.layout import Layout
from paramstats._core.moments import ABSENT_ROW, ROW, unread
from paramstats._core.options import Pattern
from paramstats._core.record import FileSource, Record
from paramstats._core.torch_private import without_modes
from paramstats._summary import Summary
from paramstats.checkpoints._checksums import Checksums
from paramstats.checkpoints._errors import naming_errors
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._opening import list_tensors
from paramstats.checkpoints._reading import (
    PIECE,
    Progress,
    Reader,
    blocks_of_part,
    join_blocks,
)
from paramstats.checkpoints._states import States
from paramstats.checkpoints._stored_tensors import Group, StoredTensor

_CPU = torch.device("cpu")
_GROUPS: tuple[Group, ...] = get_args(Group)


def summarize_file(
    path: str | os.PathLike[str],
    *,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
    correction: float = 1,
    progress: Progress | None = None,
) -> Summary:
    """Return the statistics of all tensors in a checkpoint, without loading it.

    >>> import torch, tempfile, pathlib
    >>> from paramstats.checkpoints import summarize_file
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.pt"
    >>> torch.save({"w": torch.ones(4)}, path)
    >>> summarize_file(path)["w"].norm
    2.0

    Args:
        path: a safetensors, torch.save, pickle, numpy, GGUF or HDF5 file, an `.index.json`, or a
            folder with a checkpoint. "#" selects a part: `"last.ckpt#ema"`.
        include, exclude, correction: as in `summarize`.
        progress: called with (bytes done, bytes in all) after every piece.

    Returns:
        A `Summary` in the order of the file, the tensors of the model first; `total` is theirs.
        Tensors in nested dicts have dotted names. `skipped` names the tensors that cannot be read,
        with the reason. `file` has the group and label of each, and notes on the file.

    Raises:
        CheckpointError: (a ValueError) the path is not a checkpoint, or it is damaged.
        OSError: a file cannot be opened.
        TypeError: the path is not a path. For a model in memory, use `paramstats.summarize`.

    Nothing in a file is imported or executed. At most two pieces of 4 MB are in memory at a time.
    """
    if not math.isfinite(correction):
        raise ValueError(
            "paramstats.checkpoints.summarize_file: expected a finite number for correction, got "
            f"{correction!r}"
        )
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(
            "paramstats.checkpoints.summarize_file: expected a path, got "
            f"{type(path).__name__}; for a model in memory, use paramstats.summarize"
        )
    with naming_errors("summarize_file"), without_modes(), Files() as files:
        contents = list_tensors(files, path, include, exclude)
        # The rows of the model are its "parameters", of which the total is made.
        tensors = sorted(contents.tensors, key=lambda tensor: _GROUPS.index(tensor.group))
        table, skipped = _read(files, tensors, progress, Checksums(contents.checksums))
    if skipped:
        name, reason = next(iter(skipped.items()))
        more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        warnings.warn(
            f"paramstats.checkpoints.summarize_file: '{one_line_name(name)}'{more} could not be "
            f"read, statistics are NaN: {one_line_name(reason)}",
            RuntimeWarning,
            stacklevel=2,
        )
    layout = Layout(
        tuple(t.name for t in tensors),
        tuple(t.aliases for t in tensors),
        sum(t.group == "model" for t in tensors),
        tuple(t.shape for t in tensors),
        tuple(t.dtype for t in tensors),
        (_CPU,) * len(tensors),
        tuple(t.requires_grad for t in tensors),
    )
    source = FileSource(
        groups={t.name: t.group for t in tensors},
        labels={t.name: t.label for t in tensors if t.label},
        notes=contents.notes,
    )
    return Summary(Record(layout, table, float(correction), skipped=skipped, file=source))


def _read(
    files: Files, tensors: list[StoredTensor], progress: Progress | None, checksums: Checksums
) -> tuple[bytes, dict[str, str]]:
    """Return the table of a record, and why a tensor could not be read, by name."""
    parts = [
        (row, part, t.stored_dtype, t.decoder) for row, t in enumerate(tensors) for part in t.parts
    ]
    parts.sort(key=lambda item: (item[1].path, item[1].offset))
    blocks = (block for row_part in parts for block in blocks_of_part(*row_part))
    done = total = 0
    if progress is not None:
        total = sum(block.nbytes for row_part in parts for block in blocks_of_part(*row_part))
    states = States(len(tensors))
    reader = Reader(files, 1, [checksums])
    with threads_that_exist(), reader, threads_with_denormals(PIECE):
        for ((piece, data),) in reader.read(join_blocks((block,) for block in blocks)):
            states.update(piece, data)
            done += sum(block.nbytes for block in piece.blocks)
            if progress is not None:
                progress(done, total)
    skipped = {t.name: t.unread_reason for t in tensors if t.unread_reason is not None}
    reasons = states.skipped | checksums.damage(tensors)
    skipped |= {tensors[row].name: reason for row, reason in reasons.items()}
    rows = [
        ROW.pack(*(unread(math.prod(t.shape)) if t.name in skipped else state))
        for t, state in zip(tensors, states.states, strict=True)
    ]
    return b"".join(rows) + ABSENT_ROW * len(tensors), skipped
