"""Test what a history does when its file cannot be written as planned: full, changed, shared."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import stat
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from paramstats import History
from paramstats._history import writer
from tests.history.test_file import are_identical, ones, written


def texts(caught) -> list[str]:
    return [str(warning.message) for warning in caught]


# ---- opening


def test_a_file_with_content_is_not_continued_by_accident(tmp_path):
    path = tmp_path / "run.jsonl"
    for content in (b"", None):  # an empty file is accepted
        path.write_bytes(content) if content is not None else path.unlink()
        with History(path) as history:
            history.append(0, ones())
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"a new file, got '.*run.jsonl'.*pass resume=True"):
        History(path)
    assert path.read_bytes() == before
    with History(path, resume=True) as resumed, History(tmp_path / "new", resume=True) as new:
        resumed.append(1, ones())
        new.append(1, ones())
    assert len(History.load(path)) == 2 and len(History.load(tmp_path / "new")) == 1


def test_a_file_that_another_process_begins_meanwhile_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    begin = lambda *_: path.write_bytes(b"something")  # noqa: E731
    monkeypatch.setattr("paramstats._history.history._read", begin)
    with pytest.raises(FileExistsError, match="expected a new file"):
        History(path)
    assert path.read_bytes() == b"something"


USES = {
    "new": History,
    "resume": lambda path: History(path, resume=True),
    "load": History.load,
    "save": lambda path: History().save(path),
}


SPECIAL = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "device": lambda path: path.symlink_to("/dev/full"),
}


@pytest.mark.parametrize(
    ("kind", "use"),
    # A wrong `save` would replace the device for the whole system.
    [(kind, use) for kind in SPECIAL for use in USES if (kind, use) != ("device", "save")],
)
def test_only_regular_files_are_used(tmp_path, kind, use):
    def stop(*_):
        raise AssertionError("waited for the other end of a pipe")

    path = tmp_path / "x"
    SPECIAL[kind](path)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    try:
        with pytest.raises((ValueError, IsADirectoryError), match=r"a regular file|Is a direct"):
            USES[use](path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not stat.S_ISREG(path.stat().st_mode)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("a\0b", ValueError, r"expected the path of a file, got 'a\\x00b'"),
        (b"a\0b", ValueError, r"expected the path of a file, got b'a\\x00b'"),
        ("", ValueError, "expected the path of a file, got ''"),
        (3, TypeError, "expected the path of a file, got 3"),
        ("n" * 300, OSError, "too long"),
        ("missing/x", FileNotFoundError, "missing"),
    ],
    ids=["NUL", "bytes with NUL", "empty", "number", "long name", "no folder"],
)
@pytest.mark.parametrize("use", USES)
def test_a_path_that_cannot_be_used_is_an_error(tmp_path, monkeypatch, use, path, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        USES[use](path)
    assert os.listdir(tmp_path) == []


def test_paths_may_be_bytes(tmp_path):
    name = os.fsencode(tmp_path / "b\udcff")
    with History(name) as history:
        history.append(0, ones())
        history.save(name + b"2")
    assert are_identical(History.load(name), History.load(name + b"2"))


# ---- full disks


@contextlib.contextmanager
def disk_full_at(size: int):
    """Let every write fail that would make a file larger than `size`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_does_not_stop_training(tmp_path):
    path = tmp_path / "run.jsonl"
    with disk_full_at(10), pytest.raises(OSError, match="too large"):
        History(path)
    history = History(path)
    history.append(0, ones())
    before = path.read_bytes()
    for step in (1, 3):  # two outages
        before = path.read_bytes()
        with disk_full_at(len(before) + 20), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history.append(step, ones())
            history.append(step + 1, ones())
            assert len(history) == step + 2 and path.read_bytes() == before, "no line is cut"
        (warning,) = texts(caught)
        assert (
            f"entries from step {step} on are written when" in warning and "[Errno 27]" in warning
        )
        history.wait()
        assert are_identical(History.load(path), history)


