"""Test what plots and heat maps of distributions show."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from paramstats import History, summarize
from paramstats._core.options import DISTRIBUTION_STATS

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.figure import Figure
from matplotlib.text import Text

from paramstats._history import mesh
from tests.history.test_plotting import assert_apart_and_inside, history_of, pixels_of


def history_with_distributions(scales=(8.0,) * 6) -> History:
    """Return a history without a distribution at step 2, and with NaN and Inf at step 4."""
    torch.manual_seed(0)
    history = History()
    for step, scale in enumerate(scales):
        w = torch.randn(40, 10, dtype=torch.float64) * 10.0**-step
        w[0] = 0
        source = {"w": w.requires_grad_(), "v": torch.ones(3, requires_grad=True)}
        gradients = source["w"].detach().square() * (scale / 3)
        if step == 4:
            gradients[1, :3] = torch.tensor([math.nan, math.inf, -math.inf])
        source["w"].grad = gradients
        source["v"].grad = torch.ones(3)
        history.append(step, summarize(source, distribution=step != 2, grad_scale=scale))
    return history


def shares_by_hand(columns, edges) -> np.ndarray:
    """Return the shares of elements with magnitudes between powers of two; NaN for None."""
    out = np.full((len(edges) - 1, len(columns)), math.nan)
    for i, x in enumerate(columns):
        if x is not None:
            finite = np.abs(x[np.isfinite(x) & (x != 0)])
            out[:, i] = np.histogram(finite, 2.0 ** np.array(edges, np.float64))[0] / x.size
    return out


def gradients(scales) -> list[np.ndarray | None]:
    """Return the gradients of `history_with_distributions`, divided by the scale."""
    torch.manual_seed(0)
    out = []
    for step in range(len(scales)):
        w = torch.randn(40, 10, dtype=torch.float64) * 10.0**-step
        w[0] = 0
        out.append((w.square() / 3).numpy())
    out[2] = None
    out[4][1, :3] = math.nan
    return out


def test_distribution_shows_the_shares_of_elements(backend):
    scales = (8.0, 16.0, 8.0, 0.5, 1.0, 65536.0)
    ax = history_with_distributions(scales).distribution("w", kind="grad").axes[0]
    ordinary, special = ax.collections
    corners = ordinary.get_coordinates()
    assert corners[0, :, 0].tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    y = corners[:, 0, 1]
    edges = y[2:-2]
    assert (
        (edges == np.rint(edges)).all() and (np.diff(edges) == 1).all() and (np.diff(y) > 0).all()
    )
    elements = gradients(scales)
    expected = shares_by_hand(elements, edges)
    found = ordinary.get_array()[2:-2]
    assert np.ma.filled(found, 0.0) == pytest.approx(np.nan_to_num(expected), abs=1e-12)
    zeros = ordinary.get_array()[0]
    assert zeros.filled(0).tolist() == [10 / 400] * 2 + [0] + [10 / 400] * 3
    assert ordinary.get_array()[1].mask.all() and special.get_array()[[1, -2]].mask.all(), "gaps"
    codes = special.get_array()
    assert (codes[2:-2, 2] == mesh.MISSING).all() and codes[0, 2] == mesh.MISSING
    is_empty = np.delete(codes[2:-2], 2, axis=1) == mesh.ZERO
    assert np.array_equal(is_empty.filled(False), np.delete(expected, 2, axis=1) == 0)
    assert codes[-1].tolist() == [mesh.ZERO] * 2 + [
        mesh.MISSING,
        mesh.ZERO,
        mesh.NONFINITE,
        mesh.ZERO,
    ]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "not known",
        "no elements",
        "NaN or Inf",
    ]
    assert ax.get_title(loc="left") == "gradient distribution of w"
    assert ax.get_ylabel() == "magnitude" and ax.lines[0].get_xdata().tolist() == [4]
    labels = map(Text.get_text, ax.get_yticklabels())
    labels_of_rows = dict(zip(labels, ax.get_yticks(), strict=True))
    assert y[0] < labels_of_rows.pop("0") < y[1] and y[-2] < labels_of_rows.pop("NaN, Inf") < y[-1]
    assert all(label == f"$2^{{{at:.0f}}}$" for label, at in labels_of_rows.items())
    assert (ordinary.norm.vmin, ordinary.norm.vmax) == (1 / 400, 1)


def test_distribution_of_the_parameter_and_of_the_total():
    history = history_with_distributions()
    for name, size, more in (("w", 400, 0), ("total", 403, 3)):
        ax = history.distribution(name).axes[0]
        ordinary, _ = ax.collections
        edges = ordinary.get_coordinates()[2:, 0, 1]
        torch.manual_seed(0)
        columns = []
        for step in range(6):
            w = torch.randn(40, 10, dtype=torch.float64) * 10.0**-step
            w[0] = 0
            columns.append(np.append(w.numpy().ravel(), [1.0] * more))
        assert columns[0].size == size
        columns[2] = None
        found = ordinary.get_array()[2:]
        assert found.filled(0) == pytest.approx(np.nan_to_num(shares_by_hand(columns, edges)))
        assert ax.get_title(loc="left") == f"parameter distribution of {name}"
        assert len(ax.lines) == 0 and "NaN, Inf" not in str(ax.get_yticklabels())


@pytest.mark.parametrize(
    ("scales", "is_exact"), [((12.0, 6.0) * 3, True), ((12.0, 16.0) * 3, False)]
)
def test_distribution_with_any_scale(scales, is_exact):
    """Rows begin between powers of two; bins move by half a row at most."""
    ax = history_with_distributions(scales).distribution("w", kind="grad").axes[0]
    ordinary, _ = ax.collections
    edges = np.asarray(ordinary.get_coordinates())[2:-2, 0, 1]
    assert edges % 1 == pytest.approx(np.full(len(edges), 1 - math.log2(12.0) % 1))
    found = ordinary.get_array()[2:-2].filled(0)
    for column, (x, scale) in enumerate(zip(gradients(scales), scales, strict=True)):
        if x is not None:
            moved = edges if is_exact else edges + (math.log2(12.0 / scale) + 0.5) % 1 - 0.5
            assert np.abs(moved - edges).max() <= 0.5
            assert found[:, column] == pytest.approx(shares_by_hand([x], moved)[:, 0])
    note = "" if is_exact else ", within a factor of 1.42"
    assert ax.get_ylabel() == f"magnitude{note}"


def test_distribution_of_zeros_constants_and_many_entries():
    history = History()
    for step in range(2000):
        source = {"zero": torch.zeros(3), "w": torch.full((4,), 2.0 + 2.0 * (step == 777))}
        history.append(step, summarize(source, distribution=True))
    ordinary, special = history.distribution("zero").axes[0].collections
    assert ordinary.get_array().shape == (2, mesh.MAX_COLUMNS)
    assert (ordinary.get_array()[0] == 1).all() and special.get_array().mask.all()
    figure = history.distribution("w")
    ordinary, _ = figure.axes[0].collections
    assert ordinary.get_array()[2].filled(0).min() == 1 and ordinary.get_array()[3].count() == 1
    pixels_of(figure)
    assert_apart_and_inside(figure, figure.axes[0].get_yticklabels())


def test_distribution_is_drawn_into_the_callers_axes():
    figure = Figure(layout="constrained")
    top, bottom = figure.subplots(2)
    history = history_with_distributions()
    name = "$x_{1$" * 20
    assert history.distribution("w", ax=top) is figure
    history.append(9, summarize({name: torch.ones(3)}, distribution=True))
    assert history.distribution(name, ax=bottom) is figure
    pixels_of(figure)
    assert len(bottom.get_title(loc="left")) < 60


def test_distribution_refuses_bad_arguments():
    history = history_with_distributions()
    with pytest.raises(KeyError, match="no parameter 'weight' among 1; did you mean 'weights'"):
        history_of(["weights"]).distribution("weight")
    with pytest.raises(ValueError, match="expected 'param' or 'grad' for kind, got 'update'"):
        history.distribution("w", kind="update")
    with pytest.raises(ValueError, match="expected entries, got an empty history"):
        History().distribution("w")
    message = "distribution: expected distributions of 'w', got none at any step; summarize.*=True"
    with pytest.raises(ValueError, match=message):
        history_of(["w"]).distribution("w")
    without = History()
    without.append(0, summarize({"w": torch.ones(3)}, distribution=True))
    with pytest.raises(ValueError, match="expected distributions of 'w', got none at any step"):
        without.distribution("w", kind="grad")
    assert "total" in history.distribution("total").axes[0].get_title(loc="left")


# ---- other plots


def test_statistics_of_distributions_are_drawn():
    history = history_with_distributions()
    for stat in DISTRIBUTION_STATS:
        ax = history.plot(["w", "total"], stat=stat, kind="grad").axes[0]
        assert ax.lines[0].get_ydata() == pytest.approx(
            getattr(history["w"].grad, stat), nan_ok=True
        )
        expected = getattr(history.total.grad, stat)
        assert ax.lines[1].get_ydata() == pytest.approx(expected, nan_ok=True)
        assert np.isnan(ax.lines[0].get_ydata()).tolist() == [s in (2, 4) for s in range(6)]
    ordinary, _ = history.heatmap(stat="skewness").axes[0].collections
    assert ordinary.get_array()[0].compressed() == pytest.approx(
        [abs(x) for x in history["w"].grad.skewness if not math.isnan(x)]
    )
    message = "expected kurtosis, got none at any step; .*distribution=True"
    for kind in ("param", "grad", "update"):
        with pytest.raises(ValueError, match=message):
            history_of(["w"]).plot(stat="kurtosis", kind=kind)
