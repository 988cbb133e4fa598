"""`paramstats show A B`: tables, JSON, CSV, mapped names and the exit status."""

from __future__ import annotations

import json
import math

import pytest
import torch

from paramstats._cli import main
from paramstats.checkpoints import _opening as opening
from paramstats.checkpoints._compare import compare as comparing
from tests.checkpoints.files import entry, safetensors_bytes
from tests.checkpoints.test_show import Page, csv_rows, hostile_names


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
    total = "model: 1 of 3 tensors unchanged"
    expected = [*uncompared, "other dtype: w: float32 and float16", total]
    assert all(map(str.startswith, lines[7:], expected))
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
        ("unchanged", ["same", "nan", "w"]),
    ],
)
def test_order_of_changes(paths, shown, sort, expected):
    rows = csv_rows(shown(*paths, "--csv", f"--sort={sort}")[0])
    assert [row["name"] for row in rows] == expected


@pytest.mark.parametrize("form", [[], ["--csv"], ["--json"], ["--sort", "name"]])
def test_output_has_no_control_characters(tmp_path, capsys, form):
    folder = tmp_path / "x\x1b[31m\u202ey"
    folder.mkdir()
    path = hostile_names(folder / "a.safetensors")
    other = folder / "b.safetensors"
    other.write_bytes(safetensors_bytes({"a\x07b": entry("U8", (2,), (0, 2))}, bytes(2)))
    for b in (path, other):
        assert main(["show", str(path), str(b), *form]) == int(b == other)  # nothing to compare
        for text in capsys.readouterr():
            assert all(line.isprintable() for line in text.split("\n")), text


def save(path, **tensors):
    torch.save(tensors, path)
    return str(path)


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("old.w", "w"), []),
        (("x.w", "y.w"), ["--map", "^x=y"]),
        (("x1.w", "y-1.w"), ["--map", r"x(\d)=y-\1"]),
        (("first.x", "second.y"), ["--strip-a", "first.", "--map", "x=y", "--strip-b", "second."]),
    ],
)
def test_names_are_mapped(tmp_path, shown, names, options):
    a = save(tmp_path / "a.pt", **{names[0]: torch.tensor([3.0]), "same": torch.ones(1)})
    b = save(tmp_path / "b.pt", **{names[1]: torch.tensor([5.0]), "same": torch.ones(1)})
    rows = csv_rows(shown(a, b, *options, "--csv", "--sort", "name")[0])
    changes = {row["name"]: float(row["change_norm"]) for row in rows}
    assert changes.get(names[0], changes.get("w")) == 2


def test_parts_of_one_file(tmp_path, shown):
    path = save(tmp_path / "a.pt", model={"w": torch.ones(1)}, ema={"w": torch.zeros(1)})
    (row,) = csv_rows(shown(f"{path}#model", f"{path}#ema", "--csv")[0])
    assert (row["name"], row["change_norm"]) == ("w", "1.0")
    out, _ = shown(f"{path}#ema")
    assert "total of the model" not in out and "\ntotal" in out


@pytest.mark.parametrize("form", [[], ["--csv"]])
def test_an_empty_comparison_is_status_1_with_the_reason(tmp_path, capsys, form):
    a, b = save(tmp_path / "a.pt", x=torch.ones(2)), save(tmp_path / "b.pt", y=torch.ones(3))
    assert main(["show", a, b, *form]) == 1
    out, err = capsys.readouterr()
    assert "no tensor was compared: " in (err if form else out)
    assert "total 0" not in out


@pytest.mark.parametrize(("value", "status"), [(1.0, 0), (math.nan, 1), (math.inf, 1)])
def test_fail_on(tmp_path, value, status):
    a, b = (
        save(tmp_path / "a.pt", w=torch.ones(1)),
        save(tmp_path / "b.pt", w=torch.ones(1) * value),
    )
    assert main(["show", a, b]) == 0
    assert main(["show", a, b, "--fail-on", "error"]) == status


def test_fail_on_lets_a_first_score_pass(tmp_path):
    values = {"state_dict.w": torch.ones(1), "callbacks.best": torch.tensor(math.inf)}
    a, b = save(tmp_path / "a.pt", **values), save(tmp_path / "b.pt", **values)
    assert main(["show", a, b, "--fail-on", "error"]) == 0


def test_damage_is_status_2(tmp_path, capsys, monkeypatch):
    def list_tensors(*arguments):
        contents = opening.list_tensors(*arguments)
        tensors = [
            t._replace(parts=(), unread_reason="damaged: wrong checksum") if t.name == "w" else t
            for t in contents.tensors
        ]
        return contents._replace(tensors=tensors)

    a = save(tmp_path / "a.pt", w=torch.ones(1), v=torch.ones(1))
    monkeypatch.setattr(comparing, "list_tensors", list_tensors)
    assert main(["show", a, a]) == 2
    out, err = capsys.readouterr()
    assert "not read: w: damaged" in out and "1 tensor damaged, first w" in err


def test_wrong_map_is_one_line(tmp_path, capsys):
    a = save(tmp_path / "a.pt", w=torch.ones(1))
    for text, message in (("x", "expected --map REGEX=REPLACEMENT, got 'x'"), ("(=x", "map")):
        assert main(["show", a, a, "--map", text]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_html_page(tmp_path, shown):
    a = save(tmp_path / "a.pt", **{"<b>": torch.ones(1), "w": torch.ones(1)})
    b = save(tmp_path / "b.pt", **{"<b>": torch.zeros(1), "w": torch.ones(1)})
    shown(a, b, "--html", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "b" not in page.tags and {"<b>", "relative"} <= set(page.texts)
    assert any("1 of 2 tensors unchanged" in text for text in page.texts)


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("count", [1, 2], ids=["summary", "comparison"])
def test_different_tensors_have_different_names(tmp_path, shown, monkeypatch, width, count):
    names = [
        f"lora_te_text_model_encoder_layers_{i}_{k}.lora_{w}.weight"
        for i in range(12)
        for k in ("mlp_fc1", "mlp_fc2", "self_attn_q_proj", "self_attn_out_proj")
        for w in ("down", "up")
    ]
    path = save(tmp_path / "a.pt", **{name: torch.rand(4, 4) for name in names})
    monkeypatch.setenv("COLUMNS", str(width))
    lines = shown(*[path] * count)[0].splitlines()
    rows = [line for line in lines if "lora" in line or "…" in line]
    assert len({line.split()[0] for line in rows}) == len(rows) == len(names)
    assert max(map(len, rows)) <= width