@pytest.mark.parametrize("action", ["always", "error"])
def test_entries_that_the_file_lacks_are_reported_once(tmp_path, action):
    path, copy = tmp_path / "run.jsonl", tmp_path / "copy.jsonl"
    history = History(path)
    raised = []
    with disk_full_at(path.stat().st_size), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        for call in (*[lambda: history.append(len(history), ones())] * 4, *[history.close] * 2):
            try:
                call()
            except RuntimeWarning as warning:
                raised.append(str(warning))
        with pytest.raises(OSError, match="lacks 4 entries and cannot be written; pass another"):
            history.save(path)
    assert path.read_bytes().count(b"\n") == 1
    outage, lacking = raised if action == "error" else texts(caught)
    assert "cannot write" in outage and "lacks 4 entries; save(path) writes those in" in lacking
    history.save(copy)
    assert are_identical(History.load(copy), history) and len(history) == 4


def test_memory_is_bounded_while_the_disk_is_full(tmp_path):
    history = History(tmp_path / "run.jsonl", max_bytes=16 * (2 * 72 + 400) + 1000)
    with disk_full_at(60):
        with pytest.warns(RuntimeWarning, match="cannot write"):
            history.append(0, ones())
        for step in range(1, 1000):
            history.append(step, ones())
        assert len(history._journal.store._unwritten) <= 20
    with pytest.warns(RuntimeWarning, match=r"lacks 9\d\d entries"):
        history.close()
    everything = History.load(tmp_path / "run.jsonl").steps.tolist()
    assert set(history.steps.tolist()) <= set(everything), "those in memory are written"


# ---- a file that others change


@pytest.mark.parametrize("change", ["grown", "shrunk", "removed", "replaced", "folder", "emptied"])
def test_a_file_that_others_have_changed_is_not_written(tmp_path, change):
    path = tmp_path / "run.jsonl"
    history = History(path)
    history.append(0, ones())
    data = path.read_bytes()
    if change in ("removed", "replaced", "folder"):
        path.rename(tmp_path / "old")
    if change == "folder":
        path.mkdir()
    elif change != "removed":
        changed = {"grown": data + b" ", "shrunk": data[:-1], "replaced": data, "emptied": b""}
        path.write_bytes(changed[change])
    before = path.is_file() and path.read_bytes()
    with pytest.warns(RuntimeWarning, match=rf"cannot write '{path}', .*step 1 on are kept in mem"):
        history.append(1, ones())
    history.append(2, ones())
    assert len(history) == 3 and (path.is_file() and path.read_bytes()) == before
    with pytest.warns(RuntimeWarning, match="lacks 2 entries"):
        history.close()


OTHER = """
import sys, warnings, torch, paramstats
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    history = paramstats.History(sys.argv[1], resume=True)
    for step in (10, 11):
        history.append(step, paramstats.summarize({"w": torch.ones(1)}))
    history.close()
    print(len(history), *(w.message for w in caught if "paramstats.History" in str(w.message)))
"""


