"""Read an index: the JSON file that names the file of every tensor of a checkpoint in shards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paramstats.checkpoints._errors import brief, listed, unexpected
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._formats.detection import read_file
from paramstats.checkpoints._stored_tensors import Contents, merge_files

INDEX = re.compile(
    r"(?P<stem>.+)(?P<suffix>\.safetensors|\.bin)\.index(\.(?P<variant>[^.]+))?\.json"
)
"""The name of an index, such as `model.safetensors.index.json`; a variant is "fp16"."""

PART = re.compile(
    r"(?P<begin>.+)(?P<gap>[-_])(?P<part>\d{1,6})-of-(?P<parts>\d{1,6})(?P<end>\.[^-]+)", re.ASCII
)
"""The name of a shard, such as `model-00001-of-00003.safetensors`."""

_MAX_BYTES = 100 << 20


def read_index(files: Files, path: Path) -> Contents:
    """Return the tensors of the files that an index names, in the order of the index."""
    file_of = files_of_index(files, path)
    contents_of = {
        name: read_file(files, path.parent / name) for name in sorted(set(file_of.values()))
    }
    names = {
        file: {name for t in contents.tensors for name in t.names}
        for file, contents in contents_of.items()
    }
    for name, file_name in file_of.items():
        if name not in names[file_name]:
            expected = f"a tensor {name!r} in {file_name}, as the index says"
            raise unexpected(expected, "none", path)
    position = {name: i for i, name in enumerate(file_of)}
    last = len(position)  # for tensors that the index does not name
    contents = merge_files(contents_of.items(), str(path))
    contents.tensors.sort(key=lambda t: min(position.get(name, last) for name in t.names))
    return contents


def files_of_index(files: Files, path: Path) -> dict[str, str]:
    """Return the file name of every tensor of an index, and note these files."""
    with files.open(path) as file:
        text = file.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise unexpected(f"an index of at most {_MAX_BYTES:,} bytes", "a longer one", path)
    try:
        weight_map: Any = json.loads(text)["weight_map"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise unexpected("an index in JSON with a weight_map", brief(error), path) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise unexpected("an object with names as weight_map", type(weight_map).__name__, path)
    for name in weight_map.values():
        if not isinstance(name, str) or "\0" in name or Path(name).name != name:
            raise unexpected("files of the same folder in the weight_map", brief(name), path)
    names = sorted(set(weight_map.values()))
    missing = []
    for name in names:
        try:
            files.note(path.parent / name)
        except FileNotFoundError:
            missing.append(name)
    if missing:
        expected = f"{_files(missing)}, which {path.name} names"
        raise unexpected(expected, "none", path.parent, "copy the missing files there")
    check_parts_present(names, path.parent)
    return weight_map


def check_parts_present(names: Iterable[str], folder: Path) -> None:
    """Raise CheckpointError if names such as "00001-of-00003" lack some parts of the whole.

    A part that is in the folder, but not among the names, is not missing.
    """
    groups: dict[tuple[str, ...], tuple[set[int], int, str]] = {}
    for name in names:
        if match := PART.fullmatch(name):
            key = match["begin"], match["gap"], match["parts"], match["end"]
            found = groups.setdefault(key, (set(), len(match["part"]), name))[0]
            found.add(int(match["part"]))
    for (begin, gap, parts, end), (found, digits, name) in groups.items():
        first = 0 if 0 in found else 1
        missing = []
        for part in range(first, first + int(parts)):
            other = f"{begin}{gap}{part:0{digits}}-of-{parts}{end}"
            if part not in found and not (folder / other).is_file():
                missing.append(other)
        if missing:
            got = f"{int(parts) - len(missing)}, without {listed(missing)}"
            remedy = "copy the missing files there, or pass the path of one file"
            raise unexpected(f"{int(parts)} shards like {name}", got, folder, remedy)


def _files(names: list[str]) -> str:
    return f"a file {names[0]!r}" if len(names) == 1 else f"files {listed(names)}"
