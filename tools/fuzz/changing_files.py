"""Checkpoint files that change or fail while they are read, and calls that Ctrl-C interrupts.

A result must be that of the files at one moment: before or after a change, never a mix. Else there
must be an error that names a file.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import io
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from paramstats.checkpoints import CheckpointError, _files, compare_files, summarize_file

FORMATS = ("safetensors", "pt", "legacy", "sharded", "folder", "dcp")
CALLS = {
    "summarize_file": lambda path: _statistics(summarize_file(path)),
    "compare_files": lambda path: _norms(compare_files(path, path.parent / "other.pt")),
}
ERRORS = (errno.EIO, errno.EBADF, errno.EINTR, errno.ESTALE)
_SYSTEM_CALLS = ("stat", "fstat", "open", "listdir")


def run(seed: int) -> int:
    """Runs one case and returns the number of calls."""
    rng = random.Random(seed)
    path = _fresh_copy(rng.choice(FORMATS))
    case = rng.choice((_change_files, _change_files, _fail, _interrupt))
    return case(rng, path, CALLS[rng.choice(tuple(CALLS))])


Call = Callable[[Path], Any]


def _change_files(rng: random.Random, path: Path, call: Call) -> int:
    """Changes a file or replaces all of them in turn, each at any system call or read."""
    files = _files_of(path)
    if rng.random() < 0.5:
        changes = [_random_change(rng, rng.choice(files))]
    else:
        changes = [_replace(rng, file) for file in rng.sample(files, len(files))]
    count = _count_operations(path, call)
    change_at = sorted(rng.randrange(2 * count) for _ in changes)  # some only after it
    allowed = [_outcome(call, path)]
    for change in changes:
        change()
        allowed.append(_outcome(call, path))
    path = _fresh_copy(path.parent.name)
    left = list(zip(change_at, changes, strict=True))

    def hook(operation: int, name: str) -> None:
        while left and operation == left[0][0]:
            left.pop(0)[1]()

    with _hooked(hook):
        outcome = _outcome(call, path)
    assert outcome in allowed or isinstance(outcome, str), (change_at, outcome, allowed)
    return len(changes) + 3


def _random_change(rng: random.Random, file: Path) -> Callable[[], None]:
    """Returns a function that makes the same change to the file whenever it is called."""
    status = file.stat()
    at = rng.randrange(status.st_size)
    kind = rng.choice(("replace", "rewrite", "truncate", "append", "remove", "patch"))

    def change() -> None:
        if kind == "remove":
            file.unlink()
            return
        with file.open("r+b") as out:
            if kind == "truncate":
                out.truncate(at)
            elif kind == "append":
                out.seek(0, io.SEEK_END)
                out.write(b"more")
            elif kind == "patch":
                out.seek(at)
                out.write(b"\xff\x80\x00")
            else:
                out.write(_second_version(file).read_bytes()[: status.st_size])
        if kind == "rewrite":  # as programs do that keep the time of a file
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    return _replace(rng, file) if kind == "replace" else change


def _replace(rng: random.Random, file: Path) -> Callable[[], None]:
    """Returns a function that puts version 2 in place of a file, as a new file or in place."""
    is_new_file = rng.random() < 0.5

    def replace() -> None:
        if is_new_file:
            shutil.copyfile(_second_version(file), f"{file}.new")
            os.replace(f"{file}.new", file)
        else:
            shutil.copyfile(_second_version(file), file)

    return replace


def _second_version(file: Path) -> Path:
    return _versions() / "2" / file.relative_to(_work())


def _fail(rng: random.Random, path: Path, call: Call) -> int:
    """Lets one operation fail, or all reads be short."""
    expected = _outcome(call, path)
    fail_at, number = rng.randrange(_count_operations(path, call)), rng.choice(ERRORS)
    if rng.random() < 0.2:
        with _hooked(lambda operation, name: None, short_reads=True):
            assert _outcome(call, path) == expected
        return 3
    failed = []

    def hook(operation: int, name: str) -> None:
        if operation == fail_at:
            failed.append(name)
            raise OSError(number, os.strerror(number))

    before = _resources()
    with _hooked(hook):
        outcome = _outcome(call, path, needs_path=False)
    assert failed and (isinstance(outcome, str) or outcome == expected), (failed, outcome)
    assert _resources() == before, (failed, "leaks")
    return 3


def _interrupt(rng: random.Random, path: Path, call: Call) -> int:
    """Raises KeyboardInterrupt at an instruction of a call; the next call is right."""
    expected = _outcome(call, path)
    before = _resources()
    interrupt_at = rng.randrange(_count_instructions(path, call))
    with contextlib.suppress(KeyboardInterrupt):
        _run_instructions(path, call, interrupt_at)
    assert _resources() == before, f"leaks after instruction {interrupt_at}"
    assert _outcome(call, path) == expected
    return 3


@functools.cache
def _count_instructions(path: Path, call: Call) -> int:
    return _run_instructions(path, call, -1)


def _run_instructions(path: Path, call: Call, interrupt_at: int) -> int:
    """Runs a call, counts the instructions of the package's code for files, and interrupts it."""
    count = 0
    folder = os.path.dirname(_files.__file__)

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(folder):
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        if count == interrupt_at:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call(path)
    finally:
        sys.settrace(None)
    return count


