"""Tell the format of a file from its first bytes, and list the tensors of the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO

from paramstats.checkpoints._errors import PickleError, unexpected
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._formats import gguf, hdf5, numpy_files, safetensors, torch_save
from paramstats.checkpoints._stored_tensors import Contents

EXPECTED = (
    "a safetensors, torch.save, GGUF, .npz, .npy or HDF5 file, an .index.json, or a folder with one"
)
SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl"),
    *(".gguf", ".npz", ".npy", ".h5", ".hdf5"),
)
"""How files with weights end. The format is told by content, because many names are wrong."""

_PREFIX_BYTES = 512
_SHOWN_BYTES = 32
"""Bytes of an unknown file that the error message shows."""

_Read = Callable[[IO[bytes], str, Files], Contents]
"""`(file, path, files)`: returns the tensors of a file of one format."""

_FORMATS: tuple[tuple[bytes, _Read], ...] = (
    (b"PK\3\4", torch_save.read),
    (torch_save.LEGACY_PREFIX, torch_save.read_legacy),
    (b"GGUF", gguf.read),
    (b"\x93NUMPY", numpy_files.read_npy),
    (b"\x89HDF\r\n\x1a\n", hdf5.read),
)
_DOWNLOAD = "download it again; a private or gated file needs a login"
_JSON = (
    "if it belongs to a checkpoint, pass the folder; if a server sent it instead of the file, the "
    "file needs a login: download it again"
)
_OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the file with git lfs pull"),
    *((start, "an HTML or XML page", _DOWNLOAD) for start in (b"<!", b"<html", b"<HTML", b"<?xml")),
    (b"\x1f\x8b", "a gzip archive", "decompress it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "decompress it"),
    (b"\xfd7zXZ", "an xz archive", "decompress it"),
    (b"PK\5\6", "an empty zip archive", ""),
)
"""First bytes of other files, what they are, and what to do."""


def read_file(files: Files, path: Path) -> Contents:
    """Return the tensors of a file. Raise CheckpointError if its format is not known."""
    with files.open(path) as file:
        if path.suffix == ".distcp":
            remedy = f"pass the path of its folder {path.parent}"
            raise unexpected(EXPECTED, "part of a distributed checkpoint", path, remedy)
        prefix = file.read(_PREFIX_BYTES)
        read = _reader(prefix, path)
        if read is None:
            content, remedy = _describe(prefix)
            raise unexpected(EXPECTED, content, path, remedy)
        try:
            return read(file, str(path), files)
        except PickleError:  # the readers of pickles give their own reason
            expected = "a file that needs memory in proportion to its size"
            raise unexpected(expected, "a small one that describes many objects", path) from None


def _reader(prefix: bytes, path: Path) -> _Read | None:
    """Return the function that reads a file with these first bytes; None if there is none."""
    if numpy_files.is_npz(prefix):
        return numpy_files.read_npz
    for signature, read in _FORMATS:
        if prefix.startswith(signature):
            return read
    if torch_save.is_pickle(prefix, path.suffix):
        return torch_save.read_pickle
    is_text = all(0x20 <= byte < 0x7F for byte in prefix[:8])  # the size of a header is not
    is_other = is_text or any(prefix.startswith(other) for other, _, _ in _OTHERS)
    named = path.suffix == ".safetensors" and not is_other and prefix.strip(b"\0")
    return safetensors.read if prefix[8:9] == b"{" or named else None


def _describe(prefix: bytes) -> tuple[str, str]:
    """Return what a file of no known format is, and what to do."""
    if not prefix:
        return "an empty file", "copy or download it again"
    if not prefix.strip(b"\0"):
        return "a file that begins with zeros", "copy or download it again: it is not complete"
    text = prefix.lstrip()
    for signature, content, remedy in _OTHERS:
        if text.startswith(signature):
            return content, remedy
    is_json = text.startswith((b"{", b"["))
    kind, remedy = ("JSON with ", _JSON) if is_json else ("", "")
    return f"{kind}first bytes {prefix[:_SHOWN_BYTES]!r}", remedy
