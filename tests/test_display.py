"""Summaries as tables: plain text, colored text and HTML."""

from __future__ import annotations

import io
import math
import re
import sys
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from paramstats import Summary, summarize
from paramstats._core import format as formats
from paramstats._display import ordered
from paramstats._display.tree import outline
from paramstats._summary import record_of

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def blocks() -> dict[str, torch.Tensor]:
    """Two blocks of eight parameters, which have a line of their own in the outline."""
    layers = ["0", *(f"1.{i}.{layer}" for i in range(2) for layer in "abcd"), "2"]
    source = {f"{layer}.{x}": torch.randn(5) for layer in layers for x in ("weight", "bias")}
    source["1.0.a.bias"].zero_()
    for x in source.values():
        x.requires_grad_()
        x.grad = torch.randn(5)
    return source


def test_table_has_a_line_per_tensor_and_aligned_columns(backend, model):
    model[2].bias.requires_grad_(False)
    model[2].bias.grad = None
    model[0].bias.grad = None
    lines = str(summarize(model)).splitlines()
    right = lines[0].index("grad.zero_fraction") + len("grad.zero_fraction")
    assert {len(line) for line in (lines[2], lines[4], lines[7])} == {right}
    assert lines[0].split()[:6] == ["parameter", "shape", "mean", "std", "norm", "zero_fraction"]
    assert [line.split()[0] for line in lines[2:6]] == list(summarize(model))
    assert "frozen" in lines[5] and "none" in lines[3] and lines[7].startswith("total")


def test_aliases_have_a_line_and_gradients_columns(backend, model):
    model[2].bias = model[0].bias  # tied
    lines = summarize(model).table(width=200).splitlines()
    assert lines[4].split() == ["=", "2.bias"] and "grad.norm" in lines[0]
    model.zero_grad()
    assert "grad" not in str(summarize(model))


def test_long_names_are_shortened_in_the_middle(backend, monkeypatch):
    summary = summarize({f"model.layers.{i}.{'x' * 80}.weight": torch.ones(2) for i in range(12)})
    lines = summary.table(width=110).splitlines()
    assert all(len(line) <= 110 for line in lines)
    assert lines[2].startswith("model.layers ")
    assert "…" in lines[3] and lines[3].startswith("  0.xxx") and ".weight" in lines[3]
    monkeypatch.delenv("COLUMNS", raising=False)
    assert f"11.{'x' * 80}.weight" in str(summary), "whole outside of a terminal"


def test_narrow_table_loses_columns_before_names(model):
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(12)]
    source = {name: torch.ones(512, 512, requires_grad=True) for name in names}
    for x in source.values():
        x.grad = torch.ones(512, 512)
    for width in (60, 80, 100):
        lines = summarize(source).table(width=width).splitlines()
        assert len(lines[0]) <= width and "grad.norm" in lines[0]
        assert len({line.split()[0] for line in lines[2:14]}) == 12, "names differ"
    note = " ".join(summarize(model).table(width=60).splitlines()[-2:])
    left_out = "grad.zero_fraction, grad.mean, zero_fraction, grad.std"
    assert note == f"left out, as the table is too wide: {left_out}"
    assert "left out" not in summarize(model).table(width=125)


# ---- the module tree


def test_a_block_has_a_line_with_its_merged_statistics(backend, blocks):
    lines = summarize(blocks).table().splitlines()
    labels = [line.split()[0] for line in lines[2:7]]
    assert labels == ["0.weight", "0.bias", "1.0", "a.weight", "a.bias"]
    assert lines[5].startswith("  a.weight") and lines[13].split()[0] == "1.1"
    block = [x for name, x in blocks.items() if name.startswith("1.0.")]
    values, grads = torch.cat(block).detach().double(), torch.cat([x.grad for x in block]).double()
    count, mean, std, norm, zero_fraction, *grad = lines[4].split()[1:]
    assert int(count) == values.numel() and zero_fraction == "12.5%"
    expected = [f(values) for f in (torch.mean, torch.std, torch.norm)]
    expected += [f(grads) for f in (torch.mean, torch.std, torch.norm)]
    for text, number in zip((mean, std, norm, *grad[:3]), expected, strict=True):
        assert float(text) == pytest.approx(number.item(), rel=1e-3)


