"""Checkpoint files that ask for much time or memory, and files with random bytes changed.

Each gives right statistics or an error with the path, within the limits of docs/checkpoints.md.
`paramstats show` ends with one line.
"""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import random
import struct
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import paramstats
from paramstats._cli import main
from paramstats._core.moments import ROW
from paramstats.checkpoints import CheckpointError, summarize_file

SIZE = 100_000
"""Bytes of a pickle, about."""

MAX_MEMORY = 64 << 20
MAX_SECONDS = 60.0
"""Generous: other programs may run at the same time."""

Rng = random.Random


def run(seed: int) -> int:
    """Runs one case and returns the number of calls."""
    rng = Rng(seed)
    if rng.random() < 0.5:
        return _damaged(rng)
    pickled = rng.choice((_repeated, _nested, _random_instructions))(rng)
    path = _write(rng, pickled)
    size = path.stat().st_size
    _peak()
    before, began = _peak(), time.monotonic()
    _read(path)
    memory = _peak() - before
    assert memory < MAX_MEMORY + 64 * size, f"{memory:,} bytes for a file of {size:,}"
    assert time.monotonic() - began < MAX_SECONDS
    if rng.random() < 0.1:
        _show(path)
    return 1


def _read(path: Path) -> Any:
    """Returns the summary of a file, or None if it was refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            summary = summarize_file(path)
        except CheckpointError as error:
            message = str(error)
            assert str(path.parent) in message and message.isprintable(), message
            return None
    assert all(isinstance(name, str) for name in summary)
    return summary


def _show(path: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["show", str(path)])
    assert status in (0, 2) and "Traceback" not in err.getvalue()
    assert all(line.isprintable() for line in (out.getvalue() + err.getvalue()).split("\n"))
    assert err.getvalue().count("\n") == 1 or status == 0, err.getvalue()


def _peak() -> int:
    """Returns the peak memory of the process since the last call; 0 on systems without it."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


# ---- pickles


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8b" + struct.pack("<i", len(data)) + data


STORAGE = (
    b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + b"K\x01tQ"
)
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x01\x85K\x01\x85\x89)tR"
SPARSE = b"ctorch._utils\n_rebuild_sparse_tensor\n)R"
PRIME = (1 << 61) - 1
"""Its multiples have one hash."""


