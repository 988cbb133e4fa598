"""`compare` of checkpoints and of tensors in memory, against torch and numpy."""

from __future__ import annotations

import collections
import json
import math

import numpy as np
import pytest
import torch

from paramstats import checkpoints
from paramstats.checkpoints import CheckpointError, compare_files, summarize_file
from paramstats.checkpoints import _reading as reading
from paramstats.checkpoints._compare import compare as comparing
from paramstats.checkpoints._compare import pairing
from paramstats.checkpoints._compare.comparison import sort_changes
from paramstats.checkpoints._stored_tensors import Part, contiguous_part
from tests.checkpoints.files import FORMATS, save

inf, nan = math.inf, math.nan


def compare(tmp_path, a, b, **arguments):
    torch.save(a, tmp_path / "a.pt")
    torch.save(b, tmp_path / "b.pt")
    return compare_files(tmp_path / "a.pt", tmp_path / "b.pt", **arguments)


def only_row(result):
    (row,) = result.rows
    return row


@pytest.mark.parametrize("form_b", FORMATS)
@pytest.mark.parametrize("form_a", ["pt", "safetensors", "dcp"])
def test_any_format_is_compared_with_any_other(tmp_path, form_a, form_b):
    torch.manual_seed(0)
    a = {"w": torch.randn(700, 1000), "b": torch.randn(33).bfloat16(), "e": torch.empty(0)}
    b = {name: x + (0.01 * torch.randn(x.shape)).to(x.dtype) for name, x in a.items()}
    paths = []
    for name, tensors, form in (("a", a, form_a), ("b", b, form_b)):
        (tmp_path / name).mkdir()
        paths.append(save(tensors, form, tmp_path / name))
    result = compare_files(*paths)
    relative_changes = [row.relative_change for row in result.rows]
    assert relative_changes == sorted(relative_changes, reverse=True)
    rows = {row.name: row for row in result.rows}
    for name in a:
        x, y, row = a[name].double().numpy(), b[name].double().numpy(), rows[name]
        assert (row.shape, row.count) == (tuple(a[name].shape), x.size)
        assert row.norm_a == pytest.approx(np.linalg.norm(x), rel=1e-6)
        assert row.norm_b == pytest.approx(np.linalg.norm(y), rel=1e-6)
        assert row.change_norm == pytest.approx(np.linalg.norm(y - x), rel=1e-6)
        assert row.largest_change == pytest.approx(abs(y - x).max() if x.size else 0, rel=1e-6)
        assert row.changed_count == (x != y).sum()
        assert row.changed_fraction == (row.changed_count / x.size if x.size else 0)
    assert rows["e"].relative_change == 0


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
        (torch.tensor([3 + 4j, 1]), torch.tensor([3 + 4j, 1]).conj(), 8.0, 1),
        (torch.tensor([3 + 4j, 1]).conj(), torch.tensor([3 + 4j, 1]).conj(), 0.0, 0),
        (torch.tensor([1e-45]), torch.tensor([0.0]), 1.401298464324817e-45, 1),
        (torch.tensor([3e38]), torch.tensor([-3e38]), 6e38, 1),
        (torch.tensor([0.0]), torch.tensor([-0.0]), 0.0, 0),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), 0.0, 0),
        (torch.tensor([0.1], dtype=torch.float64), torch.tensor([0.1]), 1.4901161138336505e-09, 1),
        (torch.tensor([inf, 2.0]), torch.tensor([inf, 3.0]), 1.0, 1),
        (torch.tensor([nan, 2.0]), torch.tensor([nan, 2.0]), 0.0, 0),
        (torch.tensor([1.5]).to(torch.float8_e4m3fn), torch.tensor([2.5]).half(), 1.0, 1),
    ],
)
def test_elements_are_compared_exactly(backend, tmp_path, a, b, norm, changed):
    row = only_row(compare(tmp_path, {"w": a}, {"w": b}))
    assert row.change_norm == pytest.approx(norm, rel=1e-6)
    assert (row.changed_count, row.dtype_a, row.dtype_b) == (changed, a.dtype, b.dtype)
    if not b.is_conj():  # two elements of one change
        assert row.largest_change == pytest.approx(norm, rel=1e-6)