def test_buffers_follow_the_parameters(backend):
    net = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(4)))
    labels = [line.split()[0] for line in summarize(net, buffers=True).table().splitlines()[2:-2]]
    assert labels == [name for name, _ in [*net.named_parameters(), *net.named_buffers()]]


def test_any_names_make_an_outline():
    hostile = ["a"] + [f"a.{i}" for i in range(9)] + ["", ".", "..", *(".x" * i for i in range(9))]
    deep = ["x." * i + f"w{j}" for i in range(2000) for j in range(8)]
    for names in (hostile, deep, []):
        nodes = [node for node in outline(names) if not node.is_block]
        assert [node.begin for node in nodes] == list(range(len(names)))
        assert max((node.depth for node in nodes), default=0) < 10


# ---- order, limit, kind


def names(table: str) -> list[str]:
    lines = table.splitlines()[2:]
    tensors = [line.split()[0] for line in lines if line[0].isalnum() and "advice" not in line]
    return tensors[:-1]


@pytest.mark.parametrize(
    ("sort_by", "expected"),
    [
        ("norm", ["nan", "inf", "large", "middle", "small", "meta"]),
        ("-norm", ["nan", "small", "middle", "large", "inf", "meta"]),
        ("grad.norm", ["middle", "small", "nan", "large", "meta", "inf"]),
        ("name", ["inf", "large", "meta", "middle", "nan", "small"]),
        ("nan_count", ["nan", "small", "large", "inf", "middle", "meta"]),
    ],
)
def test_rows_are_sorted_with_nan_first_and_unread_last(backend, sort_by, expected):
    source = {
        "small": torch.tensor([1.0, 1.0]),
        "nan": torch.tensor([math.nan, 1.0]),
        "large": torch.tensor([30.0, 40.0]),
        "meta": torch.empty(2, device="meta"),
        "inf": torch.tensor([math.inf, 1.0]),
        "middle": torch.tensor([3.0, 4.0], requires_grad=True),
    }
    source["middle"].grad = torch.tensor([0.5, 0.0])
    summary = summarize(source)
    assert names(summary.table(sort_by=sort_by)) == expected
    assert ordered(record_of(summary), sort_by) == expected
    assert ordered(record_of(summary), None) == list(source)


def test_the_statistic_to_sort_by_always_has_a_column(backend, model):
    summary = summarize(model)
    for sort_by in ("grad.abs_max", "grad_abs_max", "-grad.abs_max"):
        assert "grad.abs_max" in summary.table(width=40, sort_by=sort_by).splitlines()[0]
    assert "zero_fraction" in summary.table(width=40, sort_by="zero_fraction").splitlines()[0]
    assert summary.table(sort_by="count").splitlines()[2].split()[-1] == "48"


def test_limit(backend, model, blocks):
    lines = summarize(model).table(sort_by="norm", limit=1).splitlines()
    assert len(lines) == 6 and lines[3] == "... and 3 more" and lines[-1].startswith("total")
    assert "more" not in summarize(model).table(limit=4)
    assert names(summarize(model).table(limit=0)) == []
    whole, some = summarize(blocks).table(), summarize(blocks).table(limit=5)
    assert some.splitlines()[4].split() == whole.splitlines()[4].split(), "blocks stay complete"


