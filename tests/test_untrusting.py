"""The package writes no other files than it is asked to, and executes nothing that it reads.

An audit hook records files that are opened, programs that are started and names that pickles look
up. Each case runs in its own process.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from tests.checkpoints.files import FORMATS, save
from tests.checkpoints.test_pickles import Calls
from tests.conftest import run_python

HOOK = """
import json, os, sys
import torch

def make_model():
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 10))

# Imports torch's modules before the hook watches.
make_model()(torch.randn(8, 64)).square().mean().backward()

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate",
           "os.chmod", "os.chown", "os.utime", "os.setxattr", "shutil.", "tempfile.")
STARTS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
          "os.startfile", "socket.", "webbrowser.", "urllib.", "ftplib.", "http.")
RUNS = ("pickle.", "exec", "compile", "import", "marshal.", "ctypes.", "code.__new__")
watched = ()
seen = []

def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if watched and flags & WRITES and path != os.devnull:
            seen.append(["open", str(path)])
    elif watched and event.startswith(watched):
        seen.append([event, repr(arguments)[:200]])

sys.addaudithook(hook)
"""

USE = """
watched = CHANGES + STARTS
import paramstats
torch.manual_seed(0)
model = make_model()
model(torch.randn(8, 64)).square().mean().backward()
summary = paramstats.summarize(model, buffers=True)
print(summary, summary.total, summary.findings(), summary.table(limit=3), paramstats.backend())
summary.scalars(), summary.to_dict(), summary._repr_html_()
history = paramstats.History()
watcher = paramstats.watch(model, every=1, history=history, log=lambda scalars, step: None)
watcher.step()
history[next(iter(summary))]
"""

ON_DISK = """
import paramstats
watched = CHANGES + STARTS
summary = paramstats.summarize(make_model())
with paramstats.History(FILE) as history:
    history.append(0, summary)
history.save(SAVED)
"""

SHOW = """
from paramstats._cli import main
import contextlib, io
def everything():
    for path in PATHS:
        for more in ([], ["--json"], ["--csv"], [PATHS[0]]):
            with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
                assert main(["show", path, *more]) in (0, 1, 2)  # 1: nothing to compare, 2: refused
everything()  # imports lazily before the hook watches
watched = CHANGES + STARTS + RUNS
everything()
"""


def watched_events(code: str, folder: Path, **values: object) -> list[list[str]]:
    """Runs code in `folder`, which must stay empty; returns the events that the hook saw."""
    folder.mkdir()
    report = "\nwatched = ()\nprint('SEEN', json.dumps(seen))"
    given = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    where = {name: str(folder) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR")}
    code = f"import os; os.chdir({str(folder)!r})\n{HOOK}{given}{code}{report}"
    done = run_python("-c", code, **where, PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stderr
    assert os.listdir(folder) == []
    return json.loads(done.stdout.rpartition("SEEN ")[2])


def test_summarize_and_watch_write_no_files(tmp_path):
    assert watched_events(USE, tmp_path / "here") == []


def test_a_history_writes_only_its_files(tmp_path):
    file, saved = tmp_path / "run.jsonl", tmp_path / "saved.jsonl"
    events = watched_events(ON_DISK, tmp_path / "here", FILE=str(file), SAVED=str(saved))
    assert sorted(os.listdir(tmp_path)) == ["here", "run.jsonl", "saved.jsonl"]
    temporary = re.compile(rf"{re.escape(str(tmp_path))}/\.[0-9a-f]{{16}}\.tmp")  # of `save`
    for _, what in events:
        assert str(file) in what or str(saved) in what or temporary.fullmatch(what), what
    assert events


def test_show_executes_nothing_from_checkpoints(tmp_path):
    paths = []
    for form in FORMATS:
        folder = tmp_path / form
        folder.mkdir()
        paths.append(str(save({"a": torch.randn(30, 3), "b": torch.ones(2)}, form, folder)))
    marker = tmp_path / "marker"
    hostile = {"w": torch.ones(2), "z": Calls(os.system, f"touch {marker}")}
    for new in (True, False):
        path = tmp_path / f"hostile-{new}.pt"
        torch.save(hostile, path, _use_new_zipfile_serialization=new)
        paths.append(str(path))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    paths.append(str(tmp_path / "whole.pt"))
    assert watched_events(SHOW, tmp_path / "here", PATHS=paths) == []
    assert not marker.exists()


@pytest.mark.parametrize(
    ("code", "event"),
    [
        ("open(os.path.join(FOLDER, 'x'), 'w')", "open"),
        ("os.mkdir(os.path.join(FOLDER, 'y'))", "os.mkdir"),
        ("import pickle; pickle.loads(b'cos\\nsystem\\n.')", "pickle.find_class"),
        ("exec('1')", "exec"),
        ("os.system('true')", "os.system"),
    ],
)
def test_the_hook_notices(tmp_path, code, event):
    watched = "watched = CHANGES + STARTS + RUNS\n"
    events = watched_events(watched + code, tmp_path / "here", FOLDER=str(tmp_path))
    assert event in [name for name, _ in events]