def test_relative_change_with_zeros_nan_and_inf(backend, tmp_path):
    """The tensors of a and b, and the relative change, in the order of the rows."""
    cases = {
        "from nan": ([nan, 1.0], [1.0, 1.0], nan),
        "to nan": ([1.0, 1.0], [1.0, nan], nan),
        "zero to one": ([0.0, 0.0], [1.0, 1.0], inf),
        "inf and zero": ([-inf, 0.0], [-inf, 1.0], inf),
        "to inf": ([1.0, 1.0], [1.0, inf], inf),
        "next to inf": ([inf, 1.0], [inf, 9e9], 9e9),
        "half": ([2.0, 2.0], [1.0, 1.0], 0.5),
        "next to nan": ([nan, 3.0, 4.0], [nan, 3.0, 5.0], 0.2),
        "zeros": ([0.0, 0.0], [0.0, 0.0], 0.0),
        "nan and inf": ([nan, inf, 2.0], [nan, inf, 2.0], 0.0),
    }
    a, b = ({name: torch.tensor(case[i]) for name, case in cases.items()} for i in (0, 1))
    result = compare(tmp_path, a, b)
    assert [row.name for row in result.rows] == list(cases)
    for row, (x, y, relative_change) in zip(result.rows, cases.values(), strict=True):
        assert row.relative_change == pytest.approx(relative_change, nan_ok=True)
        equal = [u == v or (math.isnan(u) and math.isnan(v)) for u, v in zip(x, y, strict=True)]
        assert row.changed_count == equal.count(False)


def test_tensors_that_cannot_be_compared_are_named(backend, tmp_path):
    w = torch.ones(2)
    a = {"w": w, "tied": w, "gone": w + 1, "shape": torch.ones(3), "s": torch.eye(2).to_sparse()}
    b = {"tied": w.half() * 2, "new": w + 2, "shape": torch.ones(3, 1), "s": torch.eye(2)}
    result = compare(tmp_path, a, b)
    assert (only_row(result).name, only_row(result).relative_change) == ("tied", 1.0)
    assert (result.only_in_a, result.only_in_b) == (("gone",), ("new",))
    assert result.other_shape == {"shape": ((3,), (3, 1))} and list(result.skipped) == ["s"]
    assert str(result).splitlines()[3:] == [
        "only in a: gone",
        "only in b: new",
        "other shape: shape: [3] in a, [3, 1] in b",
        f"not read: s: {result.skipped['s']}",
        "other dtype: tied: float32 and float16",
        "model: 0 of 1 tensors unchanged, relative change of all 1",
    ]
    assert result.skipped["s"].endswith(" (in a)")
    content = json.loads(json.dumps(result.to_dict()))
    assert content["tensors"]["tied"]["shape"] == [2]
    assert content["other_shape"] == {"shape": [[3], [3, 1]]}


def test_tensor_tied_in_one_file_gives_a_row_per_name(tmp_path):
    w = torch.ones(2)
    result = compare(tmp_path, {"w": w, "tied": w}, {"w": w, "tied": w * 3})
    assert [(row.name, row.relative_change) for row in result.rows] == [("tied", 2.0), ("w", 0.0)]
    result = compare(tmp_path, {"w": w, "tied": w * 3}, {"w": w, "tied": w})
    assert [row.name for row in result.rows] == ["tied", "w"]


def test_views_are_compared_by_position(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 1 << 14)
    x = torch.randn(300, 200)
    y = x.clone()
    y[299, 199] += 1
    a = {"w": x.t(), "s": x[:, ::2]}
    b = {"w": y.t().contiguous(), "s": y[:, ::2]}
    rows = {row.name: row for row in compare(tmp_path, a, b).rows}
    assert rows["w"].changed_count == 1 and rows["s"].changed_count == 0
    assert rows["w"].change_norm == pytest.approx(1, rel=1e-6)


def part(starts, sizes):
    return contiguous_part("a", 0, sizes)._replace(starts=starts)


def grid(shape, rows, columns):
    """Return the parts of a matrix; the last ones may be smaller."""
    return tuple(
        part((r, c), (min(rows, shape[0] - r), min(columns, shape[1] - c)))
        for c in range(0, shape[1], columns)
        for r in range(0, shape[0], rows)
    )


@pytest.mark.parametrize("size_a", [(1, 40), (3, 7), (30, 40), (10, 1)])
@pytest.mark.parametrize("size_b", [(1, 40), (4, 5), (30, 40), (3, 1)])
def test_parts_that_share_elements_are_paired(size_a, size_b):
    shape = (30, 40)
    a, b = grid(shape, *size_a), (*grid(shape, *size_b), part((0, 40), (30, 0)))
    covered = torch.zeros(shape, dtype=torch.int64)
    for x, y in pairing.pair_parts(a, b):
        begin = list(map(max, x.starts, y.starts))
        end = [min(x.starts[d] + x.sizes[d], y.starts[d] + y.sizes[d]) for d in (0, 1)]
        if begin[0] < end[0] and begin[1] < end[1]:
            covered[begin[0] : end[0], begin[1] : end[1]] += 1
    assert (covered == 1).all()


