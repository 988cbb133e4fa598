"""Find the format and the files of a checkpoint, and list its tensors."""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paramstats._core.format import one_line_name
from paramstats._core.names import compile_patterns, passes
from paramstats._core.options import Pattern
from paramstats.checkpoints import _distributed as distributed
from paramstats.checkpoints import _safetensors as safetensors
from paramstats.checkpoints import _torch_save as torch_save
from paramstats.checkpoints._errors import brief, unexpected
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._stored_tensors import Contents, merge_files

_INDEX = ".index.json"
_EXPECTED = "a .safetensors or torch.save file, their .index.json, or a checkpoint folder"
_SHOWN_BYTES = 16
"""Bytes of an unknown file that the error message shows."""

_MAX_INDEX_BYTES = 100 << 20


def list_tensors(
    files: Files,
    path: str | bytes | os.PathLike[str],
    include: Pattern | Iterable[Pattern] | None,
    exclude: Pattern | Iterable[Pattern] | None,
) -> Contents:
    """Return the tensors of a checkpoint whose names `include` and `exclude` let pass.

    Raises CheckpointError if it is not a checkpoint or damaged, OSError if a file cannot be opened.
    """
    contents = _read_path(files, Path(os.fsdecode(path)))
    included = None if include is None else compile_patterns(include, "include")
    excluded = () if exclude is None else compile_patterns(exclude, "exclude")
    if included is None and not excluded:
        return contents
    tensors = contents.tensors
    selected = [t for t in tensors if any(passes((name,), included, excluded) for name in t.names)]
    if tensors and not selected:
        warnings.warn(
            f"paramstats.checkpoints: expected include and exclude to select tensors, got none of "
            f"{len(tensors):,} in {one_line_name(os.fsdecode(path))}",
            RuntimeWarning,
            stacklevel=3,
        )
    return contents._replace(tensors=selected)


def _read_path(files: Files, path: Path) -> Contents:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return _read_folder(files, path)
    if not stat.S_ISREG(mode):
        raise unexpected(_EXPECTED, "no regular file", path)
    if path.name == distributed.METADATA:
        return distributed.read(files, path.parent)
    if path.name.endswith(_INDEX):
        return _read_index(files, path)
    return _read_file(files, path)


def _read_file(files: Files, path: Path) -> Contents:
    if path.suffix == ".distcp":
        remedy = f"pass the path of its folder {path.parent}"
        raise unexpected(_EXPECTED, "part of a distributed checkpoint", path, remedy)
    with files.open(path) as file:
        prefix = file.read(max(_SHOWN_BYTES, len(torch_save.LEGACY_PREFIX)))
        if prefix.startswith(b"PK\3\4"):
            return torch_save.read(file, str(path), files)
        if prefix.startswith(torch_save.LEGACY_PREFIX):
            return torch_save.read_legacy(file, str(path), files)
        if torch_save.is_pickle(prefix, path.suffix):
            return torch_save.read_pickle(file, str(path), files)
        if prefix and (path.suffix == ".safetensors" or prefix[8:9] == b"{"):
            if prefix.startswith(b"version https"):
                remedy = "fetch the file with git lfs pull"
                raise unexpected("a safetensors file", "a Git LFS pointer", path, remedy)
            return safetensors.read(file, str(path))
    content = f"first bytes {prefix[:_SHOWN_BYTES]!r}" if prefix else "an empty file"
    raise unexpected(_EXPECTED, content, path)


def _read_folder(files: Files, folder: Path) -> Contents:
    """Return the tensors of a distributed checkpoint, of safetensors files or of .bin files."""
    if (folder / distributed.METADATA).is_file():
        return distributed.read(files, folder)
    names = sorted(os.listdir(folder))
    for prefix, suffix in (("", ".safetensors"), ("pytorch_model", ".bin")):
        indexes = [name for name in names if name.endswith(suffix + _INDEX)]
        indexed = {file for name in indexes for file in _files_of(files, folder / name).values()}
        plain = [
            name
            for name in names
            if name.startswith(prefix) and name.endswith(suffix) and name not in indexed
        ]
        for name in plain:
            files.note(folder / name)
        if sorted(os.listdir(folder)) != names:
            raise unexpected("a folder that stays the same", "one that changed", folder)
        if indexes or plain:
            read = ((name, _read_path(files, folder / name)) for name in (*indexes, *plain))
            return merge_files(read, str(folder))
    others = [name for name in names if name.endswith((".pt", ".pth", ".bin", ".ckpt"))]
    remedy = f"pass the path of one of {', '.join(others[:4])}" if others else ""
    raise unexpected(_EXPECTED, "no such file", folder, remedy)


def _read_index(files: Files, path: Path) -> Contents:
    """Return the tensors of the files that an index names, in the order of the index."""
    file_of = _files_of(files, path)
    contents_of = {
        name: _read_file(files, path.parent / name) for name in sorted(set(file_of.values()))
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


def _files_of(files: Files, path: Path) -> dict[str, str]:
    """Return the file name of every tensor of an index, and note these files."""
    with files.open(path) as file:
        text = file.read(_MAX_INDEX_BYTES + 1)
    if len(text) > _MAX_INDEX_BYTES:
        raise unexpected(f"an index of at most {_MAX_INDEX_BYTES:,} bytes", "a longer one", path)
    try:
        weight_map: Any = json.loads(text)["weight_map"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise unexpected("an index in JSON with a weight_map", brief(error), path) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise unexpected("an object with names as weight_map", type(weight_map).__name__, path)
    for name in weight_map.values():
        if not isinstance(name, str) or "\0" in name or Path(name).name != name:
            raise unexpected("files of the same folder in the weight_map", brief(name), path)
    for name in sorted(set(weight_map.values())):
        try:
            files.note(path.parent / name)
        except FileNotFoundError:
            expected = f"a file {name!r}, which {path.name} names"
            raise unexpected(expected, "none", path.parent, "copy it there") from None
    return weight_map
