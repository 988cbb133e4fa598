"""What makes tables, verdicts and the chart out of timings, and the tools of a training step."""

from __future__ import annotations

import importlib
import random
import subprocess
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benches import chart, compare, compare_worker, contestants, hardware, report
from benches.step_cost import measuring
from benches.step_cost.tools import Tool, available, called
from benches.step_cost.trainings import WORKS, Work
from benches.tables import render


def _case(title: str, threads: int, **medians: float) -> dict[str, Any]:
    numel = {"32 KB": 32_000, "1 GiB": 1 << 30}[title.partition(" of ")[0]]
    return {"title": title, "threads": threads, "tensors": 1, "bytes": numel, "median_s": medians}


def _report(**more: Any) -> dict[str, Any]:
    cases = {
        "a": _case("1 GiB of float32", 1, paramstats=0.04, read_only=0.03),
        "b": _case("1 GiB of float32", 2, paramstats=0.04, read_only=0.02),
        "c": _case("32 KB of int8", 1, paramstats=4e-6, read_only=1e-6),
        "d": _case("32 KB of float32", 1, read_only=1e-6),
        "e": {
            "title": "many",
            "threads": 2,
            "tensors": 2000,
            "bytes": 128_000,
            "median_s": {
                "paramstats": 2e-4,
                "paramstats_scalars": 2.5e-4,
                "item_loop_no_grad": 2e-2,
                "numpy": 1e-3,
            },
        },
    }
    for case in cases.values():
        case["iqr_s"] = dict.fromkeys(case["median_s"], 0.0)
        case["free"] = dict.fromkeys(case["median_s"], 1.0)
    return {**hardware.describe("cpu"), "runs": 1, "cases": cases, **more}


def _steps(free: float = 1.0) -> dict[str, Any]:
    turn = {
        "nothing": measuring.Timing(1.0, free),
        "paramstats": measuring.Timing(1.02, 1.0),
        "item_loop": measuring.Timing(1.5, None),
    }
    tools = measuring.summed_up([turn, turn])
    for name, tool in tools.items():
        tool["title"] = f"`{name}`"
    return {"steps": {"gpt2": {"title": "GPT-2", "tools": tools}}, "missing": {}, "quick": True}


# ---- tables and chart ---------------------------------------------------------------------------


def test_one_row_for_each_type() -> None:
    lines = render(_report()).splitlines()
    assert "| one tensor | 32 KB (mostly the call) | 1 GiB, 1 thread | 1 GiB, 2 threads |" in lines
    assert "| float32 | - | 0.75 (27 GB/s) | 0.50 (27 GB/s) |" in lines
    assert "| int8 | 0.25 (8 GB/s) | - | - |" in lines


def test_columns_that_nobody_fills_are_left_out() -> None:
    lines = render(_report()).splitlines()
    assert lines[0] == (
        "| parameters and gradients of | paramstats | with `scalars()` | `.item()` loop | NumPy |"
    )
    assert lines[2] == "| many | 200.0 us (100 ns a tensor) | 250.0 us | 80x | 4x |"


def test_steps_have_a_table_where_they_were_measured() -> None:
    assert "training step" not in render(_report())
    text = render(_report(step_cost=_steps()))
    assert "| added to a training step of | GPT-2 (1000.0 ms) |" in text
    assert "| `paramstats` | 20.0 ms, +2.0% |\n| `item_loop` | 500.0 ms, +50% |" in text


def test_noise_of_steps_is_told() -> None:
    assert report.noisy(_report(step_cost=_steps())) == []
    told = report.noisy(_report(step_cost=_steps(free=0.5)))
    assert told == ["a step of gpt2: nothing, spread 0%, 50% of the processors free"]


def test_one_report_of_both() -> None:
    joined = report.joined(_report(), {**hardware.describe("cpu"), **_steps()})
    assert joined["step_cost"]["steps"].keys() == {"gpt2"}
    with pytest.raises(SystemExit, match="another hardware"):
        report.joined(_report(), {**hardware.describe("cpu"), "hardware": {}})


def test_the_chart_has_the_most_threads_and_the_least_added_first() -> None:
    dtypes, sizes, found = chart.shares(_report())
    assert (set(dtypes), sizes) == ({"float32", "int8"}, ["32 KB", "1 GiB"])
    assert found == {("float32", "1 GiB"): 0.5, ("int8", "32 KB"): 0.25}
    assert chart.added(_report()) == ("", [])
    title, tools = chart.added(_report(step_cost=_steps()))
    assert title == "GPT-2: 1000 ms"
    assert [(name, ours) for name, _, _, ours in tools] == [
        ("paramstats", True),
        ("item_loop", False),
    ]