def test_only_one_of_two_writers_continues(tmp_path):
    path = tmp_path / "run.jsonl"
    history = History(path)
    history.append(0, ones())
    command = [sys.executable, "-W", "ignore", "-c", OTHER, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == "3\n"
    before = path.read_bytes()
    with pytest.warns(RuntimeWarning, match="its size was changed from .* to"):
        history.append(1, ones())
    assert path.read_bytes() == before and len(history) == 2


def test_a_writer_that_could_not_write_does_not_overwrite_another(tmp_path):
    path = tmp_path / "run.jsonl"
    history = History(path)
    history.append(0, ones())
    with disk_full_at(path.stat().st_size), pytest.warns(RuntimeWarning, match="File too large"):
        history.append(1, ones())
    History(path, resume=True).append(1, ones())  # a line of the same size
    before = path.read_bytes()
    with pytest.warns(RuntimeWarning, match="its size was changed from .* to"):
        history.append(2, ones())
    assert path.read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_does_not_write(tmp_path):
    path = tmp_path / "run.jsonl"
    history = History(path)
    history.append(0, ones())
    one = ones()
    reader, pipe = os.pipe()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(history._journal._lock.acquire).result()  # the child lacks this thread
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                history.append(1, one)
                history.append(2, one)
                history.wait()
            os.write(pipe, f"{len(history)} {[str(w.message) for w in caught]}".encode())
            os._exit(0)
        pool.submit(history._journal._lock.release).result()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    message = os.read(reader, 1000).decode()
    assert message.startswith("3 [") and message.count("the parent process writes it") == 1
    history.append(5, one)
    assert History.load(path).steps.tolist() == [0, 5]


# ---- saving


@pytest.mark.parametrize("mode", [0o600, 0o640, None])
def test_save_keeps_the_mode_of_a_file(tmp_path, mode):
    path = tmp_path / "saved.jsonl"
    if mode is not None:
        path.touch(mode)
        path.chmod(mode)
    before = os.umask(0o022)
    History().save(path)
    os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == (0o644 if mode is None else mode)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "saved.jsonl"
    history = written(tmp_path / "run.jsonl")
    History().save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        history.save(path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["run.jsonl", "saved.jsonl"]


def test_saving_to_its_own_file_keeps_all_entries(tmp_path):
    path = tmp_path / "run.jsonl"
    with History(path, max_bytes=1) as history:
        for step in range(9):
            history.append(step, ones())
        before = path.read_bytes()
        history.save(path)
    assert path.read_bytes() == before and len(History.load(path)) == 9 and len(history) == 2


def test_two_savers_and_the_longest_name(tmp_path):
    path = tmp_path / ("n" * 255)
    histories = [History(), History()]
    for history, steps in zip(histories, (3, 5), strict=True):
        for step in range(steps):
            history.append(step, ones())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: histories[i % 2].save(path), range(40)))
    assert len(History.load(path)) in (3, 5) and os.listdir(tmp_path) == [path.name]


# ---- processes that end

KILLED = """
import sys, torch, paramstats
history = paramstats.History(sys.argv[1], resume=True)
weights = {f"layer.{i}.weight": torch.randn(8) for i in range(50)}
for step in range(len(history), 1_000_000):
    history.append(step, paramstats.summarize(weights))
    print(step, flush=True)
"""


def test_appended_entries_survive_kill_9(tmp_path):
    path = tmp_path / "run.jsonl"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(path)]
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        printed = [process.stdout.readline() for _ in range(5)]
        process.kill()
        printed += process.stdout.read().split()
        process.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            history = History.load(path)
        assert history.steps.tolist() == list(range(len(history)))
        assert len(history) > int(printed[-1]) and len(history.names) == 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_handler_that_ends_the_process_leaves_a_complete_file(tmp_path):
    path = tmp_path / "run.jsonl"
    one, child = ones(), os.fork()
    if child == 0:
        signal.alarm(60)
        history = History(path)

        def terminate(*_):
            history.append(1, one)
            history.close()
            os._exit(0)

        def interrupted_line(entry):
            writer.entry_line = entry_line
            signal.raise_signal(signal.SIGTERM)  # in the middle of a write
            return entry_line(entry)

        signal.signal(signal.SIGTERM, terminate)
        entry_line, writer.entry_line = writer.entry_line, interrupted_line
        history.append(0, one)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert History.load(path).steps.tolist() == [0, 1]


def test_a_file_without_entries_is_accepted_as_new(tmp_path):
    path = tmp_path / "run.jsonl"
    History(path)  # writes the first line, as a run that fails before its first step
    with History(path) as history:
        history.append(3, ones())
    assert [step for step, _ in History.load(path)] == [3]


def test_an_error_of_save_names_the_path(tmp_path):
    path = os.fspath(tmp_path / "missing" / "run.jsonl")
    with pytest.raises(FileNotFoundError) as caught:
        History().save(path)
    assert caught.value.filename == path