def _value(rng: Rng, size: int) -> bytes:
    """Returns instructions that push one value and take about so many bytes."""
    kind = rng.randrange(16)
    count = max(1, size // 6)
    if kind == 0:
        return b"B" + struct.pack("<I", size) + bytes(size)
    if kind == 1:
        return _text(rng.choice(("k", "\U0001f600", "=", "\x1b")) * (size // 4))
    if kind == 2:
        return b"](" + b"".join(b"J" + struct.pack("<i", i) for i in range(count)) + b"e"
    if kind == 3:
        return b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(count)) + b"u"
    if kind == 4:
        return b"}(" + b"".join(_number(i * PRIME) + b"N" for i in range(1, size // 15 + 2)) + b"u"
    if kind == 5:
        return b"K\x00" + b"q\x09h\x09\x86" * 60
    if kind == 6:
        return b"K\x00" + b"\x85" * count
    if kind == 7:
        return b"(" + b"K\x07" * count + b"t"
    if kind == 8:
        return (
            b"](" + b"".join(rng.choice((b"]", b"}", b"\x8f", b")")) for _ in range(count)) + b"e"
        )
    if kind == 9:
        return _number(1 << min(8 * size, 8 << 20))
    if kind == 10:
        return b"\x8f(" + b"".join(_number(i * PRIME) for i in range(1, size // 15 + 2)) + b"\x90"
    if kind == 11:
        return b"L" + b"9" * min(size, 1 << 20) + b"L\n"
    if kind == 12:
        return b"](" + _text("k") + b"N\x86q\x0a" + b"h\x0a" * count + b"e"
    if kind == 13:
        return b"}" + _text("w") + TENSOR + b"s"
    return TENSOR if kind == 14 else SPARSE


OPERATIONS = (
    b"h\x01h\x02\x85R", b"h\x02", b"}h\x02h\x03s", b"}h\x02Ns", b"h\x02\x85", b"]h\x02a",
    b"h\x01h\x02\x85Rh\x03\x85R", b"(h\x02h\x03t", b"(h\x02h\x03l", b"h\x01)R", b"h\x01)\x81h\x02b",
    b"(h\x02h\x02\x91", b"\x8f(h\x02h\x03\x90", b"h\x04h\x02h\x03\x86R", b"h\x04h\x02\x85R",
    b"h\x05", b"h\x05\x85", b"}h\x02h\x05s", b"h\x02h\x03\x93", b"h\x02Q", b"\x94",
)  # fmt: skip
"""Instructions with few bytes that use large values: 1 is a function, 2 and 3 are values, 4 is a
function that makes a tensor, 5 is a tensor."""

FUNCTIONS = (
    b"ctorch\nSize\n", b"ccollections\nOrderedDict\n", b"ccollections\nCounter\n",
    b"ccollections\ndefaultdict\n", b"cbuiltins\nset\n", b"cbuiltins\nbytearray\n",
    b"cargparse\nNamespace\n", b"cnumpy\nndarray\n",
)  # fmt: skip
REBUILD = (
    "_rebuild_tensor_v2", "_rebuild_sparse_tensor", "_rebuild_parameter", "_rebuild_tensor_v3",
    "_rebuild_wrapper_subclass", "_rebuild_qtensor", "_rebuild_meta_tensor_no_storage",
)  # fmt: skip


def _preamble(rng: Rng) -> bytes:
    """Returns instructions that put the large values into the memo."""
    size = rng.choice((10, 1000, SIZE // 4))
    return (
        b"\x80\x04"
        + rng.choice(FUNCTIONS)
        + b"q\x010"
        + b"".join(_value(rng, size) + b"q" + bytes([i]) + b"0" for i in (2, 3))
        + f"ctorch._utils\n{rng.choice(REBUILD)}\n".encode()
        + b"q\x040"
        + TENSOR
        + b"q\x050"
    )


def _repeated(rng: Rng) -> bytes:
    """Returns a pickle of a list of many objects that are made of few."""
    operations = [rng.choice(OPERATIONS) for _ in range(rng.choice((1, 1, 3)))]
    body = b"".join(operations) * (SIZE // len(b"".join(operations)))
    is_mapping = rng.random() < 0.3
    if is_mapping:
        body = b"".join(_text(f"k{i}")[:6] + rng.choice(operations) for i in range(SIZE // 12))
    return (
        _preamble(rng) + (b"}(" if is_mapping else b"](") + body + (b"u." if is_mapping else b"e.")
    )


def _nested(rng: Rng) -> bytes:
    """Returns a pickle whose values contain each other, many levels deep."""
    wrap = rng.choice(
        (b"\x85", b"h\x06\x86q\x06", b"q\x06h\x06\x86", b"]q\x06a", b"q\x06}h\x02h\x06s",
         b"q\x06]h\x06ah\x06a", b"q\x06h\x01h\x06\x85R", b"q\x06h\x04h\x06\x85R",
         b"q\x06h\x04h\x06h\x06\x86R", b"q\x06}h\x06h\x02s")
    )  # fmt: skip
    start = rng.choice((TENSOR, _value(rng, 20), b"h\x02"))
    times = rng.choice((60, 5000, SIZE // len(wrap)))
    return _preamble(rng) + start + b"q\x06" + wrap * times + b"q\x07}h\x02h\x07s."


def _random_instructions(rng: Rng) -> bytes:
    """Returns instructions in random order."""
    pieces = [
        *OPERATIONS, *FUNCTIONS, TENSOR, SPARSE, STORAGE, b"(", b"t", b"l", b"d", b"e", b"u", b"s",
        b"a", b"0", b"1", b"}", b"]", b")", b"N", b"\x88", b"\x8f", b"\x90", b"\x91", b"R", b"\x81",
        b"b", b"Q", b"\x85", b"\x86", b"\x87", b"\x93", b"\x94", b"K\x01", b"q\x02", b"h\x02",
        b"r\0\0\1\0", b"p7\n", b"g2\n", b"I5\n", b"L5L\n", b"F1\n", b"S'a'\n", b"Va\n",
        _text("a"), b"i", b"o",
    ]  # fmt: skip
    chosen = rng.choices(pieces, k=rng.choice((5, 50, 20_000)))
    return _preamble(rng) + b"".join(chosen) + b"."


def _write(rng: Rng, pickled: bytes) -> Path:
    """Writes a pickle as a new or an old torch.save file, or as metadata."""
    form = rng.choice(("zip", "zip", "legacy", "metadata"))
    if form == "metadata":
        path = _folder() / ".metadata"
        path.write_bytes(pickled)
        return path
    path = _folder() / "hostile.pt"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", pickled)
            archive.writestr("a/data/0", bytes(4))
    else:
        buffer = io.BytesIO()
        torch.save({"w": torch.ones(1)}, buffer, _use_new_zipfile_serialization=False)
        header = buffer.getvalue()
        end = header.index(b"}q\x00X\x01\x00\x00\x00wq\x01ctorch")
        path.write_bytes(
            header[: end - 2] + pickled + b"\x80\x02](X\x01\x00\x00\x000e." + bytes(12)
        )
    return path


# ---- damaged files


def _damaged(rng: Rng) -> int:
    """Changes bits and bytes of a valid file; what both this and its library read is equal."""
    form, (path, data) = rng.choice(list(_valid().items()))
    out = bytearray(data)
    limit = len(out) if rng.random() < 0.5 else min(len(out), 2000)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(limit)
        kind = rng.randrange(4)
        if kind < 2:
            out[at] ^= 1 << rng.randrange(8) if kind else 0xFF
        elif kind == 2:
            del out[at : at + rng.randrange(1, 9)]
        else:
            out[at:at] = rng.randbytes(rng.randrange(1, 9))
        limit = min(limit, len(out))
    path.write_bytes(out)
    summary = _read(path)
    if rng.random() < 0.02:
        _show(path)
    loaded = None if summary is None or form == ".metadata" else _load(form, path)
    if isinstance(loaded, dict) and all(map(torch.is_tensor, loaded.values())):
        expected = paramstats.summarize(dict(loaded))
        for name in summary:
            if name in loaded and name not in summary.skipped:
                assert ROW.pack(*summary[name].state()) == ROW.pack(*expected[name].state()), name
    return 1


def _load(form: str, path: Path) -> Any:
    """Returns what the format's own library reads, or None if it refuses the file."""
    from safetensors.torch import load_file

    load: Callable[..., Any] = load_file if form == "safetensors" else torch.load
    try:
        return load(path)
    except Exception:
        return None


@functools.cache
def _valid() -> dict[str, tuple[Path, bytes]]:
    """Returns the path and the bytes of a valid file of each format."""
    from safetensors.torch import save_file
    from torch.distributed import checkpoint as dcp

    tensors = {
        "w": torch.linspace(-1, 1, 60).view(5, 12),
        "b": torch.ones(7).bfloat16(),
        "n": torch.tensor(3),
    }
    folder = _folder()
    paths = {form: folder / f"valid.{form}" for form in ("safetensors", "pt", "legacy")}
    save_file(tensors, paths["safetensors"])
    for form in ("pt", "legacy"):
        torch.save(tensors, paths[form], _use_new_zipfile_serialization=form == "pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(tensors), checkpoint_id=folder / "dcp")
    paths[".metadata"] = folder / "dcp" / ".metadata"
    return {form: (path, path.read_bytes()) for form, path in paths.items()}


_kept: list[Any] = []


@functools.cache
def _folder() -> Path:
    _kept.append(tempfile.TemporaryDirectory(prefix="paramstats-fuzz-"))
    return Path(_kept[-1].name)
