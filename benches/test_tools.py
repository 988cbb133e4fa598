"""Tests of the code that turns timings into tables, and of what runs only on a GPU or by hand."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import paramstats
from benches import (
    checks,
    gpu_check,
    hardware,
    in_turns,
    limited,
    models,
    on_gpu,
    report,
    sanitizer_case,
    tables,
    timing,
)
from benches.contestants import Contestant, Statistics, all_of_them
from benches.libraries import TENSOR_CONTESTANTS
from benches.step_cost import __main__ as step_cost
from benches.step_cost.tools import available
from benches.step_cost.trainings import RECIPES
from docs import blocks

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


# ---- checks and tables --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"a": (0.5, 0.5**0.5, 1.0, 0.6)}, "zero_fraction of 'a'"),
        ({"a": (0.5, 0.9, None, None)}, "std of 'a'"),
        ({"a": (0.5, None, None, None, -1.0, 1.0)}, "min of 'a'"),
        ({"b": (None,)}, "missing: {'a'}, unknown: {'b'}"),
        ({"a": (0.5,), "total": (0.4,)}, "mean of 'total'"),
    ],
)
def test_wrong_or_missing_statistics_are_found(statistics: Any, message: str) -> None:
    expected = checks.expected({"a": torch.tensor([0.0, 1.0])})
    checks.check({"a": (0.5, 0.5**0.5, 1.0, None)}, expected, 1e-6)
    with pytest.raises(AssertionError, match=message):
        checks.check(statistics, expected, 0.01)


def test_totals_are_required() -> None:
    expected = checks.expected({"a": torch.ones(2), "a.grad": torch.tensor([3.0, 4.0])})
    norms = {"a": 2**0.5, "total": 2**0.5, "a.grad": 5.0, "total.grad": 5.0}
    found = {name: Statistics(norm=norm) for name, norm in norms.items()}
    checks.check(found, expected, 1e-6, all_of_them)
    del found["total.grad"]
    with pytest.raises(AssertionError, match=r"missing: {'total.grad'}"):
        checks.check(found, expected, 1e-6, all_of_them)


def test_totals_of_many_elements_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.rand(50), "b": torch.rand(60)}
    right = checks.expected(tensors)["total"]
    monkeypatch.setattr(checks, "_ORACLE_ELEMENTS", 100)
    assert checks.expected(tensors)["total"] == right
    wrong = paramstats.summarize({"a": tensors["a"], "b": 2 * tensors["b"]}).total
    monkeypatch.setattr(paramstats.Summary, "total", wrong)
    with pytest.raises(AssertionError):
        checks.expected(tensors)


def test_repetitions_change_only_the_norm() -> None:
    expected = checks.expected({"a": torch.tensor([1.0, 2.0])})
    checks.check({"a": (1.5, None, 20**0.5)}, expected, 1e-6, repeats=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "int8"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("contestant", TENSOR_CONTESTANTS, ids=lambda c: c.name)
def test_contestants_of_one_tensor_are_right(
    contestant: Contestant, threads: int, dtype: str
) -> None:
    model, block, repeats = models.repeating(1 << 21, getattr(torch, dtype))
    expected = checks.expected(models.tensors(block))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        reason = contestant.why_not(models.tensors(model))
        if reason is not None:
            pytest.skip(reason)
        call = checks.checked_call(contestant, model, expected, repeats)
        assert contestant.statistics(call()).keys() <= expected.keys()
    finally:
        torch.set_num_threads(before)


def _run(median: float, iqr: float, free: float, **machine: Any) -> dict[str, Any]:
    info = {"case": "a", "contestant": "paramstats", "threads": 1, "title": "1 GiB of float32"}
    info |= {"tensors": 1, "bytes": 1 << 30, "free": free}
    timing = {"fullname": "a", "extra_info": info, "stats": {"median": median, "iqr": iqr}}
    where = {**hardware.describe("cpu"), **machine}
    return {"benchmarks": [timing], "machine_info": {"benches": where}}


def test_runs_are_combined_and_noise_is_reported() -> None:
    combined = report.combine([_run(0.1, 0.0, 1.0), _run(0.3, 0.1, 0.8), _run(0.2, 0.0, 1.0)])
    assert combined["runs"] == 3
    case = combined["cases"]["a"]
    assert [case[key]["paramstats"] for key in ("median_s", "iqr_s", "free")] == [0.2, 0.1, 0.8]
    assert report.noisy(combined) == ["a, paramstats: spread 50%, 80% of the CPU free"]
    with pytest.raises(SystemExit, match="different hardware"):
        report.combine([_run(0.1, 0.0, 1.0), _run(0.1, 0.0, 1.0, hardware={})])


def test_wrong_results_are_shown_and_not_timed() -> None:
    run = _run(0.1, 0.0, 1.0)
    run["wrong"] = {"a": {"batched_torch": "norm of '0': ..."}, "not timed": {"polars": "..."}}
    assert "| float32, torch | wrong |" in tables.render(report.combine([run]))


def _turns(median: float, **machine: Any) -> dict[str, Any]:
    row = {"of": "MLP", "call": "loop", "base": "`summarize(m)`", "median": median}
    group = {"date": "2026-01-02", "rows": [row | {"low": 1.0, "high": 123.4}]}
    return {**hardware.describe("cpu"), "in_turns": {"mlp": group}, **machine}


def test_alternating_calls_have_a_table_and_replace_older_ones() -> None:
    combined = report.combine([_run(0.1, 0.0, 1.0), _turns(11.0), {"outcomes": []}])
    newer = report.combine([combined, _turns(12.34)])
    for found, ratio in ((combined, "11.0x"), (newer, "12.3x")):
        table = tables.render(found)
        assert f"| MLP | loop | `summarize(m)` | {ratio} | 1.00x to 123x |" in table
        assert "2026-01-02." in table
    with pytest.raises(SystemExit, match="different hardware"):
        report.combine([combined, _turns(12.0, hardware={})])


def test_alternating_calls_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_turns, "SECONDS", 1e-3)
    monkeypatch.setattr(in_turns, "MANY", (20,))
    monkeypatch.setattr(in_turns, "SIZES", {"1 MB": 1_000_000})
    monkeypatch.setattr(in_turns, "FALLBACK", ("seed_mlp",))
    rows = [
        row for name in ("mlp", "fallback", "many", "tensors") for row in in_turns.measure(name)
    ]
    assert len(rows) >= 5 + 1 + 2 + 3
    assert all(row["low"] <= row["median"] <= row["high"] for row in rows)
    assert "MLP of 4 parameters: `summarize(m).scalars()` / `summarize(m)`: " in in_turns.text(
        rows[0]
    )


def test_page_shows_the_saved_results() -> None:
    saved = [json.loads(path.read_text()) for path in (ROOT / "benches/results").glob("*.json")]
    page = (ROOT / "docs/benchmarks.md").read_text()
    newest = max((r for r in saved if r["device"] == "cpu"), key=lambda r: str(r["date"]))
    assert tables.render(newest) == blocks.content(page, "benchmark")


def test_gpu_results_have_tables() -> None:
    case = {"title": "2 GiB of int8", "tensors": 1, "threads": 1, "bytes": 1 << 31}
    case |= {"median_s": {"paramstats": 1.0}, "device_s": {"paramstats": 0.5, "copy": 0.8}}
    found = {**hardware.describe("cpu"), "device": "cuda", "runs": 1, "cases": {"a": case}}
    lines = tables.render({**found, "on_gpu": {"calls": {"error": "failed"}}}).splitlines()
    assert "| 2 GiB of int8 | 1000.0 ms | 500.0 ms | 4 | 0.80 |" in lines


# ---- training steps -----------------------------------------------------------------------------


def test_added_time_is_computed_within_a_turn() -> None:
    turns = [{"nothing": s, "tool": s + 0.1} for s in (1.0, 9.0, 1.0)]
    tool = step_cost.summarized(turns)["tool"]
    assert (tool["added_s"], tool["more"]) == (pytest.approx(0.1), pytest.approx(0.1))


def test_tools_are_right_and_remove_their_hooks() -> None:
    pytest.importorskip("sklearn", reason="the training uses its digits")
    recipe = replace(RECIPES[-1], turns=2, steps=1, untimed_steps=0)
    with ExitStack() as stack:
        tools, missing = available(stack, CPU)
        measured = step_cost.measure(recipe, tools, CPU)
        training = recipe.build(CPU)
        for tool in tools:
            step_cost.timed(training, tool, recipe)
        if "wandb_watch" in measured["tools"]:
            logged = importlib.import_module("wandb").run.summary.keys()
            assert {"gradients/0.weight", "parameters/4.bias"} <= set(logged)
    assert not training.model._forward_hooks
    for p in training.model.parameters():
        assert not p._backward_hooks and not p._post_accumulate_grad_hooks
    assert measured["tools"].keys() | missing.keys() >= {"paramstats_hooks", "lightning"}


# ---- GPU tools ----------------------------------------------------------------------------------


def _event(cat: str, name: str, ts: float) -> dict[str, Any]:
    return {"cat": cat, "name": name, "ts": ts, "dur": 1, "args": {}}


def test_cuda_calls_are_counted_within_the_region() -> None:
    ms = 1e3
    events = [
        {"cat": "user_annotation", "name": "R", "ts": 10 * ms, "dur": 10 * ms},
        _event("cuda_runtime", "cudaLaunchKernel", 9 * ms),
        _event("cuda_driver", "cuLaunchKernelEx", 12 * ms),
        _event("cuda_runtime", "cudaLaunchKernelExC_v11060", 13 * ms),
        _event("cuda_runtime", "cudaMemcpyAsync", 14 * ms),
        _event("cuda_runtime", "cudaHostAlloc", 15 * ms),
        _event("cuda_runtime", "cudaStreamSynchronize", 17 * ms),
        _event("cuda_runtime", "cudaDeviceSynchronize", 21 * ms),
        _event("kernel", "before", 9 * ms),
        _event("kernel", "after", 41 * ms),
        _event("kernel", "after", 42 * ms),
        _event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 43 * ms),
    ]
    counts = on_gpu.count_calls(events, "R")
    assert [counts[kind] for kind in ("launches", "copies", "waits", "allocations")] == [2, 1, 1, 1]
    assert counts["device_us"] == {"after": 2, "Memcpy HtoD (Pinned -> Device)": 1}


def test_steps_of_the_gpu_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most important ones first; all programs exist; a step that fails does not end it."""
    names = [step.name for step in gpu_check.steps(tmp_path, gpu_check.Tools(""))]
    first_ones = "packages, build, native backend, smoke, CUDA tests, memory, on_gpu, kernel_images"
    order = [*first_ones.split(", "), "memcheck", "models", "step_cost", "racecheck", "compiled"]
    assert [name for name in names if name in order] == order
    for step in gpu_check.steps(tmp_path, gpu_check.Tools("")):
        for argument in step.command:
            assert not argument.endswith(".py") or (ROOT / argument).exists()
    first, *_ = gpu_check.steps(tmp_path, gpu_check.Tools(""))
    assert first.missing == "nvidia-smi is not installed"
    ends = [("fails", "exit(3)"), ("works", "print(4)")]
    made = [limited.Step(name, (sys.executable, "-c", code), 50) for name, code in ends]
    monkeypatch.setattr(gpu_check, "steps", lambda *unused: made)
    assert gpu_check.check(tmp_path, 60, os.environ, True) == 1
    report_ = json.loads((tmp_path / "gpu-check.json").read_text())
    assert report_["dry_run"] and [o["result"] for o in report_["outcomes"]] == ["FAIL", "pass"]