def test_tables_of_one_kind(backend):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    net[1].running_mean += 1
    net(torch.randn(4, 3)).sum().backward()
    net[0].bias.grad = None
    summary = summarize(net, buffers=True)
    params, grads, buffers = (summary.table(kind=kind) for kind in ("param", "grad", "buffer"))
    for table, prefix in ((params, ""), (grads, "grad."), (buffers, "")):
        columns = [prefix + stat for stat in ("mean", "std", "norm", "min", "max", "zero_fraction")]
        assert table.splitlines()[0].split()[1:8] == ["shape", *columns]
    assert names(params) == names(grads) == list(dict(net.named_parameters()))
    assert names(buffers) == list(dict(net.named_buffers()))
    assert "none" in grads and "none" not in params
    (total,) = (line for line in grads.splitlines() if line.startswith("total"))
    assert total.split()[1] == str(summary.total.grad.count)
    assert total.split()[4] == formats.number(summary.total.grad.norm)
    assert buffers.splitlines()[-1].split()[:2] == ["total", "5"]
    by_norm = [summary.table(kind="grad", sort_by=stat) for stat in ("norm", "grad.norm")]
    assert by_norm[0] == by_norm[1]


def test_frozen_parameters_can_be_left_out(backend, blocks):
    for name, x in blocks.items():
        x.requires_grad_(name == "2.weight")
        if not name.startswith("2."):
            x.grad = None
    for name in ("0.weight", "2.weight"):
        blocks[name].data[0] = math.nan
    summary = summarize(blocks)
    assert names(summary.table(kind="grad")) == ["2.weight", "2.bias"], "both have a gradient"
    assert "... 18 frozen" in summary.table(kind="grad").splitlines()
    trainable = summary.table(trainable=True)
    assert names(trainable) == ["2.weight"] and "frozen" not in trainable
    (total,) = (line for line in trainable.splitlines() if line.startswith("total"))
    assert total.split()[1] == "5"
    assert "1 error, 2.weight: NaN" in trainable, "findings are those of the tensors shown"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sort_by": "size"}, "expected sort_by to be name or one of count, .* got 'size'"),
        ({"sort_by": "stddev"}, ".* got 'stddev'; did you mean 'std'"),
        ({"sort_by": "exp_avg.norm"}, ".* got 'exp_avg.norm'"),
        ({"sort_by": "update.step"}, ".* got 'update.step'"),
        ({"sort_by": 1}, "expected sort_by to be a str, got 1"),
        ({"kind": "grads"}, "expected kind to be 'param', 'grad', 'update', 'buffer' or None, got"),
        ({"limit": -1}, "expected limit to be a whole number of 0 or more, got -1"),
    ],
)
def test_invalid_arguments(model, arguments, words):
    with pytest.raises((ValueError, TypeError), match=f"^paramstats.table: {words}"):
        summarize(model).table(**arguments)


# ---- updates and the optimizer's state


@pytest.fixture
def stepped(backend, blocks) -> tuple[dict[str, torch.Tensor], Summary]:
    """Return the updates of the first step of AdamW in float64, and the summary after it."""
    blocks["0.bias"].requires_grad_(False)
    blocks["0.bias"].grad = None
    blocks["2.weight"].data[:2] = 1e9  # a change by 0.1 is lost in rounding
    trained = {name: x for name, x in blocks.items() if x.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0)
    grads = {name: x.grad.double() for name, x in trained.items()}
    optimizer.step()
    updates = {name: -0.1 * g / (g.abs() + 1e-8) for name, g in grads.items()}
    return updates, summarize(blocks, optimizer=optimizer)


def cell(table: str, name: str, heading: str) -> str:
    """Return the cell below a heading that occurs once; "" if there is none."""
    head, _, *lines = table.splitlines()
    end = head.index(heading) + len(heading)
    (line,) = (line for line in lines if line.split()[0] == name)
    return line[:end].split()[-1] if line[end - 1 : end].strip() else ""


