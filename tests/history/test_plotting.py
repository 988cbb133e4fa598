"""Test what the pictures of a history show, and that their labels can be read."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import paramstats
from paramstats import History
from paramstats._core.options import STATS

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from paramstats._history import axes, cells, heatmap, labels, line_plot, mesh
from paramstats._summary import record_of

summarize = paramstats.summarize


def history_of(names, steps=range(6), gradient=lambda name, step: 1.0 + step) -> History:
    """Return a history in which each gradient is a constant; None: no gradient."""
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


def block_names(count: int) -> list[str]:
    """Return names as in a transformer."""
    kinds = ("ln.weight", "attn.qkv.weight", "attn.qkv.bias", "mlp.up.weight", "mlp.down.weight")
    return [f"model.layers.{i}.{kind}" for i in range(-(-count // 5)) for kind in kinds][:count]


def pixels_of(figure: Figure) -> np.ndarray:
    """Render the figure; rows from the top."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def assert_apart_and_inside(figure: Figure, texts) -> None:
    boxes = [Text.get_window_extent(text) for text in texts]  # without an annotation's arrow
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), (a, b)
    width, height = figure.canvas.get_width_height()
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


def end_labels(figure: Figure):
    return [text for text in figure.axes[0].texts if text.get_text()]


# ---- lines


def test_lines_show_the_statistics_of_the_history():
    history = history_of(["a", "b"], (0, 1, 10), lambda n, s: 1.0 + s * (n == "a"))
    (ax,) = history.plot().axes
    a, b = ax.lines
    assert a.get_label() == "a" and a.get_xdata().tolist() == [0, 1, 10]
    assert a.get_ydata() == pytest.approx(history["a"].grad.norm)
    assert b.get_ydata() == pytest.approx([2, 2, 2])
    assert ax.get_title(loc="left") == "gradient L2 norm" and ax.get_xlabel() == "step"
    (ax,) = history.plot("a", stat="mean", kind="param").axes
    assert ax.get_title(loc="left") == "parameter mean"
    assert ax.lines[0].get_ydata().tolist() == [1, 1, 1]
    (ax,) = history.plot("a", stat="min_update_ratio").axes
    assert ax.get_title(loc="left") == "minimum update ratio since the previous entry"
    assert ax.lines[0].get_ydata() == pytest.approx([math.nan, 0, 0], nan_ok=True)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, block_names(10)),
        ("model.layers.1.ln.weight", ["model.layers.1.ln.weight"]),
        (r"ln\.", ["model.layers.0.ln.weight", "model.layers.1.ln.weight"]),
        (
            ["total", r"1\.mlp"],
            ["model.layers.1.mlp.up.weight", "model.layers.1.mlp.down.weight", "total"],
        ),
    ],
)
def test_names_select_lines(names, expected):
    history = history_of(block_names(10))
    lines = history.plot(names).axes[0].lines
    assert [line.get_label() for line in lines] == expected
    if expected[-1] == "total":
        assert lines[-1].get_ydata() == pytest.approx(history.total.grad.norm)


def test_tensors_without_gradients_get_no_label():
    history = history_of("ab", range(40), lambda n, s: 1.0 if n == "a" else None)
    assert [text.get_text() for text in end_labels(history.plot())] == ["a"]


def test_parameter_called_total_hides_the_total():
    (line,) = history_of(["total", "w"]).plot("total").axes[0].lines
    assert line.get_ydata()[0] == 2


def test_many_lines_become_a_heat_map():
    assert len(history_of(block_names(10)).plot().axes[0].collections) == 0
    assert len(history_of(block_names(11)).plot().axes[0].collections) == 2
    assert len(history_of(block_names(30)).plot("layers.[0-3]").axes[0].lines) == 20
    ax = history_of(block_names(30)).plot(["layers.[0-3]", "layers.4.ln", "total"]).axes[0]
    assert ax.collections[0].get_array().shape == (21, 6)


@pytest.mark.parametrize(
    ("stat", "last", "scale"),
    [("norm", 100, "log"), ("norm", 3, "linear"), ("mean", 100, "linear"), ("std", 100, "linear")],
)
def test_axis_is_logarithmic_for_magnitudes_of_wide_range(stat, last, scale):
    history = history_of(["w"], gradient=lambda _, step: 1.0 + last * (step == 5))
    assert history.plot(stat=stat).axes[0].get_yscale() == scale


