"""`python -m paramstats show`: tables, JSON, CSV, and one clear line for every broken file."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

import paramstats
from paramstats._cli import main
from paramstats.checkpoints import _show as show
from paramstats.checkpoints import summarize_file
from tests.checkpoints.files import save, save_file
from tests.checkpoints.test_formats import packed
from tests.checkpoints.test_pickles import Calls


@pytest.fixture
def path(tmp_path):
    w = torch.arange(6.0)
    torch.save(
        {"w": w, "tied": w, "b": -torch.ones(4), "bad": torch.tensor([math.nan])}, tmp_path / "a.pt"
    )
    return tmp_path / "a.pt"


def names(table: str) -> list[str]:
    """The first words of the lines down to the total."""
    lines = table.splitlines()[2:]
    words = [line.split()[0] for line in lines if line and not line.startswith("─")]
    return words[: words.index("total") + 1] if "total" in words else words


def test_a_table(backend, path, capsys):
    assert main(["show", str(path)]) == 0
    out = capsys.readouterr()
    table = summarize_file(path).table(kind="param").splitlines()[:-1]  # less its note
    assert out.out.splitlines()[: len(table)] == table and out.err == ""
    assert names(out.out) == ["w", "=", "b", "bad", "total"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sort", "norm"], ["bad", "w", "=", "b"]),
        (["--sort", "mean"], ["bad", "w", "=", "b"]),
        (["--sort", "min", "--limit", "2"], ["bad", "w", "=", "..."]),
        (["--sort", "name"], ["b", "bad", "w", "="]),
        (["--limit", "1"], ["w", "=", "..."]),
        (["--limit", "0"], ["..."]),
        (["--include", "^b", "--include", "w"], ["w", "=", "b", "bad"]),
        (["--exclude", "bad", "--exclude", "w|tied"], ["b"]),
    ],
)
def test_order_and_selection(path, capsys, arguments, expected):
    assert main(["show", str(path), *arguments]) == 0
    assert names(capsys.readouterr().out) == [*expected, "total"]


def test_json(path, capsys):
    assert main(["show", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert repr(shown["total"]) == repr(summarize_file(path).to_dict()["total"])
    assert list(shown["params"]) == ["w", "b", "bad"] and shown["skipped"] == {}
    assert shown["params"]["w"]["std"] == paramstats.summarize({"w": torch.arange(6.0)})["w"].std
    assert main(["show", str(path), "--json", "--sort", "max", "--limit", "2"]) == 0
    assert list(json.loads(capsys.readouterr().out)["params"]) == ["bad", "w"]


def test_csv(path, capsys):
    assert main(["show", str(path), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows] == ["w", "b", "bad"]
    entry = summarize_file(path)["w"]
    assert float(rows[0]["std"]) == entry.std and rows[0]["zero_count"] == "1"
    assert (rows[0]["shape"], rows[0]["dtype"], rows[0]["aliases"]) == ("6", "float32", "tied")


def test_what_changed(path, tmp_path, capsys):
    save_file({"w": torch.arange(6.0) * 2, "b": -torch.ones(4)}, tmp_path / "b.safetensors")
    both = [str(path), str(tmp_path / "b.safetensors")]
    assert main(["show", *both]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[4:]] == ["w", "b", "only"]
    assert out.endswith("\nonly in a: bad\n")
    assert f"a: {both[0]}\nb: {both[1]}\n" in out
    assert main(["show", *both, "--json", "--limit", "1"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown["tensors"]) == ["w"] and shown["tensors"]["w"]["relative_change"] == 1.0
    assert main(["show", *both, "--csv", "--sort", "name"]) == 0
    out = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out.out)))
    assert [row["name"] for row in rows] == ["b", "w"] and rows[1]["dtype_b"] == "float32"
    assert out.err == "only in a: bad\n"


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("largest_change", ["odd", "far", "near", "same"]),
        ("-largest_change", ["odd", "same", "near", "far"]),
        ("count", ["same", "near", "far", "odd"]),
        ("-changed_count", ["same", "odd", "far", "near"]),
        ("name", ["far", "near", "odd", "same"]),
    ],
)
def test_the_order_of_changes(tmp_path, capsys, sort, expected):
    sizes = {"near": 3, "same": 4, "far": 2, "odd": 1}
    a = {name: torch.ones(n) for name, n in sizes.items()}
    by = {"near": 1, "same": 0, "far": 5, "odd": math.nan}
    b = {name: x + torch.full_like(x, by[name]) for name, x in a.items()}
    b["far"][1] = 1
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    both = [str(tmp_path / f"{x}.safetensors") for x in "ab"]
    assert main(["show", *both, "--csv", f"--sort={sort}"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows] == expected
    assert main(["show", *both, "--sort=-name"]) == 2
    assert "or --sort=-STAT for the smallest first, got '-name'" in capsys.readouterr().err


def test_what_csv_has_no_row_for_is_on_stderr(tmp_path, capsys):
    w = torch.ones(2)
    a = {"w": w, "gone": w + 1, "sparse": torch.eye(2).to_sparse(), "shape": w + 2}
    b = {"w": w.half(), "new": w + 1, "sparse": torch.eye(2), "shape": torch.ones(3)}
    torch.save(a, tmp_path / "a.pt")
    torch.save(b, tmp_path / "b.pt")
    both = [str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]
    assert main(["show", *both, "--csv"]) == 0
    out = capsys.readouterr()
    assert len(out.out.splitlines()) == 2
    starts = ["only in a: gone", "only in b: new", "other shape: shape: ", "not read: sparse: a "]
    lines = out.err.splitlines()
    assert len(lines) == 4 and all(map(str.startswith, lines, starts))
    assert main(["show", *both, "--json"]) == 0
    assert capsys.readouterr().err == ""


def test_names_that_no_terminal_should_see(tmp_path, capsys):
    name = 'esc\x1b[31m\n\ud800"'
    path = tmp_path / "a.safetensors"
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    path.write_bytes(packed({name: entry}) + b"\1")
    for arguments in ([], ["--csv"], ["--json"]):
        assert main(["show", str(path), *arguments]) == 0
        out = capsys.readouterr().out
        assert out.count("\x1b") == (1 if arguments == ["--csv"] else 0)


def test_what_is_odd_comes_with_advice(path, capsys):
    assert main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "! NaN or Inf in parameter" in out and "summary.findings()" not in out
    assert "\nERROR NaN or Inf in parameter: " in out
    assert out.splitlines()[-1] == "    bad  1 NaN of 1 element"


def test_a_selection_of_nothing_is_said(path, capsys):
    assert main(["show", str(path), "--include", "nope"]) == 0
    assert "no name of 3 passes" in capsys.readouterr().err


def test_warnings_are_lines(tmp_path, capsys):
    torch.save({"s": torch.eye(2).to_sparse(), "w": torch.ones(1)}, tmp_path / "a.pt")
    assert main(["show", str(tmp_path / "a.pt")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("paramstats: 's' could not be read, statistics are NaN: a sparse tensor")


# ---- broken files


def png(folder):
    (folder / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    return folder / "x.png"


def text(folder):
    (folder / "notes.pt").write_text("these are not weights\n" * 9)
    return folder / "notes.pt"


def a_zip(folder):
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("x/readme.txt", "hello")
    return folder / "a.zip"


def compressed(folder):
    torch.save({"w": torch.ones(1000)}, folder / "a.pt")
    with (
        zipfile.ZipFile(folder / "a.pt") as old,
        zipfile.ZipFile(folder / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return folder / "b.pt"


def empty(folder):
    (folder / "a.safetensors").write_bytes(b"")
    return folder / "a.safetensors"


def truncated(form):
    def make(folder):
        made = save({"w": torch.ones(1000)}, form, folder)
        os.truncate(made, made.stat().st_size - 100)
        return made

    return make


def header(text, data=b""):
    def make(folder):
        content = text if isinstance(text, bytes) else json.dumps(text).encode()
        (folder / "a.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + data)
        return folder / "a.safetensors"

    return make


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def pickled(folder):
    (folder / "a.pkl").write_bytes(pickle.dumps(Calls(open, str(folder / "marker"), "w")))
    return folder / "a.pkl"


def with_code(folder):
    torch.save({"w": Calls(open, str(folder / "marker"), "w")}, folder / "a.pt")
    return folder / "a.pt"


def metadata_with_code(folder):
    (folder / ".metadata").write_bytes(pickle.dumps(Calls(open, str(folder / "marker"), "w")))
    return folder


def script(folder):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(folder / "a.pt")
    return folder / "a.pt"


def pointer(folder):
    (folder / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    return folder / "a.safetensors"


def folder_without(folder):
    (folder / "other.pt").touch()
    return folder


def pipe(folder):
    os.mkfifo(folder / "pipe.pt")
    return folder / "pipe.pt"


def index(places, shard=None):
    def make(folder):
        if shard:
            save_file(shard, folder / "one.safetensors")
        content = {"weight_map": places} if isinstance(places, dict) else places
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        return folder / "model.safetensors.index.json"

    return make


ONE = {"a": torch.ones(2)}
BROKEN = {
    "png": (png, "got one that begins with b'\\x89PNG"),
    "text": (text, "got one that begins with b'these are not"),
    "zip": (a_zip, "got another zip archive"),
    "compressed": (compressed, "expected an uncompressed record"),
    "empty": (empty, "got an empty file"),
    "missing": (lambda folder: folder / "nothing.pt", "got no such file"),
    "truncated safetensors": (truncated("safetensors"), "it is cut off"),
    "truncated pt": (truncated("pt"), "expected a whole torch.save archive"),
    "truncated legacy": (truncated("legacy"), "a file that ends within storage"),
    "truncated header": (header(b"{"[:1] * 9), "in JSON"),
    "header of no object": (header([1]), "got list"),
    "header of a long file": (
        lambda f: header({})(f).write_bytes(b"\xff" * 8 + b"{}") and f / "a.safetensors",
        "it is cut off, or not safetensors",
    ),
    "unknown dtype": (header({"w": entry("F31")}, bytes(8)), "got 'F31' for 'w'"),
    "dtype of no text": (header({"w": entry([])}, bytes(8)), "got [] for 'w'"),
    "not the shape": (
        header({"w": entry(shape=(3,))}, bytes(8)),
        "expected 12 bytes of F32 [3], got 8",
    ),
    "negative shape": (header({"w": entry(shape=(-2,))}, bytes(8)), "got [-2]"),
    "fractional": (header({"w": entry(shape=(2.0,))}, bytes(8)), "got [2.0]"),
    "overlap": (
        header({"w": entry(), "v": entry(offsets=(4, 12))}, bytes(12)),
        "expected tensors one after another, got 'v'",
    ),
    "gap": (header({"w": entry(offsets=(4, 12))}, bytes(12)), "one after another, got 'w'"),
    "after its end": (header({"w": entry()}, bytes(9)), "there is something after its end"),
    "before its end": (header({"w": entry()}, bytes(7)), "it is cut off"),
    "twice": (header(b'{"w":{},"w":{}}'), "a name that stands twice"),
    "deep": (header(b"[" * 100_000), "in JSON"),
    "unknown entry": (header({"w": 3}), "expected dtype, shape and data_offsets, got 3"),
    "lfs pointer": (pointer, "git lfs pull"),
    "pickle": (pickled, "a pickle that torch.save did not write"),
    "code": (with_code, "nothing was executed"),
    "metadata with code": (metadata_with_code, "nothing was executed"),
    "TorchScript": (script, "got a TorchScript archive"),
    "folder": (folder_without, "got a folder without a checkpoint"),
    "pipe": (pipe, "got no regular file"),
    "index of no object": (index([]), "expected an index with a weight_map"),
    "index of paths": (index({"a": "../one.safetensors"}), "expected names of files in the weight"),
    "index without shard": (index({"a": "one.safetensors"}), "expected a file 'one.safetensors'"),
    "index without tensor": (
        index({"a": "one.safetensors", "b": "one.safetensors"}, ONE),
        "expected a tensor 'b' in one.safetensors",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_broken_file_is_one_line(tmp_path, name, capsys):
    make, message = BROKEN[name]
    path = make(tmp_path)
    for arguments in ([str(path)], [str(path), str(path)]):
        assert main(["show", *arguments]) == 2
        out = capsys.readouterr()
        assert out.out == "" and len(out.err.splitlines()) == 1, out.err
        assert out.err.startswith("paramstats: expected ")
        assert message in out.err and str(tmp_path) in out.err
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sort", "median"], "paramstats show: expected --sort out of name, count, mean"),
        (["--limit", "-1"], "paramstats show: expected --limit 0 or more, got -1"),
        (["--include", "("], "expected regular expressions for include"),
    ],
)
def test_wrong_arguments_are_one_line(path, capsys, arguments, message):
    assert main(["show", str(path), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_no_permission(path, capsys, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(show, "summarize_file", lambda *_, **__: refuse())  # root may read all
    assert main(["show", str(path)]) == 2
    assert capsys.readouterr().err.endswith(f"got no permission to read it: {path}\n")


def test_ctrl_c(path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "summarize_file", interrupt)
    assert main(["show", str(path)]) == 130
    assert capsys.readouterr() == ("", "")


class Bar:
    """A terminal's stderr."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_bar_on_a_terminal_alone(path, monkeypatch, capsys):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    terminal = Bar()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["show", str(path)]) == 0
    assert "B/s" in terminal.text or "B [" in terminal.text
    terminal.text = ""
    monkeypatch.setitem(sys.modules, "tqdm", None)  # as if it were not installed
    assert main(["show", str(path)]) == 0
    assert terminal.text == "" and "total" in capsys.readouterr().out


