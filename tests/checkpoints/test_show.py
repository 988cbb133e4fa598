"""`paramstats show`: tables, JSON, CSV, errors and exit status."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from paramstats import _output as output
from paramstats._cli import main
from paramstats.checkpoints import _show as show
from paramstats.checkpoints import summarize_file
from tests.checkpoints.files import entry, safetensors_bytes


@pytest.fixture
def path(tmp_path):
    w = torch.arange(6.0)
    bad = torch.tensor([math.nan])
    torch.save({"w": w, "tied": w, "b": -torch.ones(4), "bad": bad}, tmp_path / "a.pt")
    return str(tmp_path / "a.pt")


@pytest.fixture
def shown(capsys):
    """A function that runs `paramstats show` and returns its output, and what is on stderr."""

    def run(*arguments: str) -> tuple[str, str]:
        assert main(["show", *map(str, arguments)]) == 0
        return capsys.readouterr()

    return run


def first_words(table: str) -> list[str]:
    """Return the first word of every line between the headings and the total."""
    lines = table.splitlines()[2:]
    words = [line.split()[0] for line in lines if line and not line.startswith("─")]
    return words[: words.index("total")]


def csv_rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_table_and_advice(backend, path, shown):
    out, err = shown(path)
    table = summarize_file(path).table(kind="param").splitlines()[:-1]  # without its note
    assert out.splitlines()[: len(table)] == table and err == ""
    assert first_words(out) == ["w", "=", "b", "bad"]
    assert "! NaN or Inf in parameter" in out and "summary.findings()" not in out
    assert "\nERROR NaN or Inf in parameter: " in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sort", "norm"], ["bad", "w", "=", "b"]),
        (["--sort", "mean"], ["bad", "w", "=", "b"]),
        (["--sort", "zero_count", "--limit", "2"], ["w", "=", "b", "..."]),
        (["--sort", "min", "--limit", "2"], ["bad", "w", "=", "..."]),
        (["--sort", "name"], ["b", "bad", "w", "="]),
        (["--limit", "1"], ["w", "=", "..."]),
        (["--limit", "0"], ["..."]),
        (["--include", "^b", "--include", "w"], ["w", "=", "b", "bad"]),
        (["--exclude", "bad", "--exclude", "w|tied"], ["b"]),
    ],
)
def test_order_and_selection(path, shown, arguments, expected):
    assert first_words(shown(path, *arguments)[0]) == expected


def test_json(path, shown):
    content = json.loads(shown(path, "--json")[0])
    expected = {**summarize_file(path).to_dict(), "skipped": {}}
    assert json.dumps(content) == json.dumps(expected)
    content = json.loads(shown(path, "--json", "--sort", "max", "--limit", "2")[0])
    assert list(content["params"]) == ["bad", "w"]


def test_csv(path, shown):
    rows = csv_rows(shown(path, "--csv")[0])
    assert [row["name"] for row in rows] == ["w", "b", "bad"]
    assert float(rows[0]["std"]) == summarize_file(path)["w"].std
    assert [rows[0][field] for field in ("shape", "dtype", "aliases", "zero_count")] == [
        *("6", "float32", "tied", "1")
    ]


@pytest.fixture
def paths(tmp_path):
    """Two checkpoints that differ in every way."""
    w = torch.ones(2)
    a = {"w": w, "same": torch.ones(4), "gone": w + 1, "sparse": torch.eye(2).to_sparse()}
    b = {"w": w.half() * 2, "same": torch.ones(4), "new": w + 1, "sparse": torch.eye(2)}
    torch.save({**a, "shape": w + 2, "nan": w}, tmp_path / "a.pt")
    torch.save({**b, "shape": torch.ones(3), "nan": w * math.nan}, tmp_path / "b.pt")
    return str(tmp_path / "a.pt"), str(tmp_path / "b.pt")


def test_comparison(paths, shown):
    uncompared = ["only in a: gone", "only in b: new", "other shape: shape: ", "not read: sparse: "]
    lines = shown(*paths)[0].splitlines()
    assert lines[:2] == [f"a: {paths[0]}", f"b: {paths[1]}"]
    assert [line.split()[0] for line in lines[4:7]] == ["nan", "w", "same"]
    assert all(map(str.startswith, lines[7:], [*uncompared, "other dtype: w: float32 and float16"]))
    out, err = shown(*paths, "--csv")
    assert [row["dtype_b"] for row in csv_rows(out)] == ["float32", "float16", "float32"]
    assert all(map(str.startswith, err.splitlines(), uncompared)) and err.count("\n") == 4
    out, err = shown(*paths, "--json", "--limit", "2")
    content = json.loads(out)
    assert list(content["tensors"]) == ["nan", "w"] and err == ""
    assert content["tensors"]["w"]["relative_change"] == 1 and content["only_in_a"] == ["gone"]


@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        ("largest_change", ["nan", "w", "same"]),
        ("-largest_change", ["nan", "same", "w"]),
        ("count", ["same", "nan", "w"]),
        ("-changed_count", ["same", "nan", "w"]),
        ("name", ["nan", "same", "w"]),
    ],
)
def test_order_of_changes(paths, shown, sort, expected):
    rows = csv_rows(shown(*paths, "--csv", f"--sort={sort}")[0])
    assert [row["name"] for row in rows] == expected


CONTROLS = "\x00\x07\t\n\r\x1b[31m\x7f\x85\x9b\u2028\u2029\u202a\u202e\u2066\u2069\ud800"


def hostile_names(path: Path) -> Path:
    """Write a file with a name for each control character, two of which have unread tensors."""
    names = [f"a{c}b" for c in CONTROLS]
    header = {name: entry("U8", (1,), (i, i + 1)) for i, name in enumerate(names)}
    end = len(names)
    header |= {f"{c}f4": entry("F4", (2,), (end, end := end + 1)) for c in "\x1b\u202e"}
    path.write_bytes(safetensors_bytes(header, bytes(end)))
    return path


@pytest.mark.parametrize("form", [[], ["--csv"], ["--json"], ["--sort", "name"]])
def test_output_has_no_control_characters(tmp_path, shown, form):
    folder = tmp_path / "x\x1b[31m\u202ey"
    folder.mkdir()
    path = hostile_names(folder / "a.safetensors")
    other = folder / "b.safetensors"
    other.write_bytes(safetensors_bytes({"a\x07b": entry("U8", (2,), (0, 2))}, bytes(2)))
    for paths in ([path], [path, path], [path, other]):
        for text in shown(*paths, *form):
            assert all(line.isprintable() for line in text.split("\n")), text


def test_csv_cells_are_no_formulas(tmp_path, shown):
    names = ["=cmd|'/c calc'!A1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1", "'=1", "w"]
    torch.save({name: torch.tensor([-2.0, -1.0]) for name in names}, tmp_path / "a.pt")
    rows = csv_rows(shown(tmp_path / "a.pt", "--csv")[0])
    cells = [
        "'=cmd|'/c calc'!A1",
        "'+1",
        "'-1",
        "'@SUM(A1)",
        "\\t=1",
        "\\r=1",
        "'\uff1d1",
        "'=1",
        "w",
    ]
    assert [row["name"] for row in rows] == cells
    assert {(row["mean"], row["min"]) for row in rows} == {("-1.5", "-2.0")}


def test_warnings_are_lines_on_stderr(path, tmp_path, shown):
    _, err = shown(path, "--include", "nope")
    assert err.startswith("paramstats show: expected include and exclude to select tensors, got no")
    torch.save({"s": torch.eye(2).to_sparse(), "w": torch.ones(1)}, tmp_path / "s.pt")
    (line,) = shown(tmp_path / "s.pt")[1].splitlines()
    assert line.startswith("paramstats show: 's' could not be read, statistics are NaN: a sparse")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sort", "median"], "paramstats show: expected --sort out of name, count, mean"),
        (["--sort", "stddev"], "got 'stddev'; did you mean 'std'?"),
        (["--sort", "grad.norm"], "--sort=-STAT for the smallest first, got 'grad.norm'"),
        (["other.pt", "--sort=-name"], "or --sort=-STAT for the smallest first, got '-name'"),
        (["--limit", "-1"], "paramstats show: expected --limit 0 or more, got -1"),
        (["--include", "("], "expected regular expressions for include"),
    ],
)
def test_wrong_argument_gives_one_line(path, capsys, arguments, message):
    assert main(["show", path, *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            PermissionError(13, "Permission denied", "a.pt"),
            2,
            "cannot read a.pt: Permission denied",
        ),
        (OSError(5, "Input/output error"), 2, "paramstats show: Input/output error"),
        (MemoryError(), 2, "paramstats show: MemoryError"),
        (RecursionError("maximum depth"), 2, "paramstats show: maximum depth"),
        (OverflowError("too large"), 2, "paramstats show: OverflowError: too large"),
        (AssertionError("\x1b[31mred\n"), 2, "paramstats show: AssertionError: \\x1b[31mred"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_while_a_file_is_read(path, capsys, monkeypatch, error, status, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(show, "summarize_file", fail)
    assert main(["show", path]) == status
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.splitlines()) == (status == 2)


def test_error_lines_are_short_and_without_escapes(tmp_path, capsys):
    path = (
        tmp_path / f"\x1b[31m{'x' * 200}" / ("y" * 240) / ("z" * 240) / ("a" * 240) / "b" / "c.pt"
    )
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nothing" * 9)
    assert main(["show", str(path)]) == 2
    line = capsys.readouterr().err
    assert "\x1b" not in line and "\\x1b" in line and len(line) < 1100


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_on_a_terminal(path, monkeypatch, capsys):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    for is_installed in (True, False):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        if not is_installed:
            monkeypatch.setitem(sys.modules, "tqdm", None)
        assert main(["show", path]) == 0
        text = terminal.getvalue()
        assert ("B/s" in text or "B [" in text) if is_installed else text == ""
        assert "total" in capsys.readouterr().out


# ---- as a process


def start(path: object, **options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "paramstats", "show", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_reader_that_closes_the_pipe(tmp_path):
    torch.save({f"layer.{i}.{'x' * 100}": torch.ones(1) for i in range(2000)}, tmp_path / "a.pt")
    process = start(tmp_path / "a.pt")
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(30) == output.BROKEN_PIPE


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files here")
def test_ctrl_c_while_it_reads(tmp_path):
    with (tmp_path / "a.safetensors").open("wb") as file:  # a sparse file that takes long to read
        size = 1 << 37
        file.write(safetensors_bytes({"w": entry("U8", (size,), (0, size))}))
        file.truncate(file.tell() + size)
    # A shell starts background processes with SIGINT ignored.
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = start(file.name, preexec_fn=default)
    open_files = Path(f"/proc/{process.pid}/fd")
    while not any(fd.exists() and fd.samefile(file.name) for fd in open_files.iterdir()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stdout.read() == b"" and process.stderr.read() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("redirection", "status", "message"),
    [
        (">/dev/full", 2, "paramstats show: cannot write to standard output: No space left"),
        (">&-", 2, "paramstats show: expected an open standard output"),
        ("2>/dev/full", 0, ""),
        ("2>&-", 0, ""),
    ],
)
def test_outputs_that_cannot_be_written(path, redirection, status, message):
    command = f"'{sys.executable}' -m paramstats show '{path}' {redirection}"
    process = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert process.returncode == status and process.stderr.startswith(message), process.stderr
    assert len(process.stderr.splitlines()) <= 1
