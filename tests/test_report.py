"""Summaries as tables: text, colour, HTML."""

from __future__ import annotations

import io
import math
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from paramstats import summarize
from paramstats._display import tree

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class Block(nn.Module):
    """Eight parameters, so a block of the outline."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(torch.relu(self.first(self.norm(x))) * self.second(x))


@pytest.fixture
def blocks() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Block(), Block()), nn.Linear(4, 2))
    net(torch.randn(3, 4)).square().mean().backward()
    return net


def test_table(backend, model):
    model[2].bias.requires_grad_(False)
    model[2].bias.grad = None
    model[0].bias.grad = None
    lines = str(summarize(model)).splitlines()
    right = lines[0].index("grad zeros") + len("grad zeros")
    assert {len(line) for line in (lines[0], lines[2], lines[4], lines[7])} == {right}, "aligned"
    assert lines[0].split()[:6] == ["parameter", "shape", "mean", "std", "norm", "zeros"]
    assert [line.split()[0] for line in lines[2:6]] == list(summarize(model))
    assert "frozen" in lines[5] and "none" in lines[3] and lines[7].startswith("total")


def test_aliases_and_gradients_in_the_table(backend, model):
    model[2].bias = model[0].bias  # tied
    lines = summarize(model).table(width=200).splitlines()
    assert lines[4].split() == ["=", "2.bias"] and "grad norm" in lines[0]
    model.zero_grad()
    assert "grad" not in str(summarize(model))


def test_long_names_are_elided_in_the_middle(backend):
    summary = summarize({f"model.layers.{i}.{'x' * 80}.weight": torch.ones(2) for i in range(12)})
    lines = summary.table(width=110).splitlines()
    assert all(len(line) <= 110 for line in lines)
    assert lines[2].startswith("model.layers ")
    assert "…" in lines[3] and lines[3].startswith("  0.xxx") and ".weight" in lines[3]


def test_a_narrow_terminal_loses_columns_before_names(backend, model):
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(12)]
    source = {name: torch.ones(512, 512, requires_grad=True) for name in names}
    for x in source.values():
        x.grad = torch.ones(512, 512)
    for width in (60, 80, 100):
        lines = summarize(source).table(width=width).splitlines()
        assert len(lines[0]) <= width and "grad norm" in lines[0]
        assert len({line.split()[0] for line in lines[2:14]}) == 12, "names differ"


def test_columns_without_room_are_named(backend, model):
    note = summarize(model).table(60).splitlines()[-1]
    assert note == "no room for grad mean, mean, grad zeros, zeros"
    assert "no room" not in summarize(model).table(120)


def test_outside_a_terminal_names_are_whole(backend, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    name = "x" * 300
    assert name in str(summarize({name: torch.ones(2)}))


def test_a_table_prints_on_any_output(backend, model, monkeypatch):
    import io
    import sys

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    summarize(model).table(width=40).encode("ascii")
    assert "a\\nb" in str(summarize({"a\nb": torch.ones(2)}))


def test_html_escapes_names(backend):
    html = summarize({"<script>": torch.ones(2)})._repr_html_()
    assert "&lt;script&gt;" in html and "<script>" not in html


# ---- the module tree


def test_blocks_have_a_line_with_their_figures_as_one(backend, blocks):
    lines = summarize(blocks).table().splitlines()
    assert [line.split()[0] for line in lines[2:7]] == [
        "0.weight",
        "0.bias",
        "1.0",
        "norm.weight",
        "norm.bias",
    ]
    assert lines[5].startswith("  norm.weight") and lines[13].split()[0] == "1.1"
    block = blocks[1][0]
    together = torch.cat([p.detach().flatten() for p in block.parameters()]).double()
    grads = torch.cat([p.grad.flatten() for p in block.parameters()]).double()
    count, mean, std, norm, zeros, *grad = lines[4].split()[1:]
    assert int(count) == together.numel() and zeros == "5.9%"  # the 4 zeros of norm.bias
    for text, expected in (
        (mean, together.mean()), (std, together.std()), (norm, together.norm()),
        (grad[0], grads.mean()), (grad[1], grads.std()), (grad[2], grads.norm()),
    ):  # fmt: skip
        assert float(text) == pytest.approx(expected.item(), rel=1e-3)


def test_buffers_follow_in_an_outline_of_their_own(backend):
    net = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(4)))
    labels = [line.split()[0] for line in summarize(net, buffers=True).table().splitlines()[2:-2]]
    assert labels[:8] == [name for name, _ in net.named_parameters()]
    assert len(labels) == 20 and labels[8:] == [name for name, _ in net.named_buffers()]


def test_names_of_any_kind_make_an_outline():
    hostile = ["a"] + [f"a.{i}" for i in range(9)] + ["", ".", "..", *(".x" * i for i in range(9))]
    nodes = [node for node in tree.outline(hostile) if not node.is_block]
    assert [node.begin for node in nodes] == list(range(len(hostile)))
    deep = ["x." * i + f"w{j}" for i in range(2000) for j in range(8)]
    nodes = [node for node in tree.outline(deep) if not node.is_block]
    assert [node.begin for node in nodes] == list(range(len(deep)))
    assert max(node.depth for node in nodes) < 10
    assert tree.outline([]) == []


# ---- order, limit, kind


def names(table: str) -> list[str]:
    lines = table.splitlines()[2:]
    own = [line.split()[0] for line in lines if line[0].isalnum() and "advice:" not in line]
    return own[:-1]


@pytest.fixture
def odd() -> dict[str, torch.Tensor]:
    """One tensor of each kind that an order must place."""
    source = {
        "small": torch.tensor([1.0, 1.0]),
        "sick": torch.tensor([math.nan, 1.0]),
        "large": torch.tensor([30.0, 40.0]),
        "meta": torch.empty(2, device="meta"),
        "endless": torch.tensor([math.inf, 1.0]),
        "middle": torch.tensor([3.0, 4.0], requires_grad=True),
    }
    source["middle"].grad = torch.tensor([0.5, 0.0])
    return source


@pytest.mark.parametrize(
    ("sort_by", "expected"),
    [
        ("norm", ["sick", "endless", "large", "middle", "small", "meta"]),
        ("-norm", ["sick", "small", "middle", "large", "endless", "meta"]),
        ("grad.norm", ["middle", "small", "sick", "large", "meta", "endless"]),
        ("name", ["endless", "large", "meta", "middle", "sick", "small"]),
        ("nan_count", ["sick", "small", "large", "endless", "middle", "meta"]),
    ],
)
def test_sorted(backend, odd, sort_by, expected):
    assert names(summarize(odd).table(sort_by=sort_by)) == expected


def test_what_is_sorted_by_has_a_column(backend, model):
    summary = summarize(model)
    assert "grad abs_max" in summary.table(sort_by="grad.abs_max").splitlines()[0]
    assert "grad abs_max" in summary.table(40, sort_by="grad_abs_max").splitlines()[0]
    assert summary.table(sort_by="zeros") == summary.table(sort_by="zero_fraction")


def test_limit(backend, model, blocks):
    lines = summarize(model).table(sort_by="norm", limit=1).splitlines()
    assert len(lines) == 6 and lines[3] == "... and 3 more" and lines[-1].startswith("total")
    assert "more" not in summarize(model).table(limit=4)
    assert names(summarize(model).table(limit=0)) == []
    whole, some = summarize(blocks).table(), summarize(blocks).table(limit=5)
    assert some.splitlines()[4].split() == whole.splitlines()[4].split(), (
        "a block is the whole block"
    )


def test_one_kind(backend):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    net[1].running_mean += 1
    net[0].bias.requires_grad_(False)
    net(torch.randn(4, 3)).sum().backward()
    summary = summarize(net, buffers=True)
    params, grads, buffers = (summary.table(kind=kind) for kind in ("param", "grad", "buffer"))
    for table in (params, grads, buffers):
        head = table.splitlines()[0].split()
        assert head == ["parameter", "shape", "mean", "std", "norm", "min", "max", "zeros"]
    assert names(params) == names(grads) == list(dict(net.named_parameters()))
    assert names(buffers) == list(dict(net.named_buffers()))
    assert "frozen" in grads and "frozen" not in params
    (total,) = (line for line in grads.splitlines() if line.startswith("total"))
    assert total.split()[4] == f"{summary.total.grad.norm:.4g}"
    assert summary.table(kind="grad", sort_by="norm") == summary.table(
        kind="grad", sort_by="grad.norm"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sort_by": "size"}, "expected sort_by to be name or one of count, .* got 'size'"),
        ({"kind": "grads"}, "expected kind to be 'param', 'grad', 'buffer' or None, got 'grads'"),
        ({"limit": -1}, "expected limit to be 0 or more, got -1"),
    ],
)
def test_what_cannot_be_is_said(backend, model, arguments, words):
    with pytest.raises(ValueError, match=f"^paramstats.table: {words}"):
        summarize(model).table(**arguments)


# ---- what is odd


@pytest.fixture
def sick(model):
    model[0].weight.data[0, 0] = math.nan
    model[2].weight.grad = None
    return summarize(model)


def test_what_is_odd_stands_beside_its_tensor(backend, model, sick):
    lines = sick.table().splitlines()
    assert lines[2].endswith("! NaN or Inf in parameter") and lines[4].endswith("! no gradient")
    assert lines[-1] == (
        "1 error and 1 warning, first 0.weight: NaN or Inf in parameter; advice: summary.findings()"
    )
    grads = sick.table(kind="grad")
    assert "NaN or Inf" not in grads and "! no gradient" in grads
    healthy = summarize({"w": torch.randn(4, 4)})
    assert "!" not in healthy.table() and healthy.table().splitlines()[-1].startswith("total")


def test_colour_is_for_terminals(backend, sick, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not ESCAPES.search(str(sick))
    monkeypatch.setattr(sys, "stdout", Terminal())
    colored = str(sick)
    assert "\x1b[1;31m0.weight" in colored and "\x1b[33m2.weight" in colored
    assert ESCAPES.sub("", colored) == sick.table() == ESCAPES.sub("", sick.table(color=True))
    assert not ESCAPES.search(sick.table())
    monkeypatch.setenv("NO_COLOR", "1")
    assert str(sick) == sick.table()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert str(sick) == sick.table(), "without rich it is plain"
    with pytest.raises(ImportError, match=r"pip install rich"):
        sick.table(color=True)


def test_rich_prints_it(backend, sick):
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=60)
    console.print(sick)
    printed, lines = console.file.getvalue(), sick.table(60).splitlines()
    assert printed.splitlines()[: len(lines) - 1] == lines[:-1]
    assert " ".join(printed.split()).endswith(lines[-1]), "a long note wraps"


# ---- HTML


class Rows(HTMLParser):
    """The cells of a table's rows, and that all tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.classes: list[str | None] = []
        self.titles: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.classes.append(dict(attributes).get("class"))
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.titles.append(dict(attributes).get("title") or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def test_html_has_the_same_cells(backend, blocks):
    summary = summarize(blocks)
    html = Rows(summary._repr_html_())
    text = [line.split("  ") for line in summary.table().splitlines() if "─" not in line]
    assert [[cell for cell in row if cell] for row in html.rows] == [
        [cell.strip() for cell in line if cell.strip()] for line in text
    ]
    assert html.classes.count("block") == 2 and html.classes[-1] == "total"
    assert "1.0.norm.weight" in html.titles


def test_html_marks_what_is_odd(backend, sick):
    html = Rows(sick._repr_html_())
    assert html.classes[1:] == ["tensor error", "tensor", "tensor warning", "tensor", "total"]
    assert any("It took no part in the loss" in title for title in html.titles)


def test_html_of_a_large_model_is_cut(backend):
    html = summarize({f"w{i}": torch.ones(1) for i in range(1200)})._repr_html_()
    assert html.count("<tr") == 1003 and "... and 200 more" in html


# ---- odd outputs


def test_what_stands_in_for_standard_output_need_not_know_of_terminals(backend, sick, monkeypatch):
    class Tee:
        def write(self, text: str) -> int:
            return len(text)

    expected = str(sick)
    monkeypatch.setattr(sys, "stdout", Tee())
    assert str(sick) == expected
    monkeypatch.setattr(sys, "stdout", None)
    assert str(sick) == expected


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_names_that_standard_output_lacks(backend, encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    table = str(summarize({"h\u6f22.w": torch.ones(2)}))
    assert "h\\u6f22.w" in table
    print(table)
