"""Keep compiled kernels in files, so that one process compiles them and later ones read them.

The folder is that of the variable PARAMSTATS_CACHE; if it is not set, `paramstats` in
XDG_CACHE_HOME or ~/.cache. If the variable is empty, nothing is kept. A missing home, a full disk
and a folder that is not writable are no errors. A folder that other users can write to is not used,
because the files contain machine code.

A file is written under another name and then renamed, so processes may write it at once. It starts
with a digest of its key and its content. A file with another digest counts as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "PARAMSTATS_CACHE"
MOST_FILES = 16  # one per GPU generation and version of NVRTC and of the kernels; 0.4 MB each
_NAME = re.compile(r"kernels-\w+\.(cubin|partial)")


def key(source: str, options: Iterable[str], architecture: int, compiler: str) -> str:
    """Return the digest of everything that a cubin depends on."""
    parts = (source, *options, f"sm_{architecture}", compiler)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def folder() -> Path | None:
    """Return the folder of the cache, which may not exist; None if there is no cache."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return Path(chosen) if chosen else None
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base, "paramstats")
    home = Path(os.path.expanduser("~"))  # it stays "~" if the user has none
    return home / ".cache/paramstats" if home.is_absolute() and home.is_dir() else None


def load(key: str) -> bytes | None:
    """Return the cubin that was stored under a key; None if there is none, or a damaged one."""
    try:
        path = _trusted_folder() / f"kernels-{key}.cubin"
        content = path.read_bytes()
    except OSError:
        return None
    digest, data = content[:32], content[32:]
    return data if digest == _digest(key, data) else None


def store(key: str, data: bytes) -> None:
    """Store a cubin, and remove the oldest ones beyond `MOST_FILES`."""
    with contextlib.suppress(OSError):
        path = folder()
        if path is None:
            return
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = _trusted_folder()
        file, partial = tempfile.mkstemp(".partial", "kernels-", path)
        try:
            with open(file, "wb") as stream:
                stream.write(_digest(key, data) + data)
            os.replace(partial, path / f"kernels-{key}.cubin")
        except BaseException:
            os.unlink(partial)
            raise
        _remove_oldest(path)


def _trusted_folder() -> Path:
    """Return the folder. Raises OSError if there is none, or another user can write to it."""
    path = folder()
    if path is None:
        raise FileNotFoundError("no folder for a cache")
    status = path.stat()
    if status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022:
        raise PermissionError(f"other users can write to {path}")
    return path


def _remove_oldest(path: Path) -> None:
    files = [entry for entry in os.scandir(path) if _NAME.fullmatch(entry.name)]
    files.sort(key=lambda entry: entry.stat().st_mtime_ns)
    for entry in files[:-MOST_FILES]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(entry)


def _digest(key: str, data: bytes) -> bytes:
    return hashlib.sha256(key.encode() + data).digest()
