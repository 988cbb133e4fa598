"""Say what a folder has that is not a checkpoint: folders with checkpoints, and other formats."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from paramstats.checkpoints._errors import CheckpointError, listed, unexpected
from paramstats.checkpoints._formats.detection import EXPECTED, SUFFIXES

_MAX_ENTRIES = 10_000
"""Entries of a folder that are looked at, to find folders with checkpoints."""

_LATEST = ("latest", "latest_checkpointed_iteration.txt")
"""Files in which DeepSpeed and Megatron name the last checkpoint."""

_RESTORE = "restore it with the library that wrote it, and save it with safetensors"
_FOREIGN = (
    ({"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"}, "an orbax checkpoint"),
    ({"saved_model.pb"}, "a TensorFlow checkpoint"),
    ({"flax_model.msgpack", "diffusion_flax_model.msgpack"}, "a Flax checkpoint"),
    ({"model.onnx"}, "an ONNX model"),
)
"""Files of formats that are not read."""

_TENSORFLOW = re.compile(r"\.data-\d{5}-of-\d{5}$")
"""Next to these is a file "checkpoint". Folders of other libraries have that name as well."""


def weight_files(folder: Path, names: list[str]) -> list[str]:
    """Return the names that are those of files with weights."""
    return [name for name in names if name.endswith(SUFFIXES) and not (folder / name).is_dir()]


def find_folders(folder: Path, without: Collection[str] = (), depth: int = 2) -> list[str]:
    """Return the folders in a folder that have files with weights, down to a depth."""
    found = []
    for name in _folders(folder):
        if name not in without:
            names = _names(folder / name)
            if any(n.endswith((*SUFFIXES, ".distcp")) for n in names) or _foreign(names):
                found.append(name)
            elif depth > 1:
                inner = find_folders(folder / name, depth=depth - 1)
                found += [f"{name}/{path}" for path in inner]
    return found


def no_checkpoint(folder: Path, names: list[str]) -> CheckpointError:
    """Return the error for a folder without a file that can be read."""
    if foreign := _foreign(names):
        return unexpected(EXPECTED, f"{foreign}, which paramstats does not read", folder, _RESTORE)
    if any(name.endswith(".distcp") for name in names):
        got = "a distributed checkpoint without its .metadata"
        remedy = "saving it was not finished, or not all of its files were copied"
        return unexpected(EXPECTED, got, folder, remedy)
    if folders := find_folders(folder):
        latest = _latest(folder)
        folders.sort(key=lambda name: name.partition("/")[0] != latest)
        said = f" (the last one is {latest})" if folders[0].partition("/")[0] == latest else ""
        remedy = f"pass the path of one of {listed(folders)}{said}"
        return unexpected(EXPECTED, "a folder of checkpoint folders", folder, remedy)
    return unexpected(EXPECTED, "an empty folder" if not names else "a folder without one", folder)


def _folders(folder: Path) -> list[str]:
    try:
        entries = os.scandir(folder)
    except OSError:  # it belongs to somebody else, or was just removed
        return []
    with entries:
        looked_at = [entry for entry, _ in zip(entries, range(_MAX_ENTRIES), strict=False)]
    return sorted(e.name for e in looked_at if e.is_dir() and not e.name.startswith("."))


def _names(folder: Path) -> list[str]:
    """Return the names in a folder next to a checkpoint; none if it cannot be opened."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _foreign(names: Collection[str]) -> str:
    """Return the format of a folder with these files, or nothing."""
    if any(_TENSORFLOW.search(name) for name in names):
        return "a TensorFlow checkpoint"
    return next((text for marks, text in _FOREIGN if not marks.isdisjoint(names)), "")


def _latest(folder: Path) -> str:
    """Return the folder that a training library names as the last one, or nothing."""
    for name in _LATEST:
        path = folder / name
        if path.is_file():
            with open(path, "rb") as file:
                text = file.read(100).decode(errors="replace").strip()
            return f"iter_{int(text):07}" if text.isdecimal() else text
    return ""