def test_updates_have_columns(stepped, blocks):
    updates, summary = stepped
    table = summary.table()
    assert table.splitlines()[0].split()[10:12] == ["update_ratio", "update.zero_fraction"]
    for name, update in updates.items():
        ratio = (update.norm() / blocks[name].double().norm()).item()
        found = cell(summary.table(sort_by="name"), name, "update_ratio")
        assert float(found) == pytest.approx(ratio, rel=1e-3)
    assert cell(table, "0.weight", "update_ratio") == formats.number(
        summary["0.weight"].update_ratio
    )
    assert cell(table, "2.weight", "update.zero_fraction") == "40%"
    assert cell(table, "2.bias", "update.zero_fraction") == "0%"
    assert cell(table, "0.bias", "update_ratio") == "", "it is frozen"
    block = [name for name in updates if name.startswith("1.0.")]
    changes, params = torch.cat([updates[n] for n in block]), torch.cat([blocks[n] for n in block])
    ratio = (changes.norm() / params.double().norm()).item()
    assert float(cell(table, "1.0", "update_ratio")) == pytest.approx(ratio, rel=1e-3)
    total = math.sqrt(sum(x.square().sum().item() for x in updates.values()))
    norm = math.sqrt(sum(x.double().square().sum().item() for x in blocks.values()))
    assert float(cell(table, "total", "update_ratio")) == pytest.approx(total / norm, rel=1e-3)
    assert [cells(row)[-1] for row in html_rows(summary)][-1] == "2.1%", "2 of 95 elements"
    blocks["2.weight"].data[:2] = 1
    fewer = summarize(blocks, optimizer=torch.optim.SGD(blocks.values())).table()
    assert "update" not in fewer, "without an update"


def test_a_table_of_updates(stepped):
    updates, summary = stepped
    table = summary.table(kind="update")
    columns = ("mean", "std", "norm", "min", "max", "zero_fraction")
    headings = ["shape", *(f"update.{column}" for column in columns), "update_ratio"]
    assert table.splitlines()[0].split()[1:9] == headings
    assert "... 1 frozen" in table and "0.bias" not in table
    assert cell(table, "total", "shape") == str(sum(x.numel() for x in updates.values()))
    for name in ("0.weight", "2.weight"):
        for column, function in (("norm", torch.norm), ("max", torch.max), ("mean", torch.mean)):
            expected = function(updates[name]).item()
            assert float(cell(table, name, f"update.{column}")) == pytest.approx(expected, rel=1e-3)
    assert summary.table(kind="update", sort_by="norm") == summary.table(
        kind="update", sort_by="update.norm"
    )


@pytest.mark.parametrize(
    ("sort_by", "heading"),
    [
        ("update.norm", "update.norm"),
        ("update_norm", "update.norm"),
        ("update_ratio", "update_ratio"),
        ("-update_ratio", "update_ratio"),
        ("exp_avg.norm", "exp_avg.norm"),
        ("exp_avg_sq.max", "exp_avg_sq.max"),
        ("-exp_avg_sq_max", "exp_avg_sq.max"),
    ],
)
def test_rows_are_sorted_by_what_the_optimizer_knows(stepped, blocks, sort_by, heading):
    updates, summary = stepped
    values = {
        "update.norm": lambda n: updates[n].norm(),
        "update_ratio": lambda n: updates[n].norm() / blocks[n].double().norm(),
        "exp_avg.norm": lambda n: 0.1 * blocks[n].grad.double().norm(),
        "exp_avg_sq.max": lambda n: 0.001 * blocks[n].grad.double().square().max(),
    }
    value = values[heading]
    found = summary.table(sort_by=sort_by)
    expected = sorted(updates, key=value, reverse=not sort_by.startswith("-"))
    assert names(found)[-1] == "0.bias", "it has none"
    if heading != "update.norm":  # all are 0.1 sqrt(5) up to rounding
        assert names(found)[:-1] == expected
    for name in expected:
        assert float(cell(found, name, heading)) == pytest.approx(value(name).item(), rel=1e-3)
    narrow = summary.table(width=50, sort_by=sort_by)
    assert heading in narrow.splitlines()[0] and "left out" in narrow


