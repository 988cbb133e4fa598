"""The disk cache of compiled kernels: several processes, damaged files, folders it cannot use."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys

import pytest

from paramstats._core import cubin_cache

KEY = cubin_cache.key("source", ("--option",), 90, "12.9")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the cache, which does not exist yet."""
    folder = tmp_path / "xdg/paramstats"
    monkeypatch.delenv(cubin_cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent))
    return folder


def test_what_was_stored_is_loaded(cache):
    assert cubin_cache.load(KEY) is None
    cubin_cache.store(KEY, b"cubin")
    assert cubin_cache.load(KEY) == b"cubin"
    cubin_cache.store(KEY, b"another")
    assert cubin_cache.load(KEY) == b"another"
    assert len(list(cache.iterdir())) == 1
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "other",
    [
        ("source2", ("--option",), 90, "12.9"),
        ("source", ("--option2",), 90, "12.9"),
        ("source", ("--option",), 100, "12.9"),
        ("source", ("--option",), 90, "13.0"),
    ],
)
def test_the_key_depends_on_everything(cache, other):
    assert cubin_cache.key(*other) != KEY


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 100])
def test_a_truncated_file_counts_as_missing(cache, size):
    cubin_cache.store(KEY, bytes(range(100)))
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:size])
    assert cubin_cache.load(KEY) is None
    cubin_cache.store(KEY, b"again")
    assert cubin_cache.load(KEY) == b"again"


@pytest.mark.parametrize("at", [0, 31, 32, 36])
def test_a_changed_file_counts_as_missing(cache, at):
    cubin_cache.store(KEY, b"cubin")
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    assert cubin_cache.load(KEY) is None


def test_a_file_with_the_name_of_another_counts_as_missing(cache):
    cubin_cache.store(KEY, b"cubin")
    (file,) = cache.iterdir()
    other = cubin_cache.key("source", ("--option",), 80, "12.9")
    file.rename(file.with_name(file.name.replace(KEY, other)))
    assert cubin_cache.load(other) is None


def test_the_oldest_files_are_removed_and_no_others(cache):
    cache.mkdir(parents=True)
    foreign = [cache / "notes.txt", cache / "kernels.cu"]
    for file in foreign:
        file.write_text("not ours")
        os.utime(file, (1, 1))
    partial = cache / "kernels-a_b1.partial"  # of a process that was killed
    partial.touch()
    os.utime(partial, (1, 1))
    keys = [cubin_cache.key("source", (), number, "12.9") for number in range(20)]
    for second, key in enumerate(keys, 1000):
        cubin_cache.store(key, key.encode())
        os.utime(cache / f"kernels-{key}.cubin", (second, second))
    kept = [key for key in keys if cubin_cache.load(key)]
    assert kept == keys[-cubin_cache.MOST_FILES :]
    assert not partial.exists() and all(file.exists() for file in foreign)


def test_a_full_disk_leaves_nothing(cache, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "replace", full)
    cubin_cache.store(KEY, b"cubin")
    assert list(cache.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_no_error(cache, monkeypatch):
    cache.parent.write_text("a file")
    cubin_cache.store(KEY, b"cubin")
    assert cubin_cache.load(KEY) is None


@pytest.mark.skipif(os.getuid() == 0, reason="root can write to every folder")
def test_a_folder_that_is_not_writable_is_no_error(cache):
    cache.mkdir(mode=0o500, parents=True)
    cubin_cache.store(KEY, b"cubin")
    assert cubin_cache.load(KEY) is None


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write_to_is_not_used(cache, mode):
    cubin_cache.store(KEY, b"cubin")
    cache.chmod(mode)
    assert cubin_cache.load(KEY) is None
    cubin_cache.store(cubin_cache.key("other", (), 90, "12.9"), b"cubin")
    assert len(list(cache.iterdir())) == 1


def test_a_folder_of_another_user_is_not_used(cache, monkeypatch):
    cubin_cache.store(KEY, b"cubin")
    if os.getuid() == 0:
        os.chown(cache, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert cubin_cache.load(KEY) is None


def test_the_variable_moves_and_disables_the_cache(cache, tmp_path, monkeypatch):
    monkeypatch.setenv(cubin_cache.VARIABLE, str(tmp_path / "moved"))
    cubin_cache.store(KEY, b"cubin")
    assert cubin_cache.load(KEY) == b"cubin" and len(list((tmp_path / "moved").iterdir())) == 1
    monkeypatch.setenv(cubin_cache.VARIABLE, "")
    assert cubin_cache.load(KEY) is None
    cubin_cache.store(KEY, b"cubin")
    assert not cache.exists()


def test_without_xdg_the_home_is_used_if_there_is_one(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # must be ignored, says its specification
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cubin_cache.folder() == tmp_path / ".cache/paramstats"
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    assert cubin_cache.folder() is None
    cubin_cache.store(KEY, b"cubin")
    assert cubin_cache.load(KEY) is None and not (tmp_path / "missing").exists()


PROCESS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("cubin_cache", sys.argv[1])
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
keys = [cache.key("source", (), number, "12.9") for number in range(20)]
content = {key: key.encode() * 2000 for key in keys}
print("ready", flush=True)
sys.stdin.readline()
found = 0
for key in [key for key in keys * 10 for _ in range(2)]:
    data = cache.load(key)
    assert data in (None, content[key]), "another content"
    found += data is not None
    if data is None:
        cache.store(key, content[key])
print(found)
"""


def test_eight_processes_read_write_and_remove_at_once(cache):
    """There are more keys than files are kept, so that files vanish all the time."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-I", "-c", PROCESS, cubin_cache.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate() for process in processes]
    assert [error for _, error in outputs] == [""] * 8
    assert sum(int(found) for found, _ in outputs) > 0
    names = [file.name for file in cache.iterdir()]
    assert len(names) <= cubin_cache.MOST_FILES + 8
    assert all(name.endswith(".cubin") for name in names), names
