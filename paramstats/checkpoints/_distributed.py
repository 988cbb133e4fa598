"""Folders that `torch.distributed.checkpoint` wrote: which parts of which tensor are where.

`.metadata` is a pickle that says what tensors there are, in which parts, and where in which file
each part is; there it is a small archive of `torch.save`'s.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

import torch

from paramstats.checkpoints import _pickles as pickles
from paramstats.checkpoints import _torch_save as torch_save
from paramstats.checkpoints._pickles import Global, Made, PickleError
from paramstats.checkpoints._rebuilding import DTYPES
from paramstats.checkpoints._stored import CheckpointError, Part, Stored, check_total

METADATA = ".metadata"

_HERE = "torch.distributed.checkpoint.metadata."
_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
_ALLOWED = frozenset(
    {
        *(name for name in DTYPES if not name.endswith("Storage")),
        *(
            _HERE + name
            for name in (
                *("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
                *("TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties"),
                "ChunkStorageMetadata",
            )
        ),
        *("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict"),
        *(f"{module}.PosixPath" for module in ("pathlib", "pathlib._local")),
        *("torch.device", _INFO),
    }
)
"""All that a `.metadata` may name; the types that these functions and classes are."""

_BROKEN = (TypeError, ValueError, LookupError, AttributeError)
_Places = dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]


def read(folder: Path) -> list[Stored]:
    """The tensors of a folder, in the order of its metadata."""
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _attributes(pickles.load(file, _ALLOWED), "Metadata")
        places = _places(metadata["storage_data"])
        entries = metadata["state_dict_metadata"]
        files = _Files(folder)
        try:
            return [
                _tensor(name, _attributes(entry, "TensorStorageMetadata"), places, files, str(path))
                for name, entry in entries.items()
                if entry.kind != f"{_HERE}BytesStorageMetadata"
            ]
        finally:
            files.close()
    except CheckpointError:
        raise
    except (PickleError, *_BROKEN) as error:
        reason = error if isinstance(error, PickleError) else f"a broken file ({error!r})"
        raise CheckpointError(
            f"paramstats: expected the metadata of a distributed checkpoint, got {reason} in {path}"
        ) from None


class _Files:
    """The files of parts, the present one open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = ""
        self._file: IO[bytes] = io.BytesIO()

    def open(self, name: str) -> tuple[IO[bytes], str]:
        path = self._folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise PickleError(f"a part in {name!r}, outside the folder")
        if str(path) != self._path:
            self.close()
            if not path.is_file():
                raise CheckpointError(
                    f"paramstats: expected a file {name!r}, got none in {self._folder}: parts of "
                    "the checkpoint are missing"
                )
            self._file, self._path = path.open("rb"), str(path)
        return self._file, self._path

    def close(self) -> None:
        self._file.close()


def _attributes(made: Any, kind: str) -> dict[str, Any]:
    if not isinstance(made, Made) or made.kind.rpartition(".")[2] != kind:
        raise PickleError(f"something else than {kind}")
    return made.state  # type: ignore[no-any-return]


def _places(storage_data: Any) -> _Places:
    """(file, offset, length) of every part, by the tensor's name and the part's place in it."""
    places: _Places = {}
    for index, info in storage_data.items():
        where, what = _attributes(index, "MetadataIndex"), _attributes(info, "_StorageInfo")
        if where.get("offset") is None:
            continue
        if what.get("transform_descriptors"):
            raise PickleError(
                f"parts transformed by {what['transform_descriptors']!r}, which are not read"
            )
        place = (what["relative_path"], what["offset"], what["length"])
        places[where["fqn"], tuple(where["offset"])] = place
    return places


def _tensor(name: str, entry: dict[str, Any], places: _Places, files: _Files, path: str) -> Stored:
    dtype, requires_grad = _dtype(entry["properties"], name)
    shape = tuple(entry["size"])
    parts: list[Part] = []
    for chunk in entry["chunks"]:
        box = _attributes(chunk, "ChunkStorageMetadata")
        starts, sizes = tuple(box["offsets"]), tuple(box["sizes"])
        place = places.get((name, starts))
        if place is None:
            raise PickleError(f"no place for the part of {name!r} at {list(starts)}")
        parts.append(_part(name, starts, sizes, dtype, place, files))
    stored = Stored(name, shape, dtype, tuple(sorted(parts, key=lambda p: p.starts)), requires_grad)
    check_total(stored, path)
    return stored


def _dtype(properties: Any, name: str) -> tuple[torch.dtype, bool]:
    """What is needed of the properties, a tuple that begins with type, layout, requires_grad."""
    state = properties.state
    kind = state[0]
    if not isinstance(kind, Global) or kind.name not in DTYPES:
        raise PickleError(f"a tensor {name!r} of unknown type")
    return DTYPES[kind.name], state[2] is True


def _part(
    name: str,
    starts: tuple[int, ...],
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    place: tuple[str, int, int],
    files: _Files,
) -> Part:
    """Where the elements of one part are, by the archive that it is in."""
    relative, offset, length = place
    file, path = files.open(relative)
    end = file.seek(0, io.SEEK_END)
    if offset < 0 or length < 0 or offset + length > end:
        raise CheckpointError(
            f"paramstats: expected {length} bytes of {name!r} at byte {offset}, got a file of "
            f"{end}: {path} is cut off"
        )
    found = torch_save.read(file, path, offset, length)
    if len(found) != 1 or found[0].shape != sizes or found[0].dtype != dtype or found[0].unread:
        got = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in found]
        raise CheckpointError(
            f"paramstats: expected a part of {name!r}, {dtype} {list(sizes)}, got "
            f"{', '.join(got) or 'no tensor'} at byte {offset} of {path}"
        )
    return found[0].parts[0]._replace(starts=starts)
