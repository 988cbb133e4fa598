"""Numbers, names and single tensors as people read them."""

from __future__ import annotations

import math

import pytest
import torch

from paramstats import summarize
from paramstats._core import format as rendering


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0, "0"),
        (1, "1"),
        (-0.5, "-0.5"),
        (math.pi, "3.142"),
        (0.001, "0.001"),
        (0.00099996, "0.001"),  # rounds to a number that is written out
        (0.0009999, "999.9e-6"),
        (1e-7, "100.0e-9"),
        (-1.2346e-5, "-12.35e-6"),
        (9999, "9999"),
        (9999.6, "10.00e3"),
        (123456, "123.5e3"),
        (65504, "65.50e3"),
        (3.4e38, "340.0e36"),
        (5e-324, "4.941e-324"),
        (1.797e308, "179.7e306"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
    ],
)
def test_numbers_have_four_digits_and_exponents_in_steps_of_three(x, text):
    assert rendering.number(x) == text
    if math.isfinite(x):
        assert float(text) == pytest.approx(x, rel=1e-3)


def test_percentages_say_none_and_all_only_where_that_is_exact():
    assert rendering.percent(0.0) == "0%" and rendering.percent(1.0) == "100%"
    assert rendering.percent(1e-9) == "<0.1%" and rendering.percent(1 - 1e-9) == ">99.9%"
    assert rendering.percent(0.125) == "12.5%" and rendering.percent(math.nan) == "nan"


def test_names_are_elided_in_the_middle():
    assert rendering.elide("abcdefghij", 6) == "a…ghij"
    assert rendering.elide("abc", 3) == "abc"


def test_one_line(backend, model):
    model[0].weight.data[0, 0] = math.nan
    model[0].weight.data[0, 1] = math.inf
    model[0].weight.data[0, 2] = -math.inf
    line = repr(summarize(model)["0.weight"])
    assert line.startswith("<0.weight: float32 [6, 8] n=48 mean=nan ") and "\n" not in line
    assert "NaN!=1 +Inf!=1 -Inf!=1" in line and " grad(mean=" in line
    assert "4 tensors, 4 with gradients" in repr(summarize(model))


@pytest.mark.parametrize(
    ("tensor", "line"),
    [
        (torch.zeros(3, 4), "<w: float32 [3, 4] n=12 all zeros>"),
        (torch.full((3,), 0.5), "<w: float32 [3] all 0.5>"),
        (torch.tensor([3.0, 4.0]), "<w: float32 [2] mean=3.5 std=0.7071 norm=5 min=3 max=4>"),
        (torch.empty(0, 4), "<w: float32 [0, 4] n=0 empty>"),
        (torch.empty(3, device="meta"), "<w: float32 [3] meta no statistics yet>"),
        (torch.tensor(7), "<w: int64 [] mean=7 std=nan norm=7 min=7 max=7>"),
        (torch.tensor([math.nan] * 2), "<w: float32 [2] mean=nan std=nan norm=nan min=nan max=nan"
         " NaN!=2>"),
    ],
)  # fmt: skip
def test_one_line_says_what_a_tensor_is_like(backend, tensor, line):
    assert repr(summarize({"w": tensor})["w"]) == line


def test_one_line_of_a_lazy_parameter(backend):
    entry = summarize(torch.nn.LazyLinear(2))["weight"]
    assert repr(entry) == "<weight: float32 lazy no statistics yet>"


def test_one_line_of_a_gradient_and_of_what_trains(backend):
    x = torch.zeros(2, requires_grad=True)
    x.sum().backward()
    assert repr(summarize({"x": x})["x"]) == "<x: float32 [2] all zeros grad(all 1)>"
    assert repr(summarize({"x": x})["x"].grad) == "<all 1>"