def test_numbers_of_a_dry_run_are_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(_run(0.1, 0.0, 1.0, dry_run=True)))
    monkeypatch.setattr(sys, "argv", ["report", str(path)])
    with pytest.raises(SystemExit, match="dry run"):
        report.main()


def test_gpu_measurements_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "_CALLS", {"native": 2, "reference": 1})
    monkeypatch.setattr(on_gpu, "_WARM_UP", 1)
    rows = [row for part in on_gpu.PARTS.values() for row in part(CPU)]
    assert len(rows) >= 6
    assert all(row["case"] in on_gpu.text(row) for row in rows)


def test_sanitizer_case_is_right_on_the_cpu() -> None:
    sanitizer_case.check(CPU)


def test_slow_compilation_is_stopped() -> None:
    begin = time.perf_counter()
    assert "more than 0.1 s" in str(timing.why_not_compiled(lambda: time.sleep(20), 0.1))
    assert time.perf_counter() - begin < 15
    assert "ZeroDivisionError" in str(timing.why_not_compiled(lambda: 1 // 0, 5))
    assert timing.why_not_compiled(lambda: None, 5) is None


@pytest.mark.parametrize(
    ("code", "options", "result", "reason"),
    [
        ("print('fine')", {}, "pass", ""),
        ("raise SystemExit(9)", {}, "FAIL", "exit status 9"),
        ("exit('not supported')", {"skip_if": "not supported"}, "skip", "not supported"),
        ("", {"missing": "no tool"}, "skip", "no tool"),
        ("", {"limit": 1}, "skip", "100 s left"),
        ("import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('saved')",
         {"limit": 8}, "FAIL", "stopped after"),
    ],
    ids=["pass", "fail", "skip", "missing", "no time", "interrupted"],
)  # fmt: skip
def test_results_of_steps(
    code: str, options: dict[str, Any], result: str, reason: str, tmp_path: Path
) -> None:
    step = limited.Step("step", (sys.executable, "-c", code), **{"limit": 60, **options})
    outcome = limited.run(step, 100, tmp_path / "log", os.environ)
    assert outcome.result == result
    assert reason in outcome.reason
    if "saved" in code:
        assert "saved" in (tmp_path / "log").read_text()