def test_steps_with_nan_are_marked():
    bad = {("w", 3): math.nan, ("w", 4): -math.inf}
    ax = history_of(["w", "v"], gradient=lambda n, s: bad.get((n, s), 1.0)).plot().axes[0]
    w, _, mark = ax.lines
    assert np.isnan(w.get_ydata()).tolist() == [False] * 3 + [True] * 2 + [False]
    assert mark.get_xdata().tolist() == [3, 4] and mark.get_color() == axes.NONFINITE_COLOR
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["NaN or Inf"]


@pytest.mark.parametrize("count", [1, 5, 50, 500])
def test_labels_of_lines_do_not_overlap(count):
    history = history_of(
        block_names(count), gradient=lambda n, s: 1.0 + 1e-3 * s + (n < "model.layers.2")
    )
    records = [record_of(summary) for _, summary in history]
    data = cells.collect(history.steps, records, history.names, "norm", "grad")
    figure = line_plot.draw_lines(data, None)
    pixels_of(figure)
    ends = end_labels(figure)
    assert len(ends) == min(count, 50) or (count == 500 and 40 <= len(ends) <= 60)
    assert_apart_and_inside(figure, ends)
    assert [text.xyann[1] for text in ends] == sorted(text.xyann[1] for text in ends)
    assert [text.xy[1] for text in ends] == sorted(text.xy[1] for text in ends)
    title = figure.axes[0].get_title(loc="left")
    assert title == "gradient L2 norm" + f" ({len(ends)} of 500 labelled)" * (count == 500)
    colors = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert all(np.all(colors[text.get_text()] == text.get_color()) for text in ends)


def test_shortened_names_stay_different():
    deep = "base_model.model.encoder.layer"
    names = [f"{deep}.{i}.attention.self.query.weight" for i in range(12)]
    assert labels.shortened(names) == [f"…{i}.attention.self.query.weight" for i in range(12)]
    differ_in_the_middle = ["x" * 40 + str(i) + "y" * 40 for i in range(3)]
    assert len(set(labels.shortened(differ_in_the_middle))) == 3
    assert labels.shortened(["a.b", "a.c"]) == ["a.b", "a.c"]
    assert labels.shortened([]) == []


# ---- heat maps


def test_cells_show_the_statistics_of_the_history():
    names = block_names(12)
    history = history_of(names, gradient=lambda n, s: 1.0 + s + names.index(n))
    ax = history.heatmap().axes[0]
    ordinary, special = ax.collections
    expected = np.array([history[name].grad.norm for name in names])
    assert ordinary.get_array().data == pytest.approx(expected) and special.get_array().mask.all()
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    assert ax.yaxis_inverted() and ax.get_title(loc="left") == "gradient L2 norm"
    some = history.heatmap(r"\.2\.", stat="mean", kind="param").axes[0]
    assert some.collections[0].get_array().data == pytest.approx(np.ones((2, 6)))
    assert some.get_title(loc="left") == "parameter mean, magnitude"
    shares = history_of(["a"], gradient=lambda n, s: float(s > 2)).heatmap(stat="zero_fraction")
    ordinary, special = shares.axes[0].collections
    assert special.get_array().mask.all() and (ordinary.norm.vmin, ordinary.norm.vmax) == (0, 1)


@pytest.mark.parametrize("kind", ["grad", "param"])
def test_cells_equal_the_statistics_of_summaries(backend, kind):
    torch.manual_seed(0)
    special = (math.nan, math.inf, -math.inf, 0.0)
    history = History()
    for step in range(40):
        source = {}
        for i, name in enumerate(block_names(12 - step % 3)):
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
    records = [record_of(summary) for _, summary in history]
    # math.hypot and std::hypot may differ in the last bit.
    rtol = 0 if backend.name == "reference" else 3e-16
    for stat in STATS:
        expected = np.full((len(names), len(history)), math.nan)
        is_nonfinite = np.zeros(expected.shape, bool)
        for column, (_, summary) in enumerate(history):
            for row, name in enumerate(names):
                entry = summary.get(name)
                statistics = entry if kind == "param" else entry and entry.grad
                if statistics is not None and statistics.is_read():
                    expected[row, column] = getattr(statistics, stat)
                    is_nonfinite[row, column] = statistics.nonfinite_count > 0
        found = cells.collect(history.steps, records, names, stat, kind)
        np.testing.assert_allclose(found.values, expected, rtol, 0, err_msg=stat)
        np.testing.assert_array_equal(found.is_nonfinite, is_nonfinite)
    expected = np.array([history[name].min_update_ratio for name in names])
    found = cells.collect(history.steps, records, names, "min_update_ratio", kind)
    np.testing.assert_array_equal(found.values, expected)
    assert (expected > 0).any()


