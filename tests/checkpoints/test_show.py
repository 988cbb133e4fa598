"""`paramstats show`: tables, JSON, CSV, errors and exit status."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from paramstats import _output as output
from paramstats import summarize
from paramstats._cli import main
from paramstats.checkpoints import _opening as opening
from paramstats.checkpoints import _summarize_file as summarizing
from paramstats.checkpoints import summarize_file
from paramstats.checkpoints._show import show
from tests.checkpoints.files import entry, safetensors_bytes


@pytest.fixture
def path(tmp_path):
    w = torch.arange(6.0)
    bad = torch.tensor([math.nan])
    torch.save({"w": w, "tied": w, "b": -torch.ones(4), "bad": bad}, tmp_path / "a.pt")
    return str(tmp_path / "a.pt")


def first_words(table: str) -> list[str]:
    """Return the first word of every line between the headings and the total."""
    lines = table.splitlines()[2:]
    words = [line.split()[0] for line in lines if line and not line.startswith("─")]
    return words[: words.index("total")]


def csv_rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_table_and_advice(backend, path, shown):
    out, err = shown(path)
    table = summarize_file(path).table().splitlines()[:-1]  # without its note
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
    summary = summarize_file(path)
    (finding,) = summary.findings()
    expected = {**summary.to_dict(), "skipped": {}, "notes": []}
    for row in expected["params"].values():
        assert row.pop("kind") == "param"
        row |= {"group": "model", "label": ""}
    assert content.pop("findings")[0]["advice"] == finding.advice
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


# ---- groups, labels, notes


@pytest.fixture
def training(tmp_path):
    """The path of a training checkpoint, whose model has 3 elements and a norm of 5."""
    state = {0: {"step": torch.tensor(1.0), "exp_avg": torch.full((2,), 9.0)}}
    content = {"rng": torch.get_rng_state(), "optimizer": {"state": state}}
    model = {"a.w": torch.tensor([3.0, 4.0]), "b": torch.zeros(1)}
    torch.save({**content, "model": model}, tmp_path / "training.pt")
    return str(tmp_path / "training.pt")


@pytest.fixture
def altered(monkeypatch):
    """A function that changes what the readers find in a file: the tensors by name, the notes."""

    def alter(notes=(), **changes):
        def list_tensors(*arguments):
            contents = opening.list_tensors(*arguments)
            tensors = [t._replace(**changes.get(t.name, {})) for t in contents.tensors]
            return contents._replace(tensors=tensors, notes=tuple(notes))

        monkeypatch.setattr(summarizing, "list_tensors", list_tensors)

    return alter


def test_groups_are_told_apart(training, shown):
    out, _ = shown(training)
    lines = out.splitlines()
    assert lines[-3].split()[:5] == ["total", "of", "the", "model", "3"]
    assert lines[-2:] == [
        "optimizer: 2 tensors, 3 elements, not in the total",
        f"other: 1 tensor, {len(torch.get_rng_state()):,} elements, not in the total",
    ]
    state = ["optimizer.state.0.step", "optimizer.state.0.exp_avg"]
    assert first_words(out) == ["model.a.w", "model.b", *state, "rng"]
    content = json.loads(shown(training, "--json")[0])
    groups = {name: row["group"] for name, row in content["params"].items()}
    assert list(groups.values()) == ["model"] * 2 + ["optimizer"] * 2 + ["other"]
    assert content["total"]["norm"] == 5 and content["total"]["count"] == 3
    rows = csv_rows(shown(training, "--csv")[0])
    assert [row["group"] for row in rows] == list(groups.values())
    summary = summarize_file(training)
    assert summary["rng"].kind == "other" and summary["model.b"].kind == "param"
    assert summary.file.groups == groups and summarize({"w": torch.ones(1)}).file is None


def test_groups_in_a_data_frame_and_after_pickling(training):
    pytest.importorskip("pandas", reason="pandas is not installed")
    summary = pickle.loads(pickle.dumps(summarize_file(training)))
    kinds = ["param"] * 2 + ["optimizer"] * 2 + ["other"]
    assert list(summary.to_pandas()["kind"]) == kinds
    assert summary.file == summarize_file(training).file
    assert summary.filter("optimizer").table(kind="buffer").count("optimizer.state") == 2


def test_an_optimizer_alone_has_no_total(training, shown):
    out, _ = shown(training, "--include", "optimizer")
    assert "total  " not in out and out.endswith(
        "no total: none of these tensors is a weight of a model\n"
    )


def test_labels_and_notes(path, shown, altered):
    codes = {"label": "int8 codes without a scale"}
    altered(["objects of 2 unknown classes: a.B", "x\x1by"], w=codes, b=codes, bad={"label": "odd"})
    expected = ["w and 1 more: int8 codes without a scale", "bad: odd"]
    expected += ["objects of 2 unknown classes: a.B", "x\\x1by"]
    out, err = shown(path, "--exclude", "bad")
    assert out.splitlines()[-3:] == [expected[0], *expected[2:]] and err == ""
    out, err = shown(path, "--csv")
    assert [row["label"] for row in csv_rows(out)] == [codes["label"], codes["label"], "odd"]
    assert err.splitlines() == expected
    content = json.loads(shown(path, "--json")[0])
    assert content["notes"] == expected and content["params"]["bad"]["label"] == "odd"
    summary = summarize_file(path)
    assert summary.file.labels["bad"] == "odd" and summary.file.notes[1] == "x\x1by"


def test_many_labels_are_counted(tmp_path, shown, altered):
    torch.save({f"w{i}": torch.ones(1) for i in range(30)}, tmp_path / "a.pt")
    altered(**{f"w{i}": {"label": f"label {i}"} for i in range(30)})
    lines = shown(tmp_path / "a.pt")[0].splitlines()
    assert lines[-2:] == ["w19: label 19", "... and 10 more"]


@pytest.mark.parametrize("notes", [[], ["no tensors in it"]])
def test_a_file_without_tensors(tmp_path, shown, altered, notes):
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    altered([*notes, "nothing else"])
    assert shown(tmp_path / "a.pt")[0] == "no tensors in it\nnothing else\n"
    assert csv_rows(shown(tmp_path / "a.pt", "--csv")[0]) == []
    assert "total" not in str(summarize_file(tmp_path / "a.pt"))


# ---- what the exit status says


@pytest.mark.parametrize(
    ("tensors", "option", "status"),
    [
        ({"w": torch.eye(9)}, "warning", 0),
        ({"w": torch.zeros(9, 9)}, "warning", 1),
        ({"w": torch.zeros(9, 9)}, "error", 0),
        ({"w": torch.tensor([math.nan])}, "error", 1),
        (
            {"w": torch.eye(9), "optimizer": {"state": {0: {"exp_avg": torch.tensor(math.inf)}}}},
            "error",
            1,
        ),
        ({"w": torch.eye(9).to_sparse()}, "warning", 0),
        ({"mask": torch.full((4, 4), -math.inf).triu(1)}, "error", 0),
        ({"state_dict": {"w": torch.eye(9)}, "best_loss": torch.tensor(math.inf)}, "error", 0),
        ({"state_dict": {"w": torch.eye(9)}, "best_loss": torch.tensor(math.nan)}, "error", 1),
    ],
)
def test_fail_on(tmp_path, capsys, tensors, option, status):
    torch.save(tensors, tmp_path / "a.pt")
    assert main(["show", str(tmp_path / "a.pt")]) == 0
    plain = capsys.readouterr()
    assert main(["show", str(tmp_path / "a.pt"), "--fail-on", option]) == status
    out, err = capsys.readouterr()
    assert out == plain.out and plain.err == ""
    assert err.startswith(f"paramstats show: --fail-on {option}: 1 tensor, first ") or not status


def test_empty_path_is_not_the_current_folder(tmp_path, monkeypatch, capsys):
    torch.save({"w": torch.eye(9)}, tmp_path / "a.pt")
    monkeypatch.chdir(tmp_path)
    assert main(["show", ""]) == 2 and main(["show", "."]) == 0
    assert "No such file" in capsys.readouterr().err


def test_fail_on_needs_a_tensor_to_check(tmp_path, capsys):
    torch.save({"w": torch.eye(9)}, tmp_path / "a.pt")
    path = str(tmp_path / "a.pt")
    assert main(["show", path, "--include", "typo"]) == 0
    assert main(["show", path, "--include", "typo", "--fail-on", "error"]) == 1
    assert "there is no tensor to check" in capsys.readouterr().err


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"], ["--findings"]])
def test_damage_is_status_2_and_the_rest_is_shown(path, capsys, altered, form):
    altered(b={"parts": (), "unread_reason": "damaged: wrong checksum"})
    assert main(["show", path, *form]) == 2
    out, err = capsys.readouterr()
    assert "bad" in out and "paramstats show: 1 tensor damaged, first b" in err


# ---- modules, findings, a page


def test_depth_merges_modules(training, shown):
    out, _ = shown(training, "--depth", "1")
    assert first_words(out) == ["model", "optimizer", "rng"]
    assert out.splitlines()[2].split()[:2] == ["model", "3"]
    assert out.splitlines()[-2].startswith("optimizer: 2 tensors")
    rows = csv_rows(shown(training, "--depth", "1", "--csv")[0])
    assert [(row["name"], row["group"]) for row in rows] == [
        ("model", "model"),
        ("optimizer", "optimizer"),
        ("rng", "other"),
    ]
    assert float(rows[0]["norm"]) == 5


def test_findings_name_every_tensor(tmp_path, shown, altered):
    torch.save({f"w{i}": torch.zeros(3, 3) for i in range(12)}, tmp_path / "a.pt")
    out, _ = shown(tmp_path / "a.pt", "--findings")
    lines = out.splitlines()
    assert lines[11] == "WARNING w11: zero weight: all 9 elements zero" and len(lines) == 14
    assert lines[13].startswith("zero weight: All elements are zero")
    assert len(json.loads(shown(tmp_path / "a.pt", "--findings", "--json")[0])["findings"]) == 12
    rows = csv_rows(shown(tmp_path / "a.pt", "--findings", "--csv", "--limit", "3")[0])
    assert [row["name"] for row in rows] == ["w0", "w1", "w2"]
    assert shown(tmp_path / "a.pt", "--findings", "--include", "x")[0] == "no findings\n"
    assert shown(tmp_path / "a.pt", "--include", "x")[0] == "no tensors selected\n"
    altered(w0={"parts": (), "unread_reason": "a sparse tensor"})
    out, err = shown(tmp_path / "a.pt", "--findings", "--include", "w0")
    assert (out, err) == ("no findings\n", "not read: w0: a sparse tensor\n")


class Page(HTMLParser):
    """The tags and texts of a page; every tag must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "wbr", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_html_page(tmp_path, shown, altered):
    name = "<script>alert(1)</script>\" onload='x' \x1b\ud800"
    torch.save({name: torch.zeros(3, 3), "w": torch.ones(1)}, tmp_path / "<b>.pt")
    altered(["<i>a note</i>"])
    target = tmp_path / "page.html"
    assert shown(tmp_path / "<b>.pt", "--html", target)[0] == f"wrote {target}\n"
    page = Page(target.read_text(encoding="utf-8"))
    assert not {"script", "i", "b", "link", "img"} & set(page.tags)
    assert {key for key, _ in page.attributes} <= {
        *("lang", "charset", "http-equiv", "content", "name", "class", "style", "title"),
    }
    text = "".join(page.texts)
    for part in ("<script>alert(1)", "zero weight", "All elements are zero", "<i>a note</i>"):
        assert part in text
    assert "\x1b" not in text
    assert page.texts.count("paramstats: <b>.pt") == 2, "title and heading"


