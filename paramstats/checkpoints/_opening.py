"""Open a path that a user gives, and list the tensors of the checkpoint there."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from paramstats._core.options import Pattern
from paramstats.checkpoints._errors import unexpected
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._folders.choice import read_folder
from paramstats.checkpoints._folders.index import INDEX, PART, read_index
from paramstats.checkpoints._formats import distributed
from paramstats.checkpoints._formats.detection import EXPECTED, read_file
from paramstats.checkpoints._groups import assign_groups
from paramstats.checkpoints._quantized.resolve import resolve
from paramstats.checkpoints._selection import select_names, select_part, split_path
from paramstats.checkpoints._stored_tensors import Contents

_MAX_NOTES = 10

_RANK = re.compile(r"(?:world_size_(?P<size>\d+))?(?:^|_)rank_?(?P<rank>\d+)(?=[_.])", re.ASCII)
"""In the name of a file that one rank wrote, such as `model_world_size_2_rank_0.pt`."""


def list_tensors(
    files: Files,
    path: str | bytes | os.PathLike[str],
    include: Pattern | Iterable[Pattern] | None,
    exclude: Pattern | Iterable[Pattern] | None,
) -> Contents:
    """Return the tensors of a checkpoint whose names `include` and `exclude` let pass.

    After the path may follow "#" and a part of the checkpoint, such as "model.pt#ema".

    Raises CheckpointError if it is not a checkpoint or damaged, OSError if a file cannot be opened.
    """
    file, part = split_path(path)
    contents = resolve(_read_path(files, file), files)
    notes = contents.notes if contents.tensors else ("no tensors in it", *contents.notes)
    if len(notes) > _MAX_NOTES:
        notes = (*notes[:_MAX_NOTES], f"{len(notes) - _MAX_NOTES:,} more notes")
    contents = contents._replace(notes=notes)
    if part is not None:
        contents = select_part(contents, part, file)
    contents = contents._replace(tensors=assign_groups(contents.tensors))
    return select_names(contents, include, exclude, os.fsdecode(path), stacklevel=3)


def _read_path(files: Files, path: Path) -> Contents:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return read_folder(files, path)
    if not stat.S_ISREG(mode):
        raise unexpected(EXPECTED, "no regular file", path)
    if path.name == distributed.METADATA:
        return distributed.read(files, path.parent)
    if INDEX.fullmatch(path.name):
        return read_index(files, path)
    contents = read_file(files, path)
    return contents._replace(notes=(*_notes_of_name(path.name), *contents.notes))


def _notes_of_name(name: str) -> tuple[str, ...]:
    """Return what the name of a file says about others that belong to it."""
    part, rank = PART.fullmatch(name), _RANK.search(name)
    if part and int(part["parts"]) > 1:
        return (f"not read: the other {int(part['parts']) - 1:,} shards (pass their folder)",)
    if rank and rank["size"] != "1":
        return (f"not read: the files of other ranks than rank {rank['rank']}",)
    return ()