@pytest.mark.parametrize(
    ("steps", "edges"), [((0, 2, 10, 100), [-1, 1, 6, 55, 145]), ((7,), [6.5, 7.5])]
)
def test_columns_are_centered_between_steps(steps, edges):
    corners = history_of(["w"], steps).heatmap().axes[0].collections[0].get_coordinates()
    assert corners[0, :, 0].tolist() == edges


def test_special_cells_have_their_own_colors():
    special = {("b", 1): math.nan, ("b", 2): 0.0, ("b", 3): None, ("c", 2): math.inf}
    figure = history_of("abc", gradient=lambda n, s: special.get((n, s), 1.0 + s)).heatmap()
    pixels, ax = pixels_of(figure), figure.axes[0]

    def color(name, step):
        x, y = ax.transData.transform((step, "abc".index(name) + 0.5))
        return pytest.approx(pixels[len(pixels) - 1 - int(y), int(x)], abs=0.01)

    white, grey, vermilion = map(to_rgb, mesh.SPECIAL_COLORS)
    assert vermilion == color("b", 1) and vermilion == color("c", 2)
    assert grey == color("b", 2) and white == color("b", 3)
    assert color("b", 0).expected.tolist() == color("a", 0) != color("a", 5).expected.tolist()
    meanings = [text.get_text() for text in ax.get_legend().get_texts()]
    assert meanings == ["no gradient", "zero", "NaN or Inf"]
    above, right = ax.lines
    assert above.get_xdata().tolist() == [1, 2] and right.get_ydata().tolist() == [1.5, 2.5]
    assert history_of(["a"]).heatmap().axes[0].get_legend() is None
    ax = history_of(["a", "b"]).heatmap(stat="min_update_ratio").axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["not known", "zero"]
    lightness = sorted(np.dot(c, (0.21, 0.72, 0.07)) for c in (white, grey, vermilion))
    assert min(np.diff(lightness)) > 0.15


@pytest.mark.parametrize("count", [1, 5, 50, 500])
@pytest.mark.parametrize("has_modules", [True, False])
def test_labels_of_rows_do_not_overlap(count, has_modules):
    names = block_names(count) if has_modules else [f"parameter_{i}" for i in range(count)]
    figure = history_of(names, steps=range(3)).heatmap()
    pixels_of(figure)
    ax = figure.axes[0]
    assert_apart_and_inside(figure, ax.get_yticklabels())
    texts = [label.get_text() for label in ax.get_yticklabels()]
    if count < 50:
        assert texts == names
    elif has_modules and count == 500:
        assert texts == [f"model.layers.{i}" for i in range(0, 100, 2)]
    assert len(texts) >= min(count, 20) and figure.get_size_inches()[0] == axes.WIDTH
    assert figure.get_size_inches()[1] <= 8.5


def test_module_blocks_are_as_deep_as_labels_fit():
    names = [*block_names(20), "head.weight"]
    head = (20, 21, "head.weight")
    assert [name for _, _, name in heatmap.module_blocks(names, 30)] == names
    assert heatmap.module_blocks(names, 20)[1] == (1, 3, "model.layers.0.attn.qkv")
    layers = [(5 * i, 5 * i + 5, f"model.layers.{i}") for i in range(4)]
    assert heatmap.module_blocks(names, 6) == [*layers, head]
    assert heatmap.module_blocks(names, 3) == [(0, 20, "model.layers"), head]
    many = [f"layers.{i}.{kind}" for i in range(96) for kind in ("weight", "bias")]
    assert heatmap.module_blocks(many, 50)[1] == (2, 4, "layers.1"), "not one label, layers"


