"""Read the metadata of a folder that `torch.distributed.checkpoint` wrote.

The folder has a pickle named `.metadata`. It lists the tensors, the parts of each, and the place of
each part in a file. At that place is a small archive as `torch.save` writes it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from paramstats._core.format import dtype_name
from paramstats.checkpoints import _pickles as pickles
from paramstats.checkpoints import _torch_save as torch_save
from paramstats.checkpoints._errors import CheckpointError, unexpected
from paramstats.checkpoints._pickles import Global, PickleError, RecordedCall
from paramstats.checkpoints._stored_tensors import Part, StoredTensor, check_parts
from paramstats.checkpoints._torch_pickle import DTYPES

METADATA = ".metadata"

_CLASSES = (
    *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    *("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
)
_ALLOWED = frozenset(
    {
        *(name for name in DTYPES if not name.endswith("Storage")),
        *(f"torch.distributed.checkpoint.metadata.{name}" for name in _CLASSES),
        *("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict"),
        *(f"{module}.PosixPath" for module in ("pathlib", "pathlib._local")),
        *("torch.device", "torch.distributed.checkpoint.filesystem._StorageInfo"),
    }
)
"""The names that a `.metadata` pickle may contain. None of them is ever called."""

_Place = tuple[str, int, int]
"""File name in the folder, offset and length in bytes."""

_Places = dict[tuple[str, tuple[int, ...]], _Place]
"""Place of every part, by the name of its tensor and the index of its first element."""


def read(folder: Path) -> list[StoredTensor]:
    """Return the tensors of a folder, in the order of its metadata."""
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _attributes(pickles.load(file, _ALLOWED), "Metadata")
        places = _places(metadata["storage_data"])
        return [
            _tensor(name, _attributes(entry, "TensorStorageMetadata"), places, folder)
            for name, entry in metadata["state_dict_metadata"].items()
            if not entry.function.endswith(".BytesStorageMetadata")
        ]
    except CheckpointError:
        raise
    except (PickleError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = error if isinstance(error, PickleError) else f"a damaged file ({error!r})"
        raise unexpected("metadata of a distributed checkpoint", reason, path) from None


def _attributes(call: Any, class_name: str) -> dict[str, Any]:
    """Return the attributes of an object in the pickle, which must be of a class."""
    if not isinstance(call, RecordedCall) or call.function.rpartition(".")[2] != class_name:
        raise PickleError(f"another object in place of {class_name}")
    return call.state  # type: ignore[no-any-return]


def _places(storage_data: Any) -> _Places:
    places: _Places = {}
    for key, value in storage_data.items():
        index, info = _attributes(key, "MetadataIndex"), _attributes(value, "_StorageInfo")
        if index.get("offset") is None:
            continue
        if info.get("transform_descriptors"):
            raise PickleError(
                f"parts transformed by {info['transform_descriptors']!r}, which are not supported"
            )
        place = (info["relative_path"], info["offset"], info["length"])
        places[index["fqn"], tuple(index["offset"])] = place
    return places


def _tensor(name: str, entry: dict[str, Any], places: _Places, folder: Path) -> StoredTensor:
    dtype, requires_grad = _properties(entry["properties"], name)
    shape = tuple(entry["size"])
    parts: list[Part] = []
    for chunk in entry["chunks"]:
        box = _attributes(chunk, "ChunkStorageMetadata")
        starts, sizes = tuple(box["offsets"]), tuple(box["sizes"])
        place = places.get((name, starts))
        if place is None:
            raise PickleError(f"no place for the part of {name!r} at {list(starts)}")
        part = _part(StoredTensor(name, sizes, dtype, ()), place, folder)
        parts.append(part._replace(starts=starts))
    parts.sort(key=lambda part: part.starts)
    tensor = StoredTensor(name, shape, dtype, tuple(parts), requires_grad)
    check_parts(tensor, str(folder / METADATA))
    return tensor


def _properties(properties: Any, name: str) -> tuple[torch.dtype, bool]:
    """Return dtype and requires_grad of a `TensorProperties`."""
    dtype, _, requires_grad, *_ = properties.state
    if not isinstance(dtype, Global) or dtype.name not in DTYPES:
        raise PickleError(f"a tensor {name!r} of unknown dtype")
    return DTYPES[dtype.name], requires_grad is True


def _part(expected: StoredTensor, place: _Place, folder: Path) -> Part:
    """Return the part in the archive at `place`, which must have the expected shape and dtype."""
    file_name, offset, length = place
    path = folder / file_name
    if Path(file_name).is_absolute() or ".." in Path(file_name).parts:
        raise PickleError(f"a part in {file_name!r}, outside the folder")
    if not path.is_file():
        raise unexpected(f"a file {file_name!r}", "none", folder, "copy the missing file there")
    with path.open("rb") as file:
        end = file.seek(0, io.SEEK_END)
        if offset < 0 or length < 0 or offset + length > end:
            wanted = f"{length} bytes of {expected.name!r} at byte {offset}"
            raise unexpected(wanted, f"{end} bytes", path, "the file is truncated")
        tensors = torch_save.read(file, str(path), offset, length)
    descriptions = [_describe(tensor) for tensor in tensors]
    if descriptions == [_describe(expected)] and not tensors[0].unread_reason:
        return tensors[0].parts[0]
    raise unexpected(
        f"a part of {expected.name!r}, {_describe(expected)}",
        f"{', '.join(descriptions) or 'no tensor'} at byte {offset}",
        path,
    )


def _describe(tensor: StoredTensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