def test_few_other_parts_are_paired():
    a, b = (grid((3000, 2), rows, 2) for rows in (1, 3))
    assert len(list(pairing.pair_parts(a, b))) < 4 * 3000


def test_include_exclude_and_progress(tmp_path):
    calls = []
    a = {name: torch.ones(9) for name in ("x.a", "x.b", "y.a")}
    result = compare(
        tmp_path, a, a, include="x", exclude="b", progress=lambda *call: calls.append(call)
    )
    assert only_row(result).name == "x.a" and calls[-1] == (72, 72)
    assert result.only_in_a == ()


@pytest.mark.parametrize("is_reversed", [False, True])
def test_prefix_of_all_names_is_removed(tmp_path, is_reversed):
    plain = {"0.w": torch.ones(4), "1.w": torch.ones(4) * 2, "new": torch.ones(1)}
    net = {"0.w": torch.ones(4) * 3, "1.w": torch.ones(4) * 6}
    wrapped = {"model": {"net": net}, "optimizer": {"v": torch.ones(9)}}
    result = compare(tmp_path, *((plain, wrapped) if is_reversed else (wrapped, plain)))
    assert len(result.rows) == 2
    for row in result.rows:
        assert row.relative_change == pytest.approx(2 if is_reversed else 2 / 3)
    names = {f"model.net.{name}": name for name in net}
    only_in = [("optimizer.v",), ("new",)]
    line = "renamed: a 'model.net.*' = b '*' (2 tensors)"
    if is_reversed:
        names = {y: x for x, y in names.items()}
        line = "renamed: a '*' = b 'model.net.*' (2 tensors)"
        only_in.reverse()
    assert [result.only_in_a, result.only_in_b] == only_in and result.mapped == names
    assert line in result.table().splitlines() and result.to_dict()["mapped"] == names


def test_table_fits_the_width_and_shortens_lists(tmp_path):
    name = "model.layers.0." + "x" * 90
    a = {name: torch.ones(1), **{f"x{i}": torch.ones(1) for i in range(30)}}
    result = compare(tmp_path, a, {name: torch.ones(1)})
    lines = result.table(width=100).splitlines()
    assert max(map(len, lines[:3])) <= 100 and "…" in lines[2]
    assert len(result.only_in_a) == 30 and result.table().count("only in a: ") == 11
    assert "\nonly in a: ... and 20 more\n" in result.table()
    assert "... and 1 more" in result.table(limit=0)


def test_files_without_a_common_name_print_what_each_has(tmp_path):
    text = str(compare(tmp_path, {"a": torch.ones(2)}, {"b": torch.ones(2)}))
    assert "only in a: a" in text and "only in b: b" in text and "no tensor was compared" in text


LONG = [
    f"model.language_model.layers.{i}.self_attn.{p}_proj.weight" for i in (1, 11) for p in "qkv"
]
EXPERTS = [f"{'x' * 30}.{i}.{'y' * 30}.{i * 7}.{'z' * 30}" for i in range(200)]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("names", [LONG, EXPERTS, [*LONG, "lm_head.weight"]])
def test_names_differ_at_every_width(width, names):
    a = {name: torch.ones(2) for name in names}
    lines = checkpoints.compare(a, a).table(width=width).splitlines()
    if lines[0].startswith("all names begin with "):
        prefix = lines.pop(0).rpartition(" ")[2]
        assert all(name.startswith(prefix) for name in names) and prefix.endswith(".")
    assert len({line.split()[0] for line in lines[2 : 2 + len(names)]}) == len(names)
    assert max(map(len, lines[: 2 + len(names)])) <= width
    assert "relative" in lines[0] and "changed" in lines[0]


def test_parts_of_files_are_compared(tmp_path):
    """The average is the model itself, as the training forgot to copy it."""
    sd = {"net.w": torch.ones(2), "net.b": torch.zeros(1)}
    ema = {"shadow": {name: x * 2 for name, x in sd.items()}, "decay": torch.tensor(0.9)}
    path = tmp_path / "last.ckpt"
    torch.save({"model": sd, "same": sd, "ema": ema, "b#c": {"w": torch.ones(1)}}, path)
    rows = compare_files(f"{path}#model", f"{path}#same").rows
    assert {row.name: row.changed_count for row in rows} == {"net.w": 0, "net.b": 0}
    result = compare_files(f"{path}#model", f"{path}#ema")
    assert result.mapped == {"net.w": "shadow.net.w", "net.b": "shadow.net.b"}
    result = compare_files(f"{path}#model.net", f"{path}#ema.shadow.net")
    assert {row.name: row.changed_count for row in result.rows} == {"w": 2, "b": 0}
    assert list(summarize_file(f"{path}#ema")) == ["shadow.net.w", "shadow.net.b", "decay"]
    assert list(summarize_file(f"{path}#ema.decay")) == ["ema.decay"]
    assert list(summarize_file(f"{path}#b#c")) == ["w"]
    assert list(summarize_file(f"{path}#ema", include="decay")) == ["decay"]
    with pytest.raises(CheckpointError, match=r"got 'mod'.*it has #model, #ema, #b#c"):
        summarize_file(f"{path}#mod")
    with pytest.raises(FileNotFoundError, match=r"gone\.pt#model"):
        summarize_file(tmp_path / "gone.pt#model")