def test_rounding_errors_do_not_flatten_the_contrast():
    history = history_of("abcdefgh", gradient=lambda n, s: 1e-15 if n == "c" else 1.0 + s)
    ax = history.heatmap().axes[0]
    norm = ax.collections[0].norm
    assert norm.vmin == pytest.approx(norm.vmax / 1e6)
    assert ax.child_axes[0].get_ylim()[0] <= norm.vmin


def test_many_entries_share_columns_without_losing_spikes():
    spikes = {777: math.nan, 1555: 100.0, 1556: 0.0, 1557: None}
    ax = history_of(["w"], range(2000), lambda n, s: spikes.get(s, 1.0)).heatmap().axes[0]
    ordinary, special = ax.collections
    values, codes = ordinary.get_array()[0], special.get_array()[0]
    assert values.shape == (mesh.MAX_COLUMNS,) and values.max() == 200
    assert codes.count() == 1
    edges = ordinary.get_coordinates()[0, :, 0]
    assert (edges[0], edges[-1]) == (-0.5, 1999.5) and (np.diff(edges) > 0).all()
    (at,) = np.nonzero(~codes.mask)[0]
    assert edges[at] < 777 < edges[at + 1]


# ---- lines and heat maps


def test_pictures_fit_into_the_callers_axes():
    figure = Figure(layout="constrained")
    top, bottom = figure.subplots(2)
    history = history_of(block_names(12))
    assert history.plot("ln", ax=top) is figure and len(top.lines) == 3
    assert history.heatmap(ax=bottom) is figure and len(bottom.collections) == 2
    pixels_of(figure)
    assert_apart_and_inside(figure, bottom.get_yticklabels())
    assert_apart_and_inside(figure, [text for text in top.texts if text.get_text()])
    figure = Figure(figsize=(10, 4))
    for part, draw in zip(figure.subfigures(1, 2), (history.plot, history.heatmap), strict=True):
        assert draw(ax=part.subplots()) is figure
    pixels_of(figure)


def test_pyplot_is_not_imported_and_notebooks_show_the_figure():
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
def test_any_name_is_drawn_on_one_line(name):
    history = history_of([name, "b"])
    for figure in (history.plot(), history.heatmap()):
        pixels_of(figure)
    texts = {text.get_text() for text in end_labels(history.plot())}
    assert texts == set(labels.shortened([name, "b"]))
    assert max(map(len, texts)) <= labels.MAX_NAME_LENGTH and "\n" not in "".join(texts)


NAMES = "expected names, or regular expressions that match some"


@pytest.mark.parametrize("method", ["plot", "heatmap"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stat": "median"}, "expected stat to be one of count,.*min_update_ratio, got 'median'$"),
        ({"stat": "zeros"}, "got 'zeros'; did you mean 'zero_count' or 'zero_fraction'"),
        ({"kind": "buffer"}, "expected 'grad', 'param' or 'update' for kind, got 'buffer'"),
        ({"names": "nothing"}, f"{NAMES}, got 'nothing', which matches none of 1 names"),
        ({"names": ["w", "("]}, rf"{NAMES}, got '\('"),
        ({"names": 3}, f"{NAMES}, got 3"),
        ({"names": ["w", None]}, f"{NAMES}, got None"),
    ],
)
def test_bad_arguments_are_refused(method, arguments, message):
    with pytest.raises((ValueError, TypeError), match=f"^paramstats.History.{method}: .*{message}"):
        getattr(history_of(["w"]), method)(**arguments)


@pytest.mark.parametrize("method", ["plot", "heatmap"])
def test_nothing_to_draw_is_an_error(method):
    with pytest.raises(ValueError, match=f"^paramstats.History.{method}: expected entries, got an"):
        getattr(History(), method)()
    without = history_of(["w"], gradient=lambda n, s: None)
    message = f"^paramstats.History.{method}: expected gradients, got none.*kind='param'"
    with pytest.raises(ValueError, match=message):
        getattr(without, method)()


def test_total_has_no_min_update_ratio():
    with pytest.raises(ValueError, match="expected names for min_update_ratio, got 'total'"):
        history_of(["w"]).plot("total", stat="min_update_ratio")
