"""Read the metadata of a folder that `torch.distributed.checkpoint` wrote.

The folder has a pickle named `.metadata`. It lists the tensors, the parts of each, and the place of
each part in a file. At that place is a small archive as `torch.save` writes it.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from paramstats._core.format import dtype_name
from paramstats.checkpoints._errors import CheckpointError, PickleError, brief, unexpected
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._formats import torch_save
from paramstats.checkpoints._notes import not_tensors
from paramstats.checkpoints._pickles import machine as pickles
from paramstats.checkpoints._pickles.dtypes import DTYPES
from paramstats.checkpoints._pickles.machine import Global, RecordedCall
from paramstats.checkpoints._pickles.sizes import are_sizes, check_size
from paramstats.checkpoints._stored_tensors import (
    Checksum,
    Contents,
    Part,
    StoredTensor,
    check_parts,
)

METADATA = ".metadata"

_TENSOR, _PART = 1000, 500
"""Bytes of memory that a tensor and a part of it need until the statistics are returned."""


class _Place(NamedTuple):
    file_name: str
    offset: int
    length: int


def read(files: Files, folder: Path) -> Contents:
    """Return the tensors of a folder, in the order of its metadata."""
    path = folder / METADATA
    budget = files.budget
    try:
        with files.open(path) as file:
            metadata = _state(pickles.load(file, budget), "Metadata")
        places = _places(metadata["storage_data"])
        for name in sorted({place.file_name for place in places.values()}):
            _note(files, folder, name)
        tensors, others, checksums = [], [], []
        for name, entry in metadata["state_dict_metadata"].items():
            if _is_bytes(entry):
                others.append(("", _text(name)))
                continue
            attributes = _attributes(entry, "TensorStorageMetadata")
            budget.charge(_TENSOR + _PART * len(attributes["chunks"]))
            tensor, of_tensor = _tensor(_text(name), attributes, places, files, folder)
            tensors.append(tensor)
            checksums += of_tensor
        return Contents(tensors, not_tensors("value", others), tuple(checksums))
    except CheckpointError:
        raise
    except (PickleError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = error if isinstance(error, PickleError) else f"a damaged file ({error!r})"
        raise unexpected("metadata of a distributed checkpoint", reason, path) from None


def _attributes(call: Any, class_name: str) -> dict[str, Any]:
    """Return the attributes of an object in the pickle, which must be of a class."""
    if isinstance(call, RecordedCall) and call.function.rpartition(".")[2] == class_name:
        return _state(call, class_name)
    raise PickleError(f"another object in place of {class_name}")


def _state(call: Any, class_name: str) -> dict[str, Any]:
    """Return the attributes of an object in the pickle, of the class or of one derived from it."""
    if not isinstance(call, RecordedCall) or type(call.state) is not dict:
        raise PickleError(f"another object in place of {class_name}")
    return call.state


def _is_bytes(entry: Any) -> bool:
    is_call = isinstance(entry, RecordedCall)
    return is_call and entry.function.rpartition(".")[2] == "BytesStorageMetadata"


def _text(value: Any) -> str:
    if type(value) is not str:
        raise PickleError(f"{brief(value)} in place of a name")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    if not are_sizes(value):
        raise PickleError(f"{brief(value)} in place of sizes")
    return value  # type: ignore[no-any-return]


def _part_key(name: str, starts: tuple[int, ...]) -> str:
    """Return a key for a part. It is text, because a file can hold many tuples with one hash."""
    return f"{starts} {name}"


def _places(storage_data: Any) -> dict[str, _Place]:
    """Return the place of every part, by the key of the part."""
    places: dict[str, _Place] = {}
    for key, value in storage_data.items():
        index, info = _attributes(key, "MetadataIndex"), _attributes(value, "_StorageInfo")
        if index.get("offset") is None:
            continue
        if info.get("transform_descriptors"):
            raise PickleError(
                f"parts transformed by {brief(info['transform_descriptors'])}, which are not "
                "supported"
            )
        place = _Place(_text(info["relative_path"]), *_sizes((info["offset"], info["length"])))
        places[_part_key(_text(index["fqn"]), _sizes(index["offset"]))] = place
    end = {name: 0 for name, _, _ in places.values()}
    for name, offset, length in sorted(places.values()):
        if offset < end[name]:  # reading one archive for many parts could take long
            raise PickleError(f"two parts in the same bytes of {name!r}")
        end[name] = offset + length
    return places


def _note(files: Files, folder: Path, name: str) -> None:
    """Note a file of the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise PickleError(f"a part in {name!r}, outside the folder")
    try:
        files.note(folder / name)
    except FileNotFoundError:
        raise unexpected(
            f"a file {name!r}", "none", folder, "copy the missing file there"
        ) from None


def _tensor(
    name: str, entry: dict[str, Any], places: dict[str, _Place], files: Files, folder: Path
) -> tuple[StoredTensor, list[Checksum]]:
    """Return a tensor, and the checksums of its parts."""
    dtype, requires_grad = _properties(entry["properties"], name)
    shape = _sizes(entry["size"])
    check_size(shape)
    boxes = [_attributes(chunk, "ChunkStorageMetadata") for chunk in entry["chunks"]]
    ranges = [(_sizes(box["offsets"]), _sizes(box["sizes"])) for box in boxes]
    parts = tuple(Part("", 0, sizes, (), starts) for starts, sizes in sorted(ranges))
    tensor = StoredTensor(name, shape, dtype, parts, requires_grad)
    check_parts(tensor, str(folder / METADATA))
    found = [_find(part, tensor, places, files, folder) for part in parts]
    checksums = [checksum for _, of_part in found for checksum in of_part]
    return tensor._replace(parts=tuple(part for part, _ in found)), checksums


def _properties(properties: Any, name: str) -> tuple[torch.dtype, bool]:
    """Return dtype and requires_grad of a `TensorProperties`."""
    dtype, _, requires_grad, *_ = properties.state
    if not isinstance(dtype, Global) or dtype.name not in DTYPES:
        raise PickleError(f"a tensor {name!r} of unknown dtype")
    return DTYPES[dtype.name], requires_grad is True


def _find(
    part: Part, tensor: StoredTensor, places: dict[str, _Place], files: Files, folder: Path
) -> tuple[Part, tuple[Checksum, ...]]:
    """Return a part with its position in the archive that holds it and nothing else, and the
    checksums of the archive."""
    place = places.get(_part_key(tensor.name, part.starts))
    if place is None:
        raise PickleError(f"no place for the part of {tensor.name!r} at {list(part.starts)}")
    path = folder / place.file_name
    with files.open(path) as file:
        end = file.seek(0, io.SEEK_END)
        if place.offset + place.length > end:
            wanted = f"{place.length} bytes of {tensor.name!r} at byte {place.offset}"
            raise unexpected(wanted, f"{end} bytes", path, "the file is truncated: copy it again")
        found, _, checksums = torch_save.read(file, str(path), files, place.offset, place.length)
    expected = tensor._replace(shape=part.sizes)
    descriptions = [_describe(tensor) for tensor in found]
    is_whole = math.prod(part.sizes) * tensor.dtype.itemsize <= place.length  # repeats no element
    if descriptions == [_describe(expected)] and not found[0].unread_reason and is_whole:
        return found[0].parts[0]._replace(starts=part.starts), checksums
    raise unexpected(
        f"a part of {tensor.name!r}, {_describe(expected)}",
        f"{', '.join(descriptions[:2]) or 'no tensor'} at byte {place.offset}",
        path,
    )


def _describe(tensor: StoredTensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
