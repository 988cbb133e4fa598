"""What the pictures show, and that their labels can be read."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import paramstats
from paramstats import History

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from paramstats._history import heatmap, labels, plotting, states
from paramstats._stats import STATS

summarize = paramstats.summarize


def made(names, steps=range(6), gradient=lambda name, step: 1.0 + step) -> History:
    """A history in which the gradient of each is a constant; None: no gradient."""
    history = History()
    for step in steps:
        source = {}
        for name in names:
            source[name] = torch.ones(4, requires_grad=True)
            value = gradient(name, step)
            if value is not None:
                source[name].grad = torch.full((4,), value)
        history.append(step, summarize(source))
    return history


def blocks(count: int) -> list[str]:
    """Names as a transformer has them."""
    kinds = ("ln.weight", "attn.qkv.weight", "attn.qkv.bias", "mlp.up.weight", "mlp.down.weight")
    return [f"model.layers.{i}.{kind}" for i in range(-(-count // 5)) for kind in kinds][:count]


def drawn(figure: Figure) -> np.ndarray:
    """The picture's pixels, rows from the top."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def assert_apart_and_inside(figure: Figure, labels) -> None:
    boxes = [Text.get_window_extent(label) for label in labels]  # without an annotation's arrow
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), (a, b)
    width, height = figure.canvas.get_width_height()
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


def end_labels(figure: Figure):
    return [text for text in figure.axes[0].texts if text.get_text()]


# ---- lines


def test_lines_have_the_histories_figures():
    history = made(["a", "b"], steps=(0, 1, 10), gradient=lambda n, s: 1.0 + s * (n == "a"))
    (ax,) = history.plot().axes
    a, b = ax.lines
    assert a.get_label() == "a" and a.get_xdata().tolist() == [0, 1, 10], "true positions"
    assert a.get_ydata() == pytest.approx(history["a"].grad.norm)
    assert b.get_ydata() == pytest.approx([2, 2, 2])
    assert ax.get_title(loc="left") == "gradient L2 norm" and ax.get_xlabel() == "step"
    (ax,) = history.plot("a", "mean", "param").axes
    assert ax.get_title(loc="left") == "parameter mean"
    assert ax.lines[0].get_ydata().tolist() == [1, 1, 1]
    (ax,) = history.plot("a", stat="min_update_ratio").axes
    assert ax.lines[0].get_ydata() == pytest.approx([math.nan, 0, 0], nan_ok=True)


def test_which_lines():
    history = made(blocks(10))

    def drawn_lines(names):
        return [line.get_label() for line in history.plot(names).axes[0].lines]

    assert drawn_lines("model.layers.1.ln.weight") == ["model.layers.1.ln.weight"]
    assert drawn_lines(r"ln\.") == ["model.layers.0.ln.weight", "model.layers.1.ln.weight"]
    assert (
        drawn_lines(["total", r"1\.mlp"])[-1] == "total"
        and len(drawn_lines(["total", r"1\.mlp"])) == 3
    )
    assert len(drawn_lines(None)) == 10
    assert made(["total", "w"]).plot("total").axes[0].lines[0].get_label() == "total"


def test_from_eleven_on_the_whole_model_is_a_heat_map():
    assert len(made(blocks(10)).plot().axes[0].collections) == 0
    assert len(made(blocks(11)).plot().axes[0].collections) == 2


def test_from_twenty_one_on_what_was_chosen_is_a_heat_map():
    assert len(made(blocks(30)).plot("layers.[0-3]").axes[0].lines) == 20
    ax = made(blocks(30)).plot(["layers.[0-3]", "layers.4.ln", "total"]).axes[0]
    assert ax.collections[0].get_array().shape == (21, 6)


@pytest.mark.parametrize("names", [3, [3], ["w", None]])
def test_what_are_no_names(names):
    with pytest.raises(TypeError, match=r"^paramstats.History.plot: expected names.*got (3|None)$"):
        made(["w"]).plot(names)


@pytest.mark.parametrize(
    ("stat", "last", "scale"),
    [("norm", 100, "log"), ("norm", 3, "linear"), ("mean", 100, "linear"), ("std", 100, "linear")],
)
def test_scales(stat, last, scale):
    history = made(["w"], gradient=lambda _, step: 1.0 + last * (step == 5))
    assert history.plot(stat=stat).axes[0].get_yscale() == scale


def test_nan_is_marked_where_it_was():
    bad = {("w", 3): math.nan, ("w", 4): -math.inf}
    history = made(["w", "v"], gradient=lambda n, s: bad.get((n, s), 1.0))
    ax = history.plot().axes[0]
    w, _, mark = ax.lines
    assert np.isnan(w.get_ydata()).tolist() == [False] * 3 + [True] * 2 + [False]
    assert mark.get_xdata().tolist() == [3, 4] and mark.get_color() == plotting.BAD
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["NaN or Inf"]


