"""From a path to the tensors that are stored there: which format it is, and which files belong."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paramstats.checkpoints import _distributed as distributed
from paramstats.checkpoints import _safetensors_file as safetensors_file
from paramstats.checkpoints import _torch_save as torch_save
from paramstats.checkpoints._stored import CheckpointError, Stored, together

_INDEX = ".index.json"
_FORMATS = "a .safetensors or torch.save file, their .index.json, or a folder of a checkpoint"
_SHOWN = 16
_LONGEST_INDEX = 100 << 20
"""Bytes of a foreign file that the message shows."""


def read(path: str | os.PathLike[str]) -> list[Stored]:
    """The tensors of a checkpoint: one file, several with an index, or a folder.

    Raises CheckpointError where it is none or a broken one, OSError where it cannot be opened.
    """
    where = Path(path)
    mode = where.stat().st_mode
    if stat.S_ISDIR(mode):
        return _folder(where)
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"paramstats: expected {_FORMATS}, got no regular file: {where}")
    if where.name == distributed.METADATA:
        return distributed.read(where.parent)
    if where.name.endswith(_INDEX):
        return _indexed(where)
    return _file(where)


def _file(path: Path) -> list[Stored]:
    with path.open("rb") as file:
        start = file.read(max(_SHOWN, len(torch_save.LEGACY)))
        if start.startswith(b"PK\3\4"):
            return torch_save.read(file, str(path))
        if start.startswith(torch_save.LEGACY):
            return torch_save.read_legacy(file, str(path))
        if start and (path.suffix == ".safetensors" or start[8:9] == b"{"):
            if start.startswith(b"version https"):
                raise CheckpointError(
                    f"paramstats: expected a safetensors file, got a pointer to one: {path}; fetch "
                    "the file itself with git lfs pull"
                )
            return safetensors_file.read(file, str(path))
    what = f"one that begins with {start[:_SHOWN]!r}" if start else "an empty file"
    if path.suffix == ".distcp":
        what = "a part of a distributed checkpoint; name its folder"
    elif start.startswith(b"\x80"):
        what = "a pickle that torch.save did not write (nothing of it was executed)"
    raise CheckpointError(f"paramstats: expected {_FORMATS}, got {what}: {path}")


def _folder(folder: Path) -> list[Stored]:
    """A folder of a distributed checkpoint, or of safetensors files, or of pytorch_model files."""
    if (folder / distributed.METADATA).is_file():
        return distributed.read(folder)
    names = sorted(os.listdir(folder))
    for suffix, index in (
        (".safetensors", f".safetensors{_INDEX}"),
        (".bin", f".bin{_INDEX}"),
    ):
        files = [folder / name for name in names if name.endswith(index)]
        shards = {shard for path in files for shard in _weight_map(path).values()}
        files += [
            folder / name
            for name in names
            if name.endswith(suffix)
            and name not in shards
            and (suffix != ".bin" or name.startswith("pytorch_model"))
        ]
        if files:
            return together(((path.name, read(path)) for path in files), str(folder))
    others = [name for name in names if name.endswith((".pt", ".pth", ".bin", ".ckpt"))]
    hint = f"; name one of {', '.join(others[:4])}" if others else ""
    raise CheckpointError(
        f"paramstats: expected {_FORMATS}, got a folder without a checkpoint: {folder}{hint}"
    )


def _indexed(path: Path) -> list[Stored]:
    """The files that an index names, each tensor in the file where the index has it."""
    places = _weight_map(path)
    shards: dict[str, list[Stored]] = {}
    for name in sorted(set(places.values())):
        shard = path.parent / name
        if not shard.is_file():
            raise CheckpointError(f"paramstats: expected a file {name!r} as {path} says, got none")
        shards[name] = _file(shard)
    names = {shard: {n for t in here for n in t.names} for shard, here in shards.items()}
    for tensor, file in places.items():
        if tensor not in names[file]:
            raise CheckpointError(
                f"paramstats: expected a tensor {tensor!r} in {file} as {path} says, got none"
            )
    return _in_order(places, together(shards.items(), str(path)))


def _in_order(names: Iterable[str], tensors: list[Stored]) -> list[Stored]:
    """As the index has them; what it does not name, last."""
    position = {name: i for i, name in enumerate(names)}
    last = len(position)
    return sorted(tensors, key=lambda t: min(position.get(n, last) for n in t.names))


def _weight_map(path: Path) -> dict[str, str]:
    """Of an index: the file of every tensor."""
    size = path.stat().st_size if path.is_file() else -1
    if not 0 <= size <= _LONGEST_INDEX:
        raise CheckpointError(
            f"paramstats: expected an index of at most {_LONGEST_INDEX:,} bytes, got "
            f"{f'{size:,}' if size >= 0 else 'no regular file'}: {path}"
        )
    try:
        places: Any = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"paramstats: expected an index with a weight_map in JSON, got {error!r} in {path}"
        ) from None
    if not isinstance(places, dict) or not places or not all(map(_is_file_name, places.values())):
        raise CheckpointError(
            f"paramstats: expected names of files in the weight_map of {path}, got something else"
        )
    return places


def _is_file_name(value: Any) -> bool:
    """Whether it is the name of a file beside the index, and no other."""
    return isinstance(value, str) and "\0" not in value and Path(value).name == value


def explained(error: OSError, path: str | os.PathLike[str]) -> str:
    """An OSError in one line that names the file."""
    words = {errno.ENOENT: "no such file", errno.EACCES: "no permission to read it"}
    what = words.get(error.errno or 0) or error.strerror or str(error)
    name = error.filename if error.filename is not None else path
    return f"paramstats: expected a checkpoint that can be read, got {what}: {name}"