# ---- findings and colors


@pytest.fixture
def sick(model):
    model[2].weight.data[0, 0] = math.nan
    model[0].weight.grad = None
    return summarize(model)


def test_findings_are_shown_next_to_their_tensor(backend, sick):
    lines = sick.table().splitlines()
    assert lines[0].endswith("findings")
    assert lines[2].endswith("! no gradient") and lines[4].endswith("! NaN or Inf in parameter")
    assert lines[-1] == (
        "1 error and 1 warning, first: 2.weight: NaN or Inf in parameter; "
        "for advice, call summary.findings()"
    )
    grads = sick.table(kind="grad")
    assert "NaN or Inf" not in grads and "! no gradient" in grads
    healthy = summarize({"w": torch.randn(4, 4)}).table()
    assert "!" not in healthy and healthy.splitlines()[-1].startswith("total")


def test_notes_of_sharded_models(model):
    record = record_of(summarize(model))
    record = record._replace(
        is_local=True, diverged={"0.bias": "ranks 0 and 1", "2.bias": "rank 2"}
    )
    lines = Summary(record).table().splitlines()
    assert "statistics of this rank's part only" in lines
    assert "replicas differ: 0.bias (and 1 more): ranks 0 and 1" in lines


def test_colors_are_for_terminals(backend, sick, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not ESCAPES.search(str(sick))
    monkeypatch.setattr(sys, "stdout", Terminal())
    colored = str(sick)
    assert "\x1b[1;31m2.weight" in colored and "\x1b[33m0.weight" in colored
    assert ESCAPES.sub("", colored) == sick.table() == ESCAPES.sub("", sick.table(color=True))
    assert not ESCAPES.search(sick.table())
    monkeypatch.setenv("NO_COLOR", "1")
    assert str(sick) == sick.table()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert str(sick) == sick.table(), "plain without rich"
    with pytest.raises(ImportError, match="pip install rich"):
        sick.table(color=True)


def test_rich_prints_a_summary(sick):
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=60)
    console.print(sick)
    printed, lines = console.file.getvalue(), sick.table(width=60).splitlines()
    assert printed.splitlines()[: len(lines) - 1] == lines[:-1]
    assert " ".join(printed.split()).endswith(lines[-1]), "a long note wraps"


# ---- HTML


def html_rows(summary: Summary) -> list[ElementTree.Element]:
    """Return the rows of the HTML table. Fails if the HTML is not well-formed."""
    html = summary._repr_html_().replace("<wbr>", "")
    return list(ElementTree.fromstring(f"<body>{html}</body>").iter("tr"))  # noqa: S314


def cells(row: ElementTree.Element) -> list[str]:
    return ["".join(cell.itertext()) for cell in row]


def test_html_has_the_same_cells_as_the_text(backend, blocks):
    summary = summarize(blocks)
    rows = html_rows(summary)
    text = [line.split("  ") for line in summary.table().splitlines() if "─" not in line]
    assert [[cell for cell in cells(row) if cell] for row in rows] == [
        [cell.strip() for cell in line if cell.strip()] for line in text
    ]
    classes = [row.get("class") for row in rows]
    assert classes.count("block") == 2 and classes[-1] == "total"
    assert rows[4][0].get("title") == "1.0.a.weight"


def test_html_shows_findings_in_the_second_column(sick):
    head, *rows = html_rows(sick)
    classes = [row.get("class") for row in rows]
    assert classes == ["tensor warning", "tensor", "tensor error", "tensor", "total"]
    assert [cells(row)[1] for row in (head, rows[2])] == ["findings", "NaN or Inf in parameter"]
    assert "No layer before" in rows[0][1].get("title")


