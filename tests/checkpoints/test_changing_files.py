"""A file that changes while it is read gives an error, never statistics of a mix."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import pytest
import torch

from paramstats.checkpoints import CheckpointError, _files, compare_files, summarize_file
from tests.checkpoints.files import FORMATS, save
from tests.conftest import run_python

CHANGED = "a file that stays the same, got one that changed while it was read"


def tensors(value: float) -> dict[str, torch.Tensor]:
    names = ("a", "b") if value == 1 else ("b", "a")
    return {name: torch.full((1_100_000,), value) for name in names}


def in_place(new: Path, old: Path) -> None:
    """Write over a file, and give it the time that it had."""
    status = old.stat()
    shutil.copyfile(new, old)
    os.utime(old, ns=(status.st_atime_ns, status.st_mtime_ns))


def truncate(new: Path, old: Path) -> None:
    os.truncate(old, old.stat().st_size // 2)


def append(new: Path, old: Path) -> None:
    with old.open("ab") as file:
        file.write(b"more")


def remove(new: Path, old: Path) -> None:
    old.unlink()


CHANGES = (os.replace, in_place, truncate, append, remove)


def data_files(path: Path) -> list[Path]:
    """Return the files of a checkpoint that hold elements, in the order in which they are read."""
    if path.is_dir() or path.suffix == ".json":
        folder = path if path.is_dir() else path.parent
        return sorted(
            [*folder.glob("*.distcp"), *folder.glob("*.safetensors"), *folder.glob("*.bin")]
        )
    return [path]


@pytest.fixture
def two_versions(tmp_path, request):
    """The paths of two checkpoints with the same tensors and other elements."""
    paths = []
    for value in (1.0, 2.0):
        (tmp_path / str(value)).mkdir()
        paths.append(save(tensors(value), request.param, tmp_path / str(value)))
    return paths


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("two_versions", FORMATS, indirect=True)
def test_change_between_two_pieces_is_an_error(two_versions, change):
    path, new = two_versions
    file, new_file = data_files(path)[-1], data_files(new)[-1]
    changes = iter([lambda: change(new_file, file)])

    with pytest.raises(CheckpointError, match=CHANGED) as raised:
        summarize_file(path, progress=lambda *_: next(changes, lambda: None)())
    assert str(file) in str(raised.value)


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("two_versions", ["safetensors"], indirect=True)
def test_change_of_one_of_two_compared_files_is_an_error(two_versions, tmp_path, changed):
    new = shutil.copy(two_versions[1], tmp_path)
    changes = iter([lambda: os.replace(new, two_versions[changed])])
    with pytest.raises(CheckpointError, match=CHANGED):
        compare_files(*two_versions, progress=lambda *_: next(changes, lambda: None)())


@pytest.mark.parametrize(
    "two_versions", ["safetensors", "pt", "sharded safetensors"], indirect=True
)
def test_change_between_the_header_and_the_elements_is_an_error(two_versions, monkeypatch):
    path, new = two_versions
    from paramstats.checkpoints import _summarize_file

    real = _summarize_file.list_tensors

    def list_and_change(*arguments):
        listed = real(*arguments)
        os.replace(data_files(new)[0], data_files(path)[0])
        return listed

    monkeypatch.setattr(_summarize_file, "list_tensors", list_and_change)
    with pytest.raises(CheckpointError, match=CHANGED):
        summarize_file(path)


@pytest.mark.parametrize("two_versions", ["sharded safetensors", "dcp"], indirect=True)
def test_index_that_changes_is_an_error(two_versions):
    path, _ = two_versions
    index = path if path.is_file() else path / ".metadata"
    with pytest.raises(CheckpointError, match=CHANGED) as raised:
        summarize_file(path, progress=lambda *_: os.utime(index))
    assert str(index) in str(raised.value)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("two_versions", ["sharded safetensors"], indirect=True)
def test_file_that_changes_while_another_is_opened_is_an_error(two_versions, monkeypatch, folder):
    """Both files are those of one moment: the second may not be newer than the first."""
    path, new = two_versions
    if folder:
        path.unlink()
    real, opened = _files.Files.open, []

    def open_and_change(self, name):
        file = real(self, name)
        if Path(name).suffix == ".safetensors" and not opened:
            opened.append(name)
            os.replace(data_files(new)[1], data_files(path)[1])
        return file

    monkeypatch.setattr(_files.Files, "open", open_and_change)
    with pytest.raises(CheckpointError, match=CHANGED):
        summarize_file(path.parent if folder else path)


@pytest.mark.parametrize("two_versions", FORMATS, indirect=True)
def test_other_files_in_the_folder_may_change(two_versions):
    path, _ = two_versions
    log = path.parent / "log.txt"
    assert summarize_file(path, progress=lambda *_: log.write_text("step"))["a"].mean == 1


def test_two_changes_within_a_tick_of_the_clock_are_noticed(tmp_path):
    path = tmp_path / "a"
    for _ in range(10):
        path.write_bytes(b"old")
        files = _files.Files()
        files.note(path)
        path.write_bytes(b"new")
        with pytest.raises(CheckpointError, match=CHANGED):
            files.open(path)


def test_fifo_in_place_of_a_file_does_not_block(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"")
    monkeypatch.setattr(_files.Files, "note", lambda *_: None)  # it was a file when it was noted
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="got no regular file"):
        _files.Files().open(path)


class BadFile(io.FileIO):
    def readinto(self, buffer):
        raise OSError(5, "Input/output error")


def test_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    for form in FORMATS:
        (tmp_path / form).mkdir()
        path = save({"w": torch.ones(3)}, form, tmp_path / form)
        with monkeypatch.context() as patch:
            patch.setattr(_files, "RawFile", type("File", (_files.RawFile, BadFile), {}))
            with pytest.raises(OSError, match=rf"Input/output error: '{tmp_path}"):
                summarize_file(path)


AT_EXIT = """
import atexit, sys
def read():
    from paramstats.checkpoints import compare_files, summarize_file
    print(summarize_file(sys.argv[1])["a"].mean, len(compare_files(sys.argv[1], sys.argv[1]).rows))
atexit.register(read)
import paramstats
"""


def test_files_are_read_in_an_exit_handler(tmp_path):
    path = save(tensors(1), "safetensors", tmp_path)
    done = run_python("-c", AT_EXIT, str(path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "1.0 2\n", "")
