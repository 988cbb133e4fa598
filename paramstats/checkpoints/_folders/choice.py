"""Choose what to read in a folder, by the names that training libraries give to files.

Nothing is read twice or added up by accident: one checkpoint is read, and the notes name the files
that were not. If several could be meant, the error lists them.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from paramstats.checkpoints._errors import listed, unexpected
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._folders.index import (
    INDEX,
    PART,
    check_parts_present,
    files_of_index,
    read_index,
)
from paramstats.checkpoints._folders.pipelines import PIPELINE, components, with_prefix
from paramstats.checkpoints._folders.subfolders import find_folders, no_checkpoint, weight_files
from paramstats.checkpoints._formats import distributed
from paramstats.checkpoints._formats.detection import read_file
from paramstats.checkpoints._stored_tensors import Contents, merge_files

_STEMS = {"model": 0, "pytorch_model": 0, "diffusion_pytorch_model": 1, "adapter_model": 2}
"""Names of transformers, diffusers and peft, the preferred first."""

_OTHER_STEM = 3
_FORMATS = (".safetensors", ".bin")
"""Formats that a library writes under one of these names, the preferred first."""

_SELDOM_WEIGHTS = (".pkl", ".npy")
_LOOSE = (_OTHER_STEM, 0, 1, 0)
"""The rank of safetensors files of any name. Several of them are one checkpoint."""

_TRAINING_STATE = re.compile(
    r"(optimizer|optim|scheduler|lr_scheduler|scaler|rng_state|random_states|training_args|sampler"
    r"|dl_state_dict|custom_checkpoint|extra_state)([_-].*)?\.(pt|pth|bin|pkl|safetensors)"
)
_OF_ONE_RANK = re.compile(r"(^|_)rank_?\d+|consolidated\.\d+\.pth$")
_MERGE = (
    "each has the shards of one rank: merge them with the library that wrote them, or pass the "
    "path of one"
)


class _Candidate(NamedTuple):
    """Files of a folder that make one checkpoint: an index, shards, or a single file."""

    rank: tuple[int, ...]
    """The smallest is preferred."""
    names: tuple[str, ...]
    is_index: bool = False

    def __str__(self) -> str:
        more = f" and {len(self.names) - 1:,} more" if len(self.names) > 1 else ""
        return self.names[0] + more


def read_folder(files: Files, folder: Path) -> Contents:
    """Return the tensors of the checkpoint in a folder, and notes on the files that are not read.

    Raises CheckpointError if there is none, if it is not complete, or if several could be meant.
    """
    names = sorted(os.listdir(folder))
    parts = components(files, folder) if PIPELINE in names else []
    if not parts:
        return _read_checkpoint(files, folder, names)
    of_parts = []
    for part in parts:
        inner = sorted(os.listdir(folder / part))
        contents = _read_checkpoint(files, folder / part, inner)
        of_parts.append((part, with_prefix(contents, part)))
    contents = merge_files(of_parts, str(folder))
    others = weight_files(folder, names) + find_folders(folder, parts, depth=1)
    return _with_notes(contents, [_not_read(others, f"not named by {PIPELINE}")])


def _read_checkpoint(files: Files, folder: Path, names: list[str]) -> Contents:
    """Return the tensors of the checkpoint that a folder's own files make."""
    if distributed.METADATA in names:
        others = [name for name in weight_files(folder, names) if not name.endswith(".distcp")]
        note = _not_read(others, f"not named by {distributed.METADATA}")
        return _with_notes(distributed.read(files, folder), [note])
    chosen = _choose(folder, names)
    read = set()
    for name in chosen.names:
        files.note(folder / name)
        read |= set(files_of_index(files, folder / name).values()) if chosen.is_index else {name}
    if sorted(os.listdir(folder)) != names:
        raise unexpected("a folder that stays the same", "one that changed", folder)
    if chosen.is_index:
        contents = read_index(files, folder / chosen.names[0])
    else:
        check_parts_present(chosen.names, folder)
        each = ((name, read_file(files, folder / name)) for name in chosen.names)
        contents = merge_files(each, str(folder))
    return _with_notes(contents, _notes(chosen, read, folder, names))


def _with_notes(contents: Contents, notes: list[str]) -> Contents:
    return contents._replace(notes=(*contents.notes, *filter(None, notes)))


def _not_read(names: list[str], reason: str) -> str:
    return f"not read: {listed(names)} ({reason})" if names else ""


def _choose(folder: Path, names: list[str]) -> _Candidate:
    """Return the files to read. Raise CheckpointError if there are none, or several checkpoints."""
    weights = weight_files(folder, names)
    others = [name for name in weights if not _TRAINING_STATE.fullmatch(name)]
    indexes = [name for name in names if INDEX.fullmatch(name)]
    candidates = sorted([*map(_index, indexes), *_groups(others or weights)])
    if not candidates:
        raise no_checkpoint(folder, names)
    best = [c for c in candidates if c.rank == candidates[0].rank]
    if len(best) > 1 and best[0].rank == _LOOSE and all(len(c.names) == 1 for c in best):
        return _Candidate(_LOOSE, tuple(name for c in best for name in c.names))
    if len(best) > 1:
        shown = [str(candidate) for candidate in best]
        of_ranks = any(_OF_ONE_RANK.search(name) for c in best for name in c.names)
        remedy = _MERGE if of_ranks else "pass the path of one of them"
        raise unexpected("one checkpoint", f"{len(best)}: {listed(shown)}", folder, remedy)
    return best[0]


def _index(name: str) -> _Candidate:
    match = INDEX.fullmatch(name)
    assert match
    rank = (
        _STEMS.get(match["stem"], _OTHER_STEM),
        _FORMATS.index(match["suffix"]),
        0,
        bool(match["variant"]),
    )
    return _Candidate(rank, (name,), True)


def _groups(names: list[str]) -> list[_Candidate]:
    """Return the candidates among files with weights: shards belong together."""
    groups: dict[tuple[tuple[int, ...], str], list[str]] = defaultdict(list)
    for name in names:
        match = PART.fullmatch(name)
        whole = match["begin"] + match["end"] if match else name
        stem, suffix = os.path.splitext(whole)
        plain, _, variant = stem.partition(".")
        if suffix in _FORMATS and plain in _STEMS:
            rank = _STEMS[plain], _FORMATS.index(suffix), 1, int(bool(variant))
        else:
            plain_name = os.path.splitext(stem)[0] + suffix
            is_variant = plain_name != whole and plain_name in names
            order = 0 if suffix == ".safetensors" else 2 if suffix in _SELDOM_WEIGHTS else 1
            rank = _OTHER_STEM, order, 1, int(is_variant)
        groups[rank, f"{whole} {match['parts']}" if match else name].append(name)
    return [_Candidate(rank, tuple(group)) for (rank, _), group in groups.items()]


def _notes(chosen: _Candidate, read: set[str], folder: Path, names: list[str]) -> list[str]:
    """Return notes on the files that are not read, one for each reason."""
    others = [name for name in weight_files(folder, names) if name not in read]
    state = [name for name in others if _TRAINING_STATE.fullmatch(name)]
    rest = [name for name in others if name not in state]
    pronoun = "it" if len(rest) == 1 else "them"
    reason = f"{chosen} does not name {pronoun}" if chosen.is_index else f"{chosen} is read"
    notes = [_not_read(rest, reason), _not_read(state, "training state")]
    if len(chosen.names) > 1 and chosen.rank == _LOOSE:
        notes.insert(0, f"read together: {listed(list(chosen.names))}")
    return [*notes, _not_read(find_folders(folder, depth=1), "other folders")]