def test_html_is_escaped_and_has_at_most_a_thousand_tensors():
    html = summarize({"<script>": torch.ones(2)})._repr_html_()
    assert "&lt;script&gt;" in html and "<script>" not in html
    html = summarize({f"w{i}": torch.ones(1) for i in range(1200)})._repr_html_()
    assert html.count("<tr") == 1003 and "... and 200 more" in html


# ---- unusual standard outputs


def test_standard_output_may_lack_isatty(sick, monkeypatch):
    expected = str(sick)
    for stdout in (object(), None):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            printed = str(sick)
        assert printed == expected


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_table_prints_with_any_encoding(encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    summary = summarize({"h\u6f22.w": torch.ones(2), "a\nb": torch.ones(2)})
    table = str(summary)
    assert "h\\u6f22.w" in table and "a\\nb" in table
    print(table, summary.table(width=40))
    sys.stdout.flush()


@pytest.mark.parametrize(("columns", "bars"), [("", 32), ("60", 31), ("10", 8)])
def test_one_tensor_has_lines_for_what_was_read_of_it(backend, monkeypatch, columns, bars):
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    w = torch.randn(64, 32) * torch.logspace(-30, 30, 32)
    w[5:45], w[60], w[0, 0] = 0, w[50], math.nan
    w.requires_grad_().grad = torch.ones(64, 32)
    w.grad[[3, 7, 8]] = 0
    first, *lines = repr(summarize({"w": w}, distribution=True, rows=True)["w"]).splitlines()
    assert first.startswith("<w: float32 [64, 32] n=2,048 mean=nan ") and "grad(mean=" in first
    labels = [line.partition(":")[0].strip() for line in lines]
    assert labels == [f"{of}{what}" for of in ("", "grad ") for what in (
        "histogram", "zero rows", "rows")]  # fmt: skip
    # As many exponents in each bar as are necessary, so that there may be fewer bars.
    begin, sparkline, end = re.fullmatch(r"  histogram: (2\^\S+) (.+) (2\^\S+)", lines[0]).groups()
    assert bars / 2 < len(sparkline) <= bars and int(begin[2:]) < -99 and int(end[2:]) > 99
    assert len(lines[0]) <= int(columns or 100) or bars == 8
    assert lines[1] == "  zero rows: 40 (index 5-44)"
    assert lines[2].startswith("  rows: 64 rows of 32 elements, norm 0 to ")
    assert lines[2].endswith(", 40 dead, 2 equal to another one, 1 with NaN or Inf")
    assert lines[3:] == [
        "  grad histogram: 2^0 \N{FULL BLOCK} 2^0",
        f"  grad zero rows: 3 (index 3{', 7-8' if columns != '10' else ', ...'})",
        "  grad rows: 64 rows of 32 elements, norm 0 to 5.657, 3 dead, 61 equal to another one>",
    ]


def test_lines_of_tensors_without_finite_elements(backend):
    x = torch.full((3, 2), math.nan)
    tensors = {"nan": x, "empty": x[:0], "zeros": torch.zeros(3, 2), "ones": torch.ones(2, 2)}
    summary = summarize(tensors, distribution=True, rows=True)
    assert repr(summary["nan"]).splitlines()[1:] == [
        "  histogram: no finite nonzero element",
        "  rows: 3 rows of 2 elements, 3 equal to another one, 3 with NaN or Inf>",
    ]
    assert repr(summary["empty"]) == "<empty: float32 [0, 2] n=0 empty>"
    assert repr(summary["zeros"]) == "<zeros: float32 [3, 2] n=6 all zeros>"
    assert repr(summary.total).splitlines()[1] == "  histogram: 2^0 \N{FULL BLOCK} 2^0>"


def test_zero_rows_have_a_line_without_being_asked_for(backend):
    x = torch.ones(6, 2)
    x[::2] = 0
    assert repr(summarize({"x": x})["x"]).splitlines()[1:] == ["  zero rows: 3 (index 0, 2, 4)>"]
