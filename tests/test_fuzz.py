"""A short run of tools/fuzz: fixed seeds, and those that found something. `make fuzz` is long."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import paramstats
from paramstats._core import backend as backends
from paramstats._core.moments import ROW
from tests.conftest import load_backend
from tools.fuzz import campaign

ROOT = Path(__file__).parent.parent
SHORT = {"modules": 400, "tensors": 2500, "summaries": 1000, "racing": 300, "tables": 3000}
KEPT = {
    "modules": (0, 4, 7, 22, 23, 62, 63, 69, 72, 83, 98, 101, 114, 115, 129, 151, 159, 180, 184),
    "tensors": (112756,),
    "summaries": (26, 60, 64, 65, 75, 92, 96, 106, 111, 155, 168, 182, 189, 212, 229, 237, 256),
}
"""Seeds that crashed, or gave something wrong, before what they found was mended."""


right = paramstats.summarize


@pytest.fixture(autouse=True)
def _as_it_was(native: backends.Implementation) -> Iterator[None]:
    """Cases choose threads, SIMD level and backend as they like."""
    extension, threads = load_backend("native").native, torch.get_num_threads()
    level = extension.simd_level()
    yield
    extension.set_simd_level(level)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", campaign.SHARES)
def test_a_short_run(kind):
    executions, wrong, _ = campaign.run_here(kind, 1_000_000, SHORT[kind])
    assert executions >= SHORT[kind] and wrong == 0


@pytest.mark.parametrize("kind", KEPT)
def test_seeds_that_found_something(kind):
    module = importlib.import_module(f"tools.fuzz.{kind}")
    assert all(module.run(seed) for seed in KEPT[kind])


class Wrong:
    """The native backend, with one statistic of one row not quite right."""

    def __init__(self, native: Any, field: int) -> None:
        self._native, self._field = native, field

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def read(self, *args: Any) -> Any:
        table, left, transfers = self._native.read(*args)
        return self._spoiled(table), left, transfers

    def merge_rows(self, *args: Any) -> Any:
        return self._spoiled(self._native.merge_rows(*args))

    def _spoiled(self, table: bytes) -> bytes:
        out = bytearray(table)
        if out:
            row = list(ROW.unpack_from(out, 0))
            row[self._field] = (
                row[self._field] + 1 if self._field < 5 else row[self._field] * 1.0001
            )
            ROW.pack_into(out, 0, *row)
        return bytes(out)


@pytest.mark.parametrize("field", range(9))
@pytest.mark.parametrize("kind", ["tensors", "tables"])
def test_a_figure_that_is_not_quite_right_is_noticed(native, monkeypatch, kind, field):
    wrong = dataclasses.replace(native, native=Wrong(native.native, field))
    monkeypatch.setattr(backends, "_active", wrong)
    module = importlib.import_module(f"tools.fuzz.{kind}")
    with pytest.raises(AssertionError):
        list(map(module.run, range(200)))


@pytest.mark.parametrize("kind", ["modules", "summaries", "racing"])
def test_a_summary_of_something_else_is_noticed(monkeypatch, kind):
    monkeypatch.setattr(
        paramstats, "summarize", lambda *_, **__: right({"k1": torch.arange(3.0)}, params=True)
    )
    module = importlib.import_module(f"tools.fuzz.{kind}")
    with pytest.raises(AssertionError):
        list(map(module.run, range(50)))


def test_nothing_grows():
    from tools.fuzz import memory

    growths = memory.in_a_child(1000)
    assert len(growths) > 20
    assert [growth for growth in growths if growth.grew] == []


def test_a_leak_is_noticed():
    """In a process of its own: memory that other tests let go would be used before any is added."""
    subprocess.run([sys.executable, "-m", "tools.fuzz.broken"], check=True, cwd=ROOT)


@pytest.mark.parametrize(("calls", "mebibytes"), [(2000, 0.26), (20_000, 0.42), (100_000, 2.1)])
def test_fewer_calls_may_leave_less(calls, mebibytes):
    from tools.fuzz.memory import Growth

    assert Growth("", calls, mebibytes, 0, 0, 0).grew
    assert not Growth("", calls, 0.9 * mebibytes, 0, 0, 0).grew


def test_a_block_left_by_every_call_shows():
    from tools.fuzz.memory import LEAST_CALLS, Growth

    assert Growth("", LEAST_CALLS, 0.0, LEAST_CALLS, 0, 0).grew


def test_a_child_that_crashes_hangs_or_is_wrong_is_told_with_its_seed(capfd, tmp_path):
    """`tools.fuzz.broken` does all three."""
    tally = campaign.run_kind("broken", 0, 10, timeout=4.0)
    assert (tally.executions, tally.crashes, tally.hangs, tally.wrong) == (10, 1, 1, 1)
    printed = capfd.readouterr().out
    for told in (
        "broken, seed 3: crashed",
        "broken, seed 5: hung",
        "broken, seed 8:",
        "wrong at 8",
    ):
        assert told in printed


def test_one_case_from_the_command_line(capsys):
    assert campaign.main(["--only", "tables", "--seed", "7"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("tables: ") and "from seed 7, 0 wrong, 0 crashes, 0 hangs" in said


@pytest.mark.parametrize(
    "arguments",
    [["--count", "100"], ["--only", "nonsense"], ["--only", "tables", "--scale", "0.1"]],
)
def test_a_command_line_that_means_nothing_is_refused(capsys, arguments):
    with pytest.raises(SystemExit) as refused:
        campaign.main(arguments)
    assert refused.value.code == 2 and "error: " in capsys.readouterr().err


def test_how_far_a_kind_is_can_be_seen(monkeypatch, capsys):
    monkeypatch.setattr(campaign, "EVERY", 0.0)
    campaign.run_kind("tables", 0, 2000)
    assert re.search(
        r"tables: [\d,]+ of 2,000 executions in \d+ s, 0 wrong", capsys.readouterr().out
    )


def test_the_record_has_every_kind_and_path():
    from tools.fuzz import memory, record

    tallies = {kind: campaign.Tally(executions=1000) for kind in campaign.SHARES}
    text = record.text(tallies, [memory.Growth("a path", 10, 0.0, 1, 2, 3)], 12.0)
    assert (
        "| all | two processes at a time, then memory | 5,000 | 0 | 0 | 0 | 12 |" in text
        and "| a path | 10 | 0.00 | 1 | 2 | 3 |" in text
    )


def test_the_campaign_is_a_million_executions():
    assert sum(campaign.SHARES.values()) >= 1_000_000
