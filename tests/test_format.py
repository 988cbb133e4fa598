"""Numbers, names and the one-line form of a tensor's statistics."""

from __future__ import annotations

import math

import pytest
import torch

from paramstats import summarize
from paramstats._core import format as formats


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0, "0"),
        (1, "1"),
        (-0.5, "-0.5"),
        (math.pi, "3.142"),
        (0.001, "0.001"),
        (0.00099996, "0.001"),  # rounds to a number without exponent
        (0.00099995, "0.001"),
        (math.nextafter(0.00099995, 0), "9.999e-04"),
        (0.0009999, "9.999e-04"),
        (-1.2346e-5, "-1.235e-05"),
        (9999, "9999"),
        (math.nextafter(9999.5, 0), "9999"),
        (9999.5, "1.000e+04"),
        (9999.6, "1.000e+04"),
        (65504, "6.550e+04"),
        (5e-324, "4.941e-324"),
        (1.797e308, "1.797e+308"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
    ],
)
def test_numbers_have_four_digits(x, text):
    assert formats.number(x) == text
    if math.isfinite(x):
        assert float(text) == pytest.approx(x, rel=1e-3)


def test_percentages_are_0_and_100_only_if_exact():
    assert formats.percent(0.0) == "0%" and formats.percent(1.0) == "100%"
    assert formats.percent(1e-9) == "<0.1%" and formats.percent(1 - 1e-9) == ">99.9%"
    assert formats.percent(0.125) == "12.5%" and formats.percent(math.nan) == "nan"


def test_long_names_lose_their_middle():
    assert formats.elide("abcdefghij", 6) == "a…ghij"
    assert formats.elide("abc", 3) == "abc"


@pytest.mark.parametrize(
    ("tensor", "line"),
    [
        (torch.zeros(3, 4), "<w: float32 [3, 4] n=12 all zeros>"),
        (torch.full((3,), 0.5), "<w: float32 [3] all 0.5>"),
        (torch.tensor([3.0, 4.0]), "<w: float32 [2] mean=3.5 std=0.7071 norm=5 min=3 max=4>"),
        (torch.empty(0, 4), "<w: float32 [0, 4] n=0 empty>"),
        (torch.empty(3, device="meta"), "<w: float32 [3] meta no statistics yet>"),
        (torch.nn.LazyLinear(2).weight, "<w: float32 lazy no statistics yet>"),
        (torch.tensor(7), "<w: int64 [] mean=7 std=nan norm=7 min=7 max=7>"),
        (torch.tensor([math.nan] * 2), "<w: float32 [2] mean=nan std=nan norm=nan min=nan max=nan"
         " NaN!=2>"),
    ],
)  # fmt: skip
def test_repr_of_an_entry_is_one_line(backend, tensor, line):
    assert repr(summarize({"w": tensor})["w"]) == line


def test_repr_has_gradients_and_counts_of_nonfinite_elements(backend, model):
    model[0].weight.data[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    line = repr(summarize(model)["0.weight"])
    assert line.startswith("<0.weight: float32 [6, 8] n=48 mean=nan ") and "\n" not in line
    assert "NaN!=1 +Inf!=1 -Inf!=1" in line and " grad(mean=" in line
    assert "4 tensors, 4 with gradients" in repr(summarize(model))
    x = torch.zeros(2, requires_grad=True)
    x.sum().backward()
    assert repr(summarize({"x": x})["x"]) == "<x: float32 [2] all zeros grad(all 1)>"
    assert repr(summarize({"x": x})["x"].grad) == "<all 1>"
