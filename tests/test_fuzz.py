"""Runs a few cases of the fuzzer (`make fuzz`) and checks that it notices errors."""

from __future__ import annotations

import dataclasses
import gc
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import paramstats
from paramstats._core import backend as backends
from paramstats._core.moments import ROW
from tests.conftest import load_backend
from tools.fuzz import campaign, memory

EXECUTIONS = {
    "modules": 400,
    "kinds": 20_000,
    "tensors": 2500,
    "summaries": 1000,
    "racing": 300,
    "tables": 3000,
    "histories": 500,
    "ranks": 120,
    "changing_files": 60,
    "hostile_files": 40,
}
summarize = paramstats.summarize


@pytest.fixture(autouse=True)
def _restore_settings(native: backends.Implementation) -> Iterator[None]:
    """Cases change the number of threads and the SIMD level."""
    extension, threads = load_backend("native").native, torch.get_num_threads()
    level = extension.simd_level()
    yield
    extension.set_simd_level(level)
    torch.set_num_threads(threads)


def run_cases(kind: str, count: int) -> None:
    module = importlib.import_module(f"tools.fuzz.{kind}")
    for seed in range(count):
        module.run(seed)


@pytest.mark.parametrize("kind", campaign.SHARES)
def test_fixed_cases_give_right_results(kind):
    executions, wrong, _ = campaign.run_here(kind, 1_000_000, EXECUTIONS[kind])
    assert executions >= EXECUTIONS[kind] and wrong == 0


class WrongBackend:
    """The native backend with a small error in one field of one row."""

    def __init__(self, native: Any, field: int) -> None:
        self._native, self._field = native, field

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def read(self, *args: Any) -> Any:
        table, *rest = self._native.read(*args)
        return self._change(table), *rest

    def merge_rows(self, *args: Any) -> Any:
        return self._change(self._native.merge_rows(*args))

    def _change(self, table: bytes) -> bytes:
        out = bytearray(table)
        if out:
            row = list(ROW.unpack_from(out, 0))
            value = row[self._field]
            row[self._field] = value + 1 if self._field < 5 else value * 1.0001
            ROW.pack_into(out, 0, *row)
        return bytes(out)


@pytest.mark.parametrize("field", range(9))
@pytest.mark.parametrize("kind", ["tensors", "tables"])
def test_a_slightly_wrong_statistic_is_noticed(native, monkeypatch, kind, field):
    wrong = dataclasses.replace(native, native=WrongBackend(native.native, field))
    monkeypatch.setattr(backends, "_active", wrong)
    with pytest.raises(AssertionError):
        run_cases(kind, 200)


@pytest.mark.parametrize("kind", ["modules", "summaries", "racing", "ranks"])
def test_a_summary_of_another_model_is_noticed(monkeypatch, kind):
    other = {"k1": torch.arange(3.0)}
    monkeypatch.setattr(paramstats, "summarize", lambda *_, **__: summarize(other))
    with pytest.raises(AssertionError):
        run_cases(kind, 50)


def test_no_path_of_a_call_leaks_memory():
    growths = memory.in_a_child(1000)
    assert len(growths) > 20
    assert [growth for growth in growths if growth.grew] == []


def test_a_leak_is_noticed():
    kept: list[object] = []
    model = memory.Model()
    gc.freeze()  # collections need not visit what is there already
    assert memory.measure("", lambda: kept.append(model), 100, model).grew
    assert memory.measure("", lambda: kept.append(object()), 1000, model).grew
    assert not memory.measure("", lambda: None, 1000, model).grew
    gc.unfreeze()


def test_a_crash_a_hang_and_a_wrong_result_are_reported_with_their_seed(capfd):
    tally = campaign.run_kind("broken", 0, 10, timeout=10.0)
    assert tally == campaign.Tally(executions=10, crashes=1, hangs=1, wrong=1)
    printed = capfd.readouterr().out
    for message in ("broken, seed 3: crashed", "broken, seed 5: hung", "broken, seed 8:"):
        assert message in printed


def test_one_case_from_the_command_line(capsys):
    assert campaign.main(["--only", "tables", "--seed", "7"]) == 0
    assert "tables: 4 executions, 0 wrong, 0 crashes, 0 hangs" in capsys.readouterr().out