def test_a_file_with_a_number_sign_in_its_name(tmp_path):
    for name in ("a#model", "a", "dir#1/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({"model": {name: torch.ones(1)}}, tmp_path / name)
    assert list(summarize_file(tmp_path / "a#model")) == ["model.a#model"]
    assert list(summarize_file(tmp_path / "a#model#model")) == ["a#model"]
    assert list(summarize_file(f"{tmp_path}/dir#1/a#model")) == ["dir#1/a"]


def grouped(groups):
    """Return a function that gives the tensors of a checkpoint their group and label by name."""

    def give(contents):
        tensors = []
        for tensor in contents.tensors:
            group, label = groups.get(tensor.name, ("model", ""))
            is_codes = "codes" in label
            tensors.append(tensor._replace(group=group, label=label, is_codes=is_codes))
        return contents._replace(tensors=tensors)

    return give


def test_groups_have_totals_and_codes_are_not_compared(tmp_path, monkeypatch):
    groups = {
        "o.same": ("optimizer", ""),
        "o.m": ("optimizer", ""),
        "q": ("other", "int4 codes: no scale found"),
        "r": ("other", "this rank's shard of [8]"),
    }
    list_tensors = comparing.list_tensors
    give = grouped(groups)
    monkeypatch.setattr(comparing, "list_tensors", lambda *args: give(list_tensors(*args)))
    a = {
        "w": [3.0, 0, 0],
        "v": [0.0, 4],
        "u": [9.0],
        "o.same": [1.0],
        "o.m": [1.0],
        "q": [3],
        "r": [1],
    }
    b = a | {"w": [3.0, 0, 1], "v": [2.0, 4], "o.m": [100.0], "q": [5]}
    a, b = ({name: torch.tensor(x) for name, x in c.items()} for c in (a, b))
    result = compare(tmp_path, a, b)
    groups = {row.name: row.group for row in result.rows}
    assert list(groups) == ["v", "w", "u", "o.m", "o.same", "r"]
    assert list(groups.values()) == [*["model"] * 3, *["optimizer"] * 2, "other"]
    model = result.groups["model"]
    assert (model.tensors, model.unchanged, model.count, model.changed_count) == (3, 1, 6, 2)
    assert model.relative_change == pytest.approx(math.sqrt((1 + 4) / (9 + 16 + 81)))
    assert (model.norm_a, model.change_norm) == pytest.approx((math.sqrt(106), math.sqrt(5)))
    assert list(result.groups) == ["model", "optimizer", "other"]
    assert result.groups["optimizer"].relative_change == pytest.approx(99 / math.sqrt(2))
    reason = "int4 codes: no scale found (in a); int4 codes: no scale found (in b)"
    assert result.skipped == {"q": f"not compared: {reason}"}
    lines = result.table().splitlines()
    assert f"not compared: q: {reason}" in lines
    assert "note: r: a: this rank's shard of [8]; b: this rank's shard of [8]" in lines
    assert "model: 1 of 3 tensors unchanged, relative change of all 0.2172" in lines
    assert json.loads(json.dumps(result.to_dict()))["groups"]["model"]["unchanged"] == 1
    unchanged = sort_changes(result.rows, "unchanged")
    assert [row.name for row in unchanged] == ["u", "o.same", "r", "v", "w", "o.m"]
    assert [row.name for row in sort_changes(result.rows, "-unchanged")][:3] == ["v", "w", "o.m"]


def test_parts_that_all_overlap_are_bounded():
    n = 1500
    rows = tuple(Part("a", 0, (1, n), (n, 1), (i, 0)) for i in range(n))
    columns = tuple(Part("b", 0, (n, 1), (n, 1), (0, i)) for i in range(n))
    with pytest.raises(CheckpointError, match="expected at most 2,097,152 pairs of parts"):
        collections.deque(pairing.pair_parts(rows, columns), maxlen=0)
    assert len(list(pairing.pair_parts(rows[:100], columns))) == 100 * n