@pytest.mark.parametrize("count", [1, 5, 50, 500])
def test_lines_labels_are_apart(count):
    history = made(blocks(count), gradient=lambda n, s: 1.0 + 1e-3 * s + (n < "model.layers.2"))
    figure = plotting.lines(history, history.names, "norm", "grad", None)
    drawn(figure)
    ends = end_labels(figure)
    assert len(ends) == min(count, 50) or (count == 500 and 40 <= len(ends) <= 60)
    assert_apart_and_inside(figure, ends)
    some = figure.axes[0].get_title(loc="left")
    assert some == "gradient L2 norm" + f" ({len(ends)} of 500 labelled)" * (count == 500)
    lines = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert all(np.all(lines[text.get_text()] == text.get_color()) for text in ends)


def test_labels_stand_in_the_order_of_the_lines_ends():
    history = made([f"p{i}" for i in range(8)], gradient=lambda n, s: 1.0 + s * int(n[1:]) / 9)
    figure = history.plot()
    drawn(figure)
    heights = {text.get_text(): text.get_window_extent().y0 for text in end_labels(figure)}
    assert sorted(heights, key=heights.__getitem__) == [f"p{i}" for i in range(8)]


def test_labels_differ_as_names_do():
    deep = "base_model.model.encoder.layer"
    names = [f"{deep}.{i}.attention.self.query.weight" for i in range(12)]
    assert labels.shown(names) == [f"…{i}.attention.self.query.weight" for i in range(12)]
    apart = ["x" * 40 + str(i) + "y" * 40 for i in range(3)]
    assert len(set(labels.shown(apart))) == 3
    assert labels.shown(["a.b", "a.c"]) == ["a.b", "a.c"], "short ones stay whole"
    assert labels.shown([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_spread(wanted):
    wanted = sorted(wanted)
    places = labels.spread(wanted, 0.05, 0.025, 0.975)
    assert all(b - a >= 0.05 - 1e-9 for a, b in itertools.pairwise(places))
    assert min(places) >= 0.025 - 1e-9 and max(places) <= 0.975 + 1e-9
    apart = all(b - a >= 0.05 for a, b in itertools.pairwise(wanted))
    if apart and wanted[0] >= 0.025 and wanted[-1] <= 0.975:
        assert places == pytest.approx(wanted)


# ---- heat maps


def test_cells_have_the_histories_figures():
    names = blocks(12)
    history = made(names, gradient=lambda n, s: 1.0 + s + names.index(n))
    ax = history.heatmap().axes[0]
    cells, special = ax.collections
    expected = np.array([history[name].grad.norm for name in names])
    assert cells.get_array().data == pytest.approx(expected) and special.get_array().mask.all()
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    assert ax.yaxis_inverted() and ax.get_title(loc="left") == "gradient L2 norm"
    some = history.heatmap("mean", "param", names=r"\.2\.").axes[0]
    assert some.collections[0].get_array().data == pytest.approx(np.ones((2, 6)))
    assert some.get_title(loc="left") == "parameter mean, magnitude"


@pytest.mark.parametrize("kind", ["grad", "param"])
def test_cells_are_the_summaries_figures_to_the_last_bit(backend, kind):
    torch.manual_seed(0)
    special = (math.nan, math.inf, -math.inf, 0.0)
    history = History()
    for step in range(40):
        source = {}
        for i, name in enumerate(blocks(12 - step % 3)):
            x = torch.randn((i % 5) * (1 + step // 20))  # some empty, some of one element
            for at in range(min(len(x), (i + step) % 4)):
                x[at] = special[(i + step + at) % 4]
            if (i + step) % 7 == 0 and len(x):
                x[:] = special[step % 4]
            source[name] = x.clone().requires_grad_()
            source[name].grad = x * 3 if (i + step) % 5 else None
        source["meta"] = torch.empty(3, device="meta")
        source["lazy"] = torch.nn.LazyLinear(2).weight
        summary = summarize(source, correction=step % 2, grad_scale=(1.0, 3.0)[step % 2])
        history.append(step, summary)
    names = [*history.names]
    found = states.States([summary for _, summary in history], names, kind)
    for stat in STATS:
        expected = np.full((len(names), len(history)), math.nan)
        for column, (_, summary) in enumerate(history):
            for row, name in enumerate(names):
                entry = summary.get(name)
                statistics = entry if kind == "param" else entry and entry.grad
                if statistics is not None and not math.isnan(statistics._state.mean):
                    expected[row, column] = getattr(statistics, stat)
        np.testing.assert_array_equal(found.statistics(stat), expected, stat)
    if kind == "param":
        expected = np.array([history[name].min_update_ratio for name in names])
        np.testing.assert_array_equal(found.min_update_ratio(), expected)
        assert (expected > 0).any()
        expected = np.array([history[name].nonfinite_count > 0 for name in names])
        np.testing.assert_array_equal(found.has_nonfinite, expected)


def test_columns_stand_at_their_steps():
    corners = made(["w"], steps=(0, 2, 10, 100)).heatmap().axes[0].collections[0].get_coordinates()
    assert corners[0, :, 0].tolist() == [-1, 1, 6, 55, 145]
    corners = made(["w"], steps=(7,)).heatmap().axes[0].collections[0].get_coordinates()
    assert corners[0, :, 0].tolist() == [6.5, 7.5]


def test_special_cells_have_colours_of_their_own():
    special = {("b", 1): math.nan, ("b", 2): 0.0, ("b", 3): None, ("c", 2): math.inf}
    history = made(["a", "b", "c"], gradient=lambda n, s: special.get((n, s), 1.0 + s))
    figure = history.heatmap()
    pixels, ax = drawn(figure), figure.axes[0]

    def colour(name, step):
        x, y = ax.transData.transform((step, "abc".index(name) + 0.5))
        return tuple(pixels[len(pixels) - 1 - int(y), int(x)])

    grey, white = heatmap._COLOURS[1], heatmap._COLOURS[0]
    assert colour("b", 1) == pytest.approx(to_rgb(plotting.BAD), abs=0.01)
    assert colour("c", 2) == colour("b", 1)
    assert colour("b", 2) == pytest.approx(to_rgb(grey), abs=0.01)
    assert colour("b", 3) == pytest.approx(to_rgb(white), abs=0.01)
    assert colour("b", 0) == colour("a", 0) != colour("a", 5)
    meanings = [text.get_text() for text in ax.get_legend().get_texts()]
    assert meanings == ["no gradient", "zero", "NaN or Inf"]
    above, beside = ax.lines
    assert above.get_xdata().tolist() == [1, 2] and beside.get_ydata().tolist() == [1.5, 2.5]
    assert made(["a"]).heatmap().axes[0].get_legend() is None


def test_colours_differ_in_lightness_too():
    def lightness(colour):
        return np.dot(to_rgb(colour), (0.21, 0.72, 0.07))

    lights = sorted(lightness(colour) for colour in heatmap._COLOURS)
    assert min(np.diff(lights)) > 0.15


@pytest.mark.parametrize("count", [1, 5, 50, 500])
@pytest.mark.parametrize("has_modules", [True, False])
def test_heat_map_labels_are_apart(count, has_modules):
    names = blocks(count) if has_modules else [f"parameter_{i}" for i in range(count)]
    figure = made(names, steps=range(3)).heatmap()
    drawn(figure)
    ax = figure.axes[0]
    assert_apart_and_inside(figure, ax.get_yticklabels())
    texts = [label.get_text() for label in ax.get_yticklabels()]
    if count < 50:
        assert texts == names
    elif has_modules and count == 500:
        assert texts == [f"model.layers.{i}" for i in range(0, 100, 2)]
    assert len(texts) >= min(count, 20) and figure.get_size_inches()[0] == plotting.WIDTH
    assert figure.get_size_inches()[1] <= 8.5


def test_blocks_are_as_deep_as_there_is_room_for():
    names = [*blocks(20), "head.weight"]
    assert [name for _, _, name in heatmap._blocks(names, 30)] == names
    assert heatmap._blocks(names, 20)[:3] == [
        (0, 1, "model.layers.0.ln.weight"),
        (1, 3, "model.layers.0.attn.qkv"),
        (3, 4, "model.layers.0.mlp.up.weight"),
    ]
    layers = [(5 * i, 5 * i + 5, f"model.layers.{i}") for i in range(4)]
    assert heatmap._blocks(names, 6) == [*layers, (20, 21, "head.weight")]
    assert heatmap._blocks(names, 3) == [(0, 20, "model.layers"), (20, 21, "head.weight")]
    many = [f"layers.{i}.{kind}" for i in range(96) for kind in ("weight", "bias")]
    assert heatmap._blocks(many, 50)[1] == (2, 4, "layers.1"), "not one label, layers"
    assert heatmap._blocks(list("abcdef"), 4)[5] == (5, 6, "f")


def test_figures_that_are_rounding_take_no_contrast():
    history = made(list("abcdefgh"), gradient=lambda n, s: 1e-15 if n == "c" else 1.0 + s)
    cells, _ = history.heatmap().axes[0].collections
    assert cells.norm.vmin == pytest.approx(cells.norm.vmax / 1e6)
    assert history.heatmap().axes[0].child_axes[0].get_ylim()[0] <= cells.norm.vmin


def test_many_entries_share_columns_and_lose_no_spike():
    spikes = {777: math.nan, 1555: 100.0, 1556: 0.0, 1557: None}
    history = made(["w"], steps=range(2000), gradient=lambda n, s: spikes.get(s, 1.0))
    ax = history.heatmap().axes[0]
    cells, special = ax.collections
    values, codes = cells.get_array()[0], special.get_array()[0]
    assert values.shape == (heatmap.MOST_COLUMNS,) and values.max() == 200
    assert (codes == heatmap._BAD).sum() == 1 and codes.count() == 1
    edges = cells.get_coordinates()[0, :, 0]
    assert (edges[0], edges[-1]) == (-0.5, 1999.5) and (np.diff(edges) > 0).all()
    (at,) = np.nonzero(codes == heatmap._BAD)[0]
    assert edges[at] < 777 < edges[at + 1]


def test_heat_map_of_update_ratio():
    ax = made(["a", "b"]).heatmap("min_update_ratio").axes[0]
    codes = ax.collections[1].get_array()
    assert (codes[:, 0] == heatmap._MISSING).all() and (codes[:, 1:] == heatmap._ZERO).all()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["not known", "zero"]


def test_shares_are_linear_and_zero_is_a_share():
    history = made(["a"], gradient=lambda n, s: float(s > 2))
    cells, special = history.heatmap("zero_fraction").axes[0].collections
    assert special.get_array().mask.all() and (cells.norm.vmin, cells.norm.vmax) == (0, 1)


# ---- both


def test_axes_of_the_caller():
    figure = Figure(layout="constrained")
    top, bottom = figure.subplots(2)
    history = made(blocks(12))
    assert history.plot("ln", ax=top) is figure and len(top.lines) == 3
    assert history.heatmap(ax=bottom) is figure and len(bottom.collections) == 2
    drawn(figure)
    assert_apart_and_inside(figure, bottom.get_yticklabels())
    assert_apart_and_inside(figure, [text for text in top.texts if text.get_text()])


def test_axes_in_a_part_of_a_figure():
    figure = Figure(figsize=(10, 4))
    history = made(blocks(12))
    for part, draw in zip(figure.subfigures(1, 2), (history.plot, history.heatmap), strict=True):
        assert draw(ax=part.subplots()) is figure
    drawn(figure)


def test_pyplot_is_left_alone_and_notebooks_show_the_figure():
    code = """
import sys, torch, paramstats
history = paramstats.History()
for step in range(3):
    history.append(step, paramstats.summarize({"w": torch.ones(2)}))
figure = history.plot(kind="param")
history.heatmap(kind="param").savefig(sys.argv[1])
print("matplotlib.pyplot" in sys.modules, figure._repr_png_()[:4])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "/dev/null"], capture_output=True, text=True, check=False
    )
    assert done.stdout == "False b'\\x89PNG'\n", done.stderr


@pytest.mark.parametrize("name", ["$x_{1$", "$", "a$b$c", "two\nlines", "x" * 300, "_hidden", "%s"])
def test_any_name(name):
    history = made([name, "b"])
    for figure in (history.plot(), history.heatmap()):
        drawn(figure)
    texts = {text.get_text() for text in end_labels(history.plot())}
    assert texts == set(labels.shown([name, "b"])) and max(map(len, texts)) <= labels.LONGEST_NAME
    assert not any("\n" in text for text in texts)


@pytest.mark.parametrize("method", ["plot", "heatmap"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stat": "median"}, "expected a stat out of count, mean.*min_update_ratio, got 'median'"),
        ({"kind": "buffer"}, "expected 'grad' or 'param' for kind, got 'buffer'"),
        ({"names": "nothing"}, "got 'nothing', which is in none of 1"),
        ({"names": ["w", "("]}, "expected names, or regular expressions.*got '\\('"),
    ],
)
def test_what_cannot_be_drawn(method, arguments, message):
    with pytest.raises(ValueError, match=f"^paramstats.History.plot: .*{message}"):
        getattr(made(["w"]), method)(**arguments)


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="expected entries, got an empty history"):
        History().plot()
    without = made(["w"], gradient=lambda n, s: None)
    for draw in (without.plot, without.heatmap):
        with pytest.raises(ValueError, match=r"expected gradients, got none.*kind='param'"):
            draw()
    with pytest.raises(ValueError, match="expected names for min_update_ratio, got 'total'"):
        made(["w"]).plot("total", "min_update_ratio")


@pytest.mark.parametrize("method", ["plot", "heatmap"])
def test_without_matplotlib(method, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = rf"^paramstats: History.{method} needs matplotlib: pip install matplotlib$"
    with pytest.raises(ImportError, match=message):
        getattr(made(["w"]), method)()
