"""Runs a command with a time limit, logs its output and classifies the result."""

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

ROOT = Path(__file__).parent.parent

_GRACE = 10.0
"""Seconds before the limit at which a command is interrupted, so that it can write its results."""

_LEAST = 5.0
"""Seconds that must remain for a step to be started."""

_LINES_OF_FAILURE = 40
_WIDTH = 200


@dataclass(frozen=True)
class Step:
    """A command with a time limit."""

    name: str
    command: tuple[str, ...]
    limit: float
    """Seconds."""
    lines: int = 8
    """Number of the last lines of output to print."""
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None
    """The reason why the step cannot run here."""
    essential: bool = False
    """Whether the later steps are useless if this one fails."""
    skip_if: str | None = None
    """A failure with this text in the output is a limitation of the machine, not an error."""


@dataclass(frozen=True)
class Outcome:
    """The result of a step."""

    name: str
    result: Literal["pass", "FAIL", "skip"]
    seconds: float
    reason: str


def run(
    step: Step, remaining: float, log: Path, environment: Mapping[str, str], mark: str = ""
) -> Outcome:
    """Run a step within its limit and the remaining seconds; print the end of its output.

    Args:
        step: the step.
        remaining: seconds.
        log: file to which the output is appended.
        environment: variables, besides those of the step.
        mark: begins each line that is printed.
    """
    limit = min(step.limit, remaining)
    reason = step.missing or (f"{max(remaining, 0):.0f} s left" if limit < _LEAST else None)
    if reason is not None:
        print(f"{mark}== {step.name}: skip, {reason}", flush=True)
        return Outcome(step.name, "skip", 0.0, reason)
    print(f"{mark}== {step.name} (at most {limit:.0f} s)", flush=True)
    begin = time.monotonic()
    with log.open("ab") as output:
        output.write(f"\n{mark}== {step.name}: {' '.join(step.command)}\n".encode())
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
                preexec_fn=os.setpgrp,  # so that its children can be stopped with it
            )
        except OSError as error:
            return Outcome(step.name, "FAIL", 0.0, str(error))
        in_time = _wait(process, limit)
    text = log.read_bytes()[start:].decode(errors="replace")
    seconds = time.monotonic() - begin
    outcome = Outcome(step.name, "pass", seconds, "")
    if not in_time:
        outcome = Outcome(step.name, "FAIL", seconds, f"stopped after {seconds:.0f} s")
    elif process.returncode != 0:
        outcome = Outcome(step.name, "FAIL", seconds, f"exit status {process.returncode}")
        if step.skip_if and step.skip_if in text:
            outcome = Outcome(step.name, "skip", seconds, step.skip_if)
    lines = _LINES_OF_FAILURE if outcome.result == "FAIL" else step.lines
    for line in text.splitlines()[-lines:]:
        print(mark + line[:_WIDTH])
    result = f"{outcome.result} {outcome.reason} after {seconds:.0f} s"
    print(f"{mark}== {step.name}: {result}", flush=True)
    return outcome


def _wait(process: subprocess.Popen[bytes], limit: float) -> bool:
    """Return whether the process ended in time.

    Otherwise it is interrupted as by Ctrl-C, so that pytest writes its results, and then killed
    with its children.
    """
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
            os.killpg(process.pid, signal.SIGKILL)  # children that are still running
        process.wait()