def _outcome(call: Call, path: Path, needs_path: bool = True) -> Any:
    """Returns the statistics, or the message of an error that is documented."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call(path)
        except (CheckpointError, OSError) as error:
            message = str(error)
            assert str(_work()) in message or not needs_path, f"no path: {message}"
            return message


def _statistics(summary: Any) -> Any:
    assert not summary.skipped, summary.skipped
    return {
        name: (stats.count, stats.mean, stats.min, stats.max) for name, stats in summary.items()
    }


def _norms(comparison: Any) -> Any:
    rows = {row.name: (row.norm_a, row.change_norm, row.changed_count) for row in comparison.rows}
    return rows, sorted(comparison.only_in_a), sorted(comparison.only_in_b)


def _resources() -> tuple[int, int]:
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@contextlib.contextmanager
def _hooked(hook: Callable[[int, str], None], short_reads: bool = False) -> Iterator[None]:
    """Calls `hook` before every system call and read, with its number."""
    operations = iter(range(1 << 60))

    class Reading(io.FileIO):
        def readinto(self, buffer: Any) -> Any:
            hook(next(operations), "readinto")
            return super().readinto(memoryview(buffer)[:97] if short_reads else buffer)

        def seek(self, *arguments: Any) -> Any:
            hook(next(operations), "seek")
            return super().seek(*arguments)

    class Hooked(_files.RawFile, Reading):  # reads through both
        pass

    def hooked(name: str) -> Any:
        real = getattr(os, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            if not is_inside:
                is_inside.append(True)
                try:
                    hook(next(operations), name)
                finally:
                    is_inside.clear()
            return real(*arguments, **keywords)

        return call

    is_inside: list[bool] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(_files, "RawFile", Hooked))
        for name in _SYSTEM_CALLS:
            stack.enter_context(mock.patch.object(os, name, hooked(name)))
        yield


def _count_operations(path: Path, call: Call) -> int:
    operations = 0

    def hook(operation: int, name: str) -> None:
        nonlocal operations
        operations = operation + 1

    with _hooked(hook):
        call(path)
    return operations


# ---- the files


@functools.cache
def _root() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="paramstats-fuzz-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[Any] = []


def _work() -> Path:
    return _root() / "work"


def _fresh_copy(form: str) -> Path:
    """Returns the path of version 1 of a checkpoint, in a folder with another to compare."""
    folder = _work() / form
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_versions() / "1" / form, folder)
    return folder / {"sharded": "m.safetensors.index.json", "folder": "m", "dcp": "m"}.get(
        form, form
    )


def _files_of(path: Path) -> list[Path]:
    inside = path.parent if path.is_file() else path
    return [file for file in sorted(inside.iterdir()) if file.name != "other.pt"]


@functools.cache
def _versions() -> Path:
    """Returns a folder with two versions of every format.

    They differ in every element and in the order of the tensors in a file.
    """
    for version in (1, 2):
        names = [f"t{i}" for i in range(6)][:: 3 - 2 * version]
        tensors = {
            name: torch.full((40 + int(name[1]),), 10.0 * version + int(name[1])) for name in names
        }
        for form in FORMATS:
            folder = _root() / str(version) / form
            folder.mkdir(parents=True)
            _save(tensors, form, folder, version)
            torch.save(
                {name: torch.zeros_like(x) for name, x in tensors.items()}, folder / "other.pt"
            )
    return _root()


def _save(tensors: dict[str, torch.Tensor], form: str, folder: Path, version: int) -> None:
    from safetensors.torch import save_file
    from torch.distributed import checkpoint as dcp

    if form == "safetensors":
        save_file(tensors, folder / form)
    elif form in ("pt", "legacy"):
        torch.save(tensors, folder / form, _use_new_zipfile_serialization=form == "pt")
    elif form == "dcp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dict(tensors), checkpoint_id=folder / "m")
    else:
        inside = folder if form == "sharded" else folder / "m"
        inside.mkdir(exist_ok=True)
        file_of = {name: f"m-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
        for file in set(file_of.values()):
            part = {name: x for name, x in tensors.items() if file_of[name] == file}
            save_file(part, inside / file)
        if form == "sharded":
            index = json.dumps({"weight_map": file_of})
            (inside / "m.safetensors.index.json").write_text(index)
