"""What changed between two checkpoints, against tensors in memory."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from paramstats.checkpoints import _comparing as comparing
from paramstats.checkpoints import _reading as reading
from paramstats.checkpoints import compare_files
from paramstats.checkpoints._stored import Part, row_major
from tests.checkpoints.files import FORMATS, save


def compare(tmp_path, a, b, **arguments):
    torch.save(a, tmp_path / "a.pt")
    torch.save(b, tmp_path / "b.pt")
    return compare_files(tmp_path / "a.pt", tmp_path / "b.pt", **arguments)


def only(result):
    (row,) = result.rows
    return row


def test_figures_a_person_can_check(backend, tmp_path):
    row = only(compare(tmp_path, {"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([3.0, 9.0])}))
    assert (row.name, row.shape, row.count) == ("w", (2,), 2)
    assert (row.norm_a, row.norm_b) == (5.0, pytest.approx(math.sqrt(90), rel=1e-12))
    assert (row.change_norm, row.relative_change, row.largest_change) == (5.0, 1.0, 5.0)
    assert (row.changed_count, row.changed_fraction) == (1, 0.5)


@pytest.mark.parametrize("form_b", FORMATS)
@pytest.mark.parametrize("form_a", ["pt", "safetensors", "dcp"])
def test_any_format_against_any(tmp_path, form_a, form_b):
    torch.manual_seed(0)
    a = {"w": torch.randn(700, 1000), "b": torch.randn(33).bfloat16(), "e": torch.empty(0)}
    b = {name: x + (0.01 * torch.randn(x.shape)).to(x.dtype) for name, x in a.items()}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    paths = [
        save(made, form, tmp_path / f) for f, made, form in (("a", a, form_a), ("b", b, form_b))
    ]
    result = compare_files(*paths)
    rows = {row.name: row for row in result.rows}
    assert [row.relative_change for row in result.rows] == sorted(
        (row.relative_change for row in result.rows), reverse=True
    )
    for name, x in a.items():
        y, row = b[name].double().numpy(), rows[name]
        x = x.double().numpy()
        assert row.norm_a == pytest.approx(np.linalg.norm(x), rel=1e-6)
        assert row.norm_b == pytest.approx(np.linalg.norm(y), rel=1e-6)
        assert row.change_norm == pytest.approx(np.linalg.norm(y - x), rel=1e-6)
        assert row.largest_change == pytest.approx(abs(y - x).max() if x.size else 0, rel=1e-6)
        assert row.changed_count == (x != y).sum()
    assert rows["e"].relative_change == 0 and rows["e"].changed_fraction == 0


@pytest.mark.parametrize(
    ("a", "b", "norm", "changed"),
    [
        (torch.tensor([2**62], dtype=torch.int64), torch.tensor([2**62 + 1]), 0.0, 1),
        (torch.tensor([2**62 + 1]), torch.tensor([2**62], dtype=torch.uint64), 0.0, 1),
        (torch.tensor([2**62, 7]), torch.tensor([2**62, 7], dtype=torch.uint64), 0.0, 0),
        (torch.tensor([2**64 - 1], dtype=torch.uint64), torch.tensor([-1]), 2.0**64, 1),
        (torch.tensor([250], dtype=torch.uint8), torch.tensor([5], dtype=torch.uint8), 245, 1),
        (torch.tensor([True, False]), torch.tensor([False, False]), 1.0, 1),
        (torch.tensor([3 + 4j]), torch.tensor([0j]), 5.0, 1),
        (torch.tensor([1e-45]), torch.tensor([0.0]), 1.401298464324817e-45, 1),
        (torch.tensor([3e38]), torch.tensor([-3e38]), 6e38, 1),
        (torch.tensor([0.0]), torch.tensor([-0.0]), 0.0, 0),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), 0.0, 0),
        (torch.tensor([0.1], dtype=torch.float64), torch.tensor([0.1]), 1.4901161138336505e-09, 1),
        (torch.tensor([math.inf, 2.0]), torch.tensor([math.inf, 3.0]), 1.0, 1),
        (torch.tensor([math.nan, 2.0]), torch.tensor([math.nan, 2.0]), 0.0, 0),
        (torch.tensor([1.5]).to(torch.float8_e4m3fn), torch.tensor([2.5]).half(), 1.0, 1),
    ],
)
def test_awkward_elements(backend, tmp_path, a, b, norm, changed):
    row = only(compare(tmp_path, {"w": a}, {"w": b}))
    assert row.change_norm == pytest.approx(norm, rel=1e-6)
    assert row.largest_change == pytest.approx(norm, rel=1e-6)
    assert (row.changed_count, row.dtype_a, row.dtype_b) == (changed, a.dtype, b.dtype)


def test_conjugates(backend, tmp_path):
    z = torch.tensor([3 + 4j, 1 + 0j])
    row = only(compare(tmp_path, {"z": z}, {"z": z.conj()}))
    assert (row.change_norm, row.changed_count) == (8.0, 1)
    assert only(compare(tmp_path, {"z": z.conj()}, {"z": z.conj()})).changed_count == 0


def test_zeros_and_nan_in_relative_changes(backend, tmp_path):
    zero, one, bad = torch.zeros(2), torch.ones(2), torch.tensor([1.0, math.nan])
    a = {"same": zero, "from nothing": zero.clone(), "to nan": one, "half": 2 * one}
    b = {"same": zero, "from nothing": one, "to nan": bad, "half": one}
    result = compare(tmp_path, a, b)
    assert [row.name for row in result.rows] == ["to nan", "from nothing", "half", "same"]
    relative = [row.relative_change for row in result.rows]
    assert math.isnan(relative[0]) and relative[1:] == [math.inf, 0.5, 0.0]
    assert result.rows[0].changed_count == 1


def test_elements_that_are_not_finite_hide_no_change(backend, tmp_path):
    inf, nan = math.inf, math.nan
    pairs = {
        "kept": ([nan, inf, 2.0], [nan, inf, 2.0]),
        "beside inf": ([inf, 1.0], [inf, 9e9]),
        "beside nan": ([nan, 3.0, 4.0], [nan, 3.0, 5.0]),
        "of zeros": ([-inf, 0.0], [-inf, 1.0]),
        "to inf": ([1.0, 1.0], [1.0, inf]),
        "from nan": ([nan, 1.0], [1.0, 1.0]),
    }
    a, b = ({name: torch.tensor(p[i]) for name, p in pairs.items()} for i in (0, 1))
    result = compare(tmp_path, a, b)
    relative = {row.name: row.relative_change for row in result.rows}
    assert math.isnan(relative.pop("from nan")) and result.rows[0].name == "from nan"
    assert list(relative.values()) == pytest.approx([inf, inf, 9e9, 0.2, 0])
    assert list(relative)[2:] == ["beside inf", "beside nan", "kept"]
    changed = {row.name: row.changed_count for row in result.rows}
    assert changed == {name: int(name != "kept") for name in pairs}


def test_what_cannot_be_compared_is_named(backend, tmp_path):
    w = torch.ones(2)
    a = {
        "w": w,
        "tied": w,
        "gone": w + 1,
        "shape": torch.ones(3),
        "sparse": torch.eye(2).to_sparse(),
    }
    b = {"tied": w * 2, "new": w + 2, "shape": torch.ones(3, 1), "sparse": torch.eye(2)}
    result = compare(tmp_path, a, b)
    assert (only(result).name, only(result).relative_change) == ("tied", 1.0)
    assert (result.only_in_a, result.only_in_b) == (("gone",), ("new",))
    assert result.other_shape == {"shape": ((3,), (3, 1))} and list(result.skipped) == ["sparse"]
    table = str(result)
    for line in ("only in a: gone", "only in b: new", "other shape: shape: [3] in a, [3, 1] in b"):
        assert line in table
    assert "not read: sparse: a sparse tensor" in table
    back = json.loads(json.dumps(result.to_dict()))
    assert back["tensors"]["tied"]["shape"] == [2] and back["other_shape"] == {
        "shape": [[3], [3, 1]]
    }


def test_tensors_tied_in_one_file_alone(tmp_path):
    w = torch.ones(2)
    result = compare(tmp_path, {"w": w, "tied": w}, {"w": w, "tied": w * 3})
    assert [(row.name, row.relative_change) for row in result.rows] == [("tied", 2.0), ("w", 0.0)]
    result = compare(tmp_path, {"w": w, "tied": w * 3}, {"w": w, "tied": w})
    assert [row.name for row in result.rows] == ["tied", "w"]


def test_other_types_are_noted(tmp_path):
    result = compare(tmp_path, {"w": torch.ones(2)}, {"w": torch.ones(2).half()})
    assert "other dtype: w: float32 and float16" in str(result)


def test_views_are_compared_by_place(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 1 << 14)
    x = torch.randn(300, 200)
    y = x.clone()
    y[299, 199] += 1
    result = compare(
        tmp_path, {"w": x.t(), "s": x[:, ::2]}, {"w": y.t().contiguous(), "s": y[:, ::2]}
    )
    rows = {row.name: row for row in result.rows}
    assert rows["w"].changed_count == 1 and rows["s"].changed_count == 0
    assert rows["w"].change_norm == pytest.approx(1, rel=1e-6)


def part(starts, sizes):
    return Part("a", 0, sizes, row_major(sizes), starts)


def grid(shape, rows, columns):
    """Parts of a matrix, the last ones smaller."""
    return tuple(
        part((r, c), (min(rows, shape[0] - r), min(columns, shape[1] - c)))
        for c in range(0, shape[1], columns)
        for r in range(0, shape[0], rows)
    )


@pytest.mark.parametrize("of_a", [(1, 40), (3, 7), (30, 40), (10, 1)])
@pytest.mark.parametrize("of_b", [(1, 40), (4, 5), (30, 40), (3, 1)])
def test_parts_that_overlap_are_found(of_a, of_b):
    shape = (30, 40)
    a, b = grid(shape, *of_a), (*grid(shape, *of_b), part((0, 40), (30, 0)))
    seen = torch.zeros(shape, dtype=torch.int64)
    for x, y in comparing._near(a, b):
        begin = list(map(max, x.starts, y.starts))
        end = [min(x.starts[d] + x.sizes[d], y.starts[d] + y.sizes[d]) for d in (0, 1)]
        if begin[0] < end[0] and begin[1] < end[1]:
            seen[begin[0] : end[0], begin[1] : end[1]] += 1
    assert (seen == 1).all()


def test_parts_are_not_taken_each_against_each():
    a, b = (grid((3000, 2), rows, 2) for rows in (1, 3))
    assert len(list(comparing._near(a, a))) == 3000
    assert len(list(comparing._near(a, b))) < 4 * 3000


def test_include_exclude_and_progress(tmp_path):
    calls = []
    a = {name: torch.ones(9) for name in ("x.a", "x.b", "y.a")}
    result = compare(
        tmp_path, a, a, include="x", exclude="b", progress=lambda *call: calls.append(call)
    )
    assert only(result).name == "x.a" and calls[-1] == (72, 72)
    assert result.only_in_a == ()


def test_a_table_fits_the_width(tmp_path):
    a = {"model.layers.0." + "x" * 90: torch.ones(2)}
    lines = compare(tmp_path, a, a).table(width=100).splitlines()
    assert len(lines[0]) <= 100 and "…" in lines[2]


@pytest.mark.parametrize("turned", [False, True])
def test_names_that_differ_by_a_prefix(tmp_path, turned):
    bare = {"layers.0.w": torch.ones(4), "layers.1.w": torch.ones(4) * 2, "new": torch.ones(1)}
    inner = {f"net.{name}": tensor * 3 for name, tensor in bare.items() if name != "new"}
    torch.save(bare, tmp_path / "bare.pt")
    torch.save({"model": inner, "optimizer": {"v": torch.ones(9)}}, tmp_path / "wrapped.pt")
    paths = [tmp_path / "wrapped.pt", tmp_path / "bare.pt"]
    result = compare_files(*(reversed(paths) if turned else paths))
    assert sorted(row.name for row in result.rows) == ["layers.0.w", "layers.1.w"]
    assert {round(row.relative_change, 6) for row in result.rows} == {2.0 if turned else 0.666667}
    prefixes = (result.prefix_a, result.prefix_b)
    assert prefixes == (("", "model.net.") if turned else ("model.net.", ""))
    only = (result.only_in_a, result.only_in_b)
    assert only == ((("new",), ("optimizer.v",)) if turned else (("optimizer.v",), ("new",)))
    side = "b" if turned else "a"
    assert f"names of {side} without their 'model.net.'" in result.table()
    assert result.to_dict()[f"prefix_{side}"] == "model.net."


def test_a_name_in_common_keeps_all_names(tmp_path):
    torch.save({"w": torch.ones(1), "model.v": torch.ones(1)}, tmp_path / "a.pt")
    torch.save({"w": torch.ones(1), "v": torch.ones(1)}, tmp_path / "b.pt")
    result = compare_files(tmp_path / "a.pt", tmp_path / "b.pt")
    assert [row.name for row in result.rows] == ["w"] and result.prefix_a == result.prefix_b == ""


def test_long_lists_of_names_are_cut(tmp_path):
    many = {"w": torch.ones(1), **{f"x{i}": torch.ones(1) for i in range(30)}}
    torch.save(many, tmp_path / "a.pt")
    torch.save({"w": torch.ones(1)}, tmp_path / "b.pt")
    result = compare_files(tmp_path / "a.pt", tmp_path / "b.pt")
    assert len(result.only_in_a) == 30 and result.table().count("only in a: ") == 11
    assert result.table().endswith("only in a: ... and 20 more")
    assert "... and 1 more" in result.table(limit=0)