@pytest.mark.parametrize("more", [{}, {"step_cost": _steps()}], ids=["old results", "with steps"])
def test_the_chart_is_the_same_every_time(tmp_path: Path, more: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib")
    drawn = []
    for name in ("one.svg", "other.svg"):
        chart.draw(_report(**more), tmp_path / "docs" / name)
        drawn.append((tmp_path / "docs" / name).read_bytes())
    assert drawn[0] == drawn[1] and len(drawn[0]) < 100_000
    assert b">float32</text>" in drawn[0] and b"<image" not in drawn[0]


# ---- steps --------------------------------------------------------------------------------------


def test_what_is_added_is_told_within_a_turn() -> None:
    turns = [
        {"nothing": measuring.Timing(base, 1.0), "tool": measuring.Timing(base + 0.1, 1.0)}
        for base in (1.0, 2.0, 1.0)  # a slow spell
    ]
    tool = measuring.summed_up(turns)["tool"]
    assert (tool["added_s"], tool["more"]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert tool["free"] == 1.0


def _mlp() -> Work:
    pytest.importorskip("sklearn", reason="its digits are what is trained on")
    return next(work for work in WORKS if work.name == "mlp")


def test_tools_are_right_and_leave_nothing_behind() -> None:
    with ExitStack() as stack:
        tools, missing = available(stack)
        work = replace(_mlp(), steps=1, first=0)
        measured = measuring.measure(work, tools, 2)
        training = work.build()
        for tool in tools:
            measuring.timed(training, tool, work)
        for p in training.model.parameters():
            assert not p._backward_hooks and not p._post_accumulate_grad_hooks
        assert not training.model._forward_hooks
        if "wandb_watch" in measured["tools"]:
            logged = importlib.import_module("wandb").run.summary.keys()
            assert {"gradients/0.weight", "parameters/4.bias"} <= set(logged)
    assert measured["tools"].keys() | missing.keys() >= {"paramstats_hooks", "lightning"}
    assert measured["tools"]["paramstats_hooks"]["error"]["norm"] < 1e-6
    assert list(measuring.lines(measured))


def test_a_wrong_tool_is_found() -> None:
    training = _mlp().build()
    loop = contestants.item_loop_no_grad

    def twice(log: dict[str, Any]) -> dict[str, Any]:
        return {name: (mean, 2 * std, norm, zero) for name, (mean, std, norm, zero) in log.items()}

    tools = [Tool("loop", "", called(loop), twice)]
    with pytest.raises(AssertionError, match="std of"):
        measuring.check(training, tools)
    only_one = [Tool("loop", "", called(loop), lambda log: {})]
    with pytest.raises(AssertionError, match="loop: "):
        measuring.check(training, only_one)


# ---- peers --------------------------------------------------------------------------------------


def test_lines_of_lovely_tensors() -> None:
    printed = {"a": ("0.123", "1.2e-05"), "b": None, "c": ("-0.002", "0.003")}
    lines = {
        name: f"tensor[4] \u03bc={two[0]} \u03c3={two[1]}" if two else "tensor[4] all_zeros"
        for name, two in printed.items()
    }
    assert contestants._from_lines(lines) == {
        "a": (0.123, 1.2e-05, None, None),
        "b": (0.0, 0.0, None, None),
        "c": (None, None, None, None),
    }


def test_numpy_says_what_it_does_not_read() -> None:
    half = {"x": torch.ones(2, dtype=torch.bfloat16)}
    assert "bfloat16" in str(contestants._why_not_numpy(half))


# ---- comparing ----------------------------------------------------------------------------------


def _pairs(ratio: float, noise: float) -> list[list[tuple[float, float]]]:
    draw = random.Random(0)
    return [[(1.0, ratio * draw.gauss(1, noise)) for _ in range(8)] for _ in range(5)]


@pytest.mark.parametrize(
    ("ratio", "noise", "verdict"),
    [
        (1.0, 0.05, ""),
        (1.3, 0.05, "SLOWER"),
        (0.7, 0.05, "faster"),
        (1.01, 0.0001, ""),  # told apart, but too little to matter
    ],
)
def test_verdicts(ratio: float, noise: float, verdict: str) -> None:
    change = compare.change(_pairs(ratio, noise))
    assert change.verdict == verdict
    assert change.low <= change.ratio <= change.high
    assert change.ratio == pytest.approx(ratio, rel=0.05)
    assert compare.row("case", change).endswith(verdict)


def test_a_pair_that_is_slow_altogether_proves_nothing() -> None:
    pairs = _pairs(1.0, 0.01)
    pairs[0] = [(1.0, 1.5)] * 8
    assert compare.change(pairs).verdict == ""


def test_a_worker_answers() -> None:
    threads = torch.get_num_threads()
    try:
        worker = compare_worker.Worker()
        statistics = [worker.build(case)["statistics"] for case in ("tiny MLP", "tiny MLP")]
        assert compare._same_figures(*statistics)
        assert worker.turn()["seconds"] > 0
    finally:
        torch.set_num_threads(threads)


def test_the_present_tree_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "tree"
    (tree / "csrc").mkdir(parents=True)
    (tree / ".gitignore").write_text("*.so\n")
    for name in ("csrc/a.cpp", "setup.py", "gone.py", "built.so"):
        (tree / name).write_text(name)
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tree, check=True)
    (tree / "gone.py").unlink()
    (tree / "new.py").write_text("not added yet")
    monkeypatch.setattr(compare, "_ROOT", tree)
    copy = compare.copy_present(tmp_path / "copy")
    names = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert names == {".gitignore", "csrc/a.cpp", "setup.py", "new.py"}
    assert compare.same_backend(tree, copy)
    (tree / "csrc/a.cpp").write_text("changed")
    assert not compare.same_backend(tree, copy)
