"""A command with a limit, and what becomes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]

_GRACE = 10.0
"""Seconds of a step's limit that it is given to end by itself, and to write what it has."""

_LEAST = 5.0
"""Seconds below which a step is not begun."""

_TAIL = 8
_TAIL_OF_FAILURE = 40
_WIDTH = 200

Result = Literal["pass", "FAIL", "skip"]


@dataclass(frozen=True)
class Step:
    """A command with a limit."""

    name: str
    command: tuple[str, ...]
    limit: float
    """Seconds."""
    reserve: float = 0.0
    """Seconds that it leaves to the steps after it."""
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: Path | None = None
    """A file of an earlier step."""
    impossible: str | None = None
    """Why it cannot be tried here."""
    essential: bool = False
    """Whether nothing after it is worth its time where it fails."""
    excuse: str | None = None
    """Words in its output by which the machine, not paramstats, is to blame."""


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    name: str
    result: Result
    seconds: float
    reason: str
    command: str


def limit_of(step: Step, left: float) -> float:
    """Its own, or what is left of the budget."""
    return min(step.limit, left - step.reserve)


def run(step: Step, left: float, log: Path, environment: Mapping[str, str]) -> Outcome:
    """Runs a step within its limit; its output goes to the log, and the end of it is shown."""
    command = " ".join(step.command).strip()
    limit = limit_of(step, left)
    why_not = step.impossible
    if why_not is None and limit < _LEAST:
        why_not = f"{max(left, 0):.0f} s left"
    if why_not is None and step.needs is not None and not step.needs.exists():
        why_not = f"{step.needs.name} was not written"
    if why_not is not None:
        print(f"== {step.name}: skip, {why_not}", flush=True)
        return Outcome(step.name, "skip", 0.0, why_not, command)

    print(f"== {step.name} (at most {limit:.0f} s)", flush=True)
    begin = time.monotonic()
    with log.open("ab") as output:
        output.write(f"\n== {step.name}: {command}\n".encode())
        output.flush()
        start = output.tell()
        try:
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**environment, **step.environment},
                preexec_fn=os.setpgrp,  # no session: it is to end with whoever ends this one
            )
        except OSError as error:
            return Outcome(step.name, "FAIL", 0.0, str(error), command)
        in_time = _wait(process, limit)
    with log.open("rb") as written:
        written.seek(start)
        text = written.read().decode(errors="replace")
    seconds = time.monotonic() - begin
    result: Result = "pass" if in_time and process.returncode == 0 else "FAIL"
    reason = "" if result == "pass" else f"exit status {process.returncode}"
    if not in_time:
        reason = f"stopped after {seconds:.0f} s"
    if result == "FAIL" and step.excuse and step.excuse in text:
        result, reason = "skip", step.excuse
    for line in text.splitlines()[-(_TAIL_OF_FAILURE if result == "FAIL" else _TAIL) :]:
        print(line[:_WIDTH])
    print(f"== {step.name}: {result} {reason} after {seconds:.0f} s", flush=True)
    return Outcome(step.name, result, seconds, reason, command)


def _wait(process: subprocess.Popen[bytes], limit: float) -> bool:
    """Whether it ended in time. One that did not is interrupted, as by Ctrl-C, upon which pytest
    writes what it has measured; then it is killed. It and its children are a group of their own."""
    grace = min(_GRACE, limit / 4)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(limit - grace)
            return True
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it, and what it may have left behind
        process.wait()