# ---- as a process


def start(*arguments: str, **options) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "paramstats", "show", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_a_reader_that_goes_away(tmp_path):
    torch.save({f"layer.{i}.{'x' * 100}": torch.ones(1) for i in range(2000)}, tmp_path / "a.pt")
    process = start(str(tmp_path / "a.pt"))
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(30) == show.BROKEN_PIPE


def opened(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files here")
def test_ctrl_c_while_it_reads(tmp_path):
    with (tmp_path / "a.safetensors").open("wb") as file:  # a sparse file, with zeros to read
        size = 1 << 37
        file.write(packed({"w": entry("U8", (size,), (0, size))}))
        file.truncate(file.tell() + size)
    path = str(tmp_path / "a.safetensors")
    # Whoever runs the tests in the background may have had them ignore it.
    process = start(path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not any(fd.exists() and fd.samefile(file.name) for fd in opened(process.pid)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stdout.read() == b"" and process.stderr.read() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        (">/dev/full", 2, "paramstats show: cannot write to standard output: No space left"),
        (">&-", 2, "paramstats show: expected a standard output"),
        ("2>/dev/full", 0, ""),
    ],
)
def test_outputs_that_take_nothing(path, redirection, status, said):
    command = f"'{sys.executable}' -m paramstats show '{path}' {redirection}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == status and done.stderr.startswith(said), done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_error_lines_are_short_and_hold_no_escapes(tmp_path, capsys):
    odd = tmp_path / f"\x1b[31m{'x' * 200}.pt"
    odd.write_bytes(b"nothing")
    assert main(["show", str(odd)]) == 2
    line = capsys.readouterr().err
    assert "\x1b" not in line and "\\x1b" in line and len(line) < 1100