def test_page_of_many_tensors_is_cut(tmp_path, shown):
    torch.save({f"w{i}": torch.ones(1) for i in range(1002)}, tmp_path / "a.pt")
    for limit, cut in (([], "... and 2 more"), (["--limit", "1"], "... and 1,001 more")):
        shown(tmp_path / "a.pt", "--html", tmp_path / "page.html", *limit)
        assert cut in (tmp_path / "page.html").read_text(encoding="utf-8")


CONTROLS = "\x00\x07\t\n\r\x1b[31m\x7f\x85\x9b\u2028\u2029\u202a\u202e\u2066\u2069\ud800"


def hostile_names(path: Path) -> Path:
    """Write a file with a name for each control character, two of which have unread tensors."""
    names = [f"a{c}b" for c in CONTROLS]
    header = {name: entry("U8", (1,), (i, i + 1)) for i, name in enumerate(names)}
    end = len(names)
    header |= {f"{c}f4": entry("F4", (2,), (end, end := end + 1)) for c in "\x1b\u202e"}
    path.write_bytes(safetensors_bytes(header, bytes(end)))
    return path


@pytest.mark.parametrize(
    "form", [[], ["--csv"], ["--json"], ["--sort", "name"], ["--findings"], ["--depth", "1"]]
)
def test_output_has_no_control_characters(tmp_path, shown, form):
    folder = tmp_path / "x\x1b[31m\u202ey"
    folder.mkdir()
    path = hostile_names(folder / "a.safetensors")
    for text in shown(path, *form):
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
    out, err = shown(tmp_path / "s.pt")
    assert "\nnot read: s: a sparse" in out and err == ""
    out, err = shown(tmp_path / "s.pt", "--csv")
    assert "not read" not in out and err.startswith("not read: s: a sparse")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sort", "median"], "paramstats show: expected --sort to be one of name, count, mean"),
        (["--sort", "stddev"], "got 'stddev'; did you mean 'std'?"),
        (["other.pt", "--sort", "std"], "smallest first, got 'std'\n"),
        (["other.pt", "--sort", "relative"], "did you mean 'relative_change'?"),
        (["--sort", "grad.norm"], "--sort=-STAT for the smallest first, got 'grad.norm'"),
        (["other.pt", "--sort=-name"], "or --sort=-STAT for the smallest first, got '-name'"),
        (["--limit", "-1"], "paramstats show: expected --limit 0 or more, got -1"),
        (["--depth", "0"], "paramstats show: expected --depth 1 or more, got 0"),
        (["--html", "a.pt"], "the name of the page to write, which ends in .html, got 'a.pt'"),
        (["--html", "/no/such/a.html"], "cannot write /no/such/a.html: No such file"),
        (["--findings", "--html", "a.html"], "expected --findings without --html and --depth"),
        (["--findings", "--depth", "1"], "expected --findings without --html and --depth"),
        (["--map", "a=b"], "paramstats show: --map: expected two checkpoints, got one"),
        (["--strip-b", "a."], "paramstats show: --strip-b: expected two checkpoints, got one"),
        (
            ["other.pt", "--findings"],
            "paramstats show: --findings: expected one checkpoint, got two",
        ),
        (
            ["other.pt", "--depth", "1"],
            "paramstats show: --depth: expected one checkpoint, got two",
        ),
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
