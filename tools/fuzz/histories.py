"""Random interruptions, file faults and damaged files of histories.

After each, the history goes on. Then the file must hold what memory holds, and nothing may be
missing. `random.Random(seed)` decides everything but the moments of real signals.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import paramstats
from paramstats._core.reading import DeferredRecord
from paramstats._history import writer
from paramstats._summary import Summary, record_of

MAX_OPCODES = 2000
"""Most operations on a history execute fewer; a campaign stops at each of them."""

SMALL_LIMIT = 5 * (2 * 72 + 400) + 1000
"""Bytes of about five entries, so that memory drops some."""

OPERATIONS = 7

SPREAD = 7919
"""A prime, so that few cases are spread over all positions, and many cover each position once."""


class HandlerError(Exception):
    """Raised by a signal handler."""


ERRORS: list[Callable[[], BaseException]] = [
    KeyboardInterrupt,
    HandlerError,
    lambda: TimeoutError("out of time"),  # an OSError, as those of a full disk
]


class Transfer:
    """A transfer from a device, which is ready when it is asked a second time."""

    def __init__(self, table: bytes) -> None:
        self.table, self.asked = table, 0

    def ready(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def details(self) -> dict[int, Any]:
        return {}

    def write(self, table: bytearray) -> None:
        table[:] = self.table


class Trial:
    """A history with some entries and a file, and what must be in it."""

    def __init__(self, rng: random.Random, folder: str) -> None:
        self.rng = rng
        self.path = os.path.join(folder, "run.jsonl")
        self.copy = os.path.join(folder, "copy.jsonl")
        self.limit = rng.choice((SMALL_LIMIT, 1 << 20))
        self.history = paramstats.History(self.path, max_bytes=self.limit)
        self.appended: list[int] = []
        self.step = 0
        for _ in range(rng.randrange(8)):
            self.append()

    def append(self, deferred: bool = False) -> None:
        """Append an entry."""
        self.appending(deferred)()

    def appending(self, deferred: bool = False) -> Callable[[], object]:
        """Return a function that appends an entry, whose summary is ready to be appended."""
        size = self.rng.choice((1, 1, 1, 2))
        self.step += 1
        step = self.step
        has_details = self.rng.random() < 0.2
        summary = paramstats.summarize(
            {"w": torch.full((size, 1), float(step * (step % 3 > 0)))},  # some are zero
            distribution=has_details,
            rows=has_details,
        )
        if deferred:
            record = record_of(summary)
            unfinished = record._replace(table=bytes(len(record.table)))
            summary = Summary(None, DeferredRecord(unfinished, [Transfer(record.table)]))

        def call() -> None:
            self.history.append(step, summary)
            self.appended.append(step)

        return call

    def operation(self, number: int) -> Callable[[], object]:
        """Return a function that uses the history in one of seven ways."""
        history = self.history
        return (
            self.appending,
            lambda: self.appending(deferred=True),
            lambda: history.wait,
            lambda: history.close,
            lambda: lambda: history.save(self.copy),
            lambda: lambda: history.save(self.path),
            lambda: lambda: history.steps,
        )[number]()

    def any_operation(self) -> Callable[[], object]:
        return self.operation(self.rng.randrange(OPERATIONS))

    def check(self) -> None:
        """Append a few entries and compare memory with the file."""
        for _ in range(3):
            self.append()
        self.history.close()
        lines = map(json.loads, Path(self.path).read_text().splitlines())
        written = [line["step"] for line in lines if "step" in line]
        missing = set(self.appended) - set(written)
        assert not missing, f"steps {missing} are missing"
        assert len(written) == len(set(written)), written
        loaded = paramstats.History.load(self.path, max_bytes=self.limit)
        assert list(loaded) == list(self.history), (loaded.steps, self.history.steps)
        for (_, a), (_, b) in zip(loaded, self.history, strict=True):
            assert record_of(a).details == record_of(b).details  # zero rows, too
        left = set(os.listdir(os.path.dirname(self.path))) - {"run.jsonl", "copy.jsonl"}
        assert not left, left


@contextlib.contextmanager
def trial(rng: random.Random, warned: int = 0) -> Iterator[Trial]:
    """A trial in a folder of its own; fails if it warns more often than `warned`."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        yield Trial(rng, folder)
        shown = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
        # A handler that appends before or after the interrupted call does may make it go back.
        shown = [message for message in shown if "the run went back" not in message]
        assert len(shown) <= warned, shown


def at_opcode(number: int, action: Callable[[], object], call: Callable[[], object]) -> bool:
    """Call `call`, and `action` before it executes its opcode `number`; return whether it did."""
    count = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if "posixpath" in frame.f_code.co_filename:
            return None  # os.path.realpath ignores an OSError, also that of a signal handler
        if event == "opcode":
            count += 1
            if count == number:
                action()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count >= number


def interrupt(rng: random.Random, case: int) -> None:
    """An exception at one opcode of an operation."""
    case, operation = divmod(case * SPREAD, OPERATIONS)
    opcode, error = divmod(case, len(ERRORS))
    with trial(rng) as one:
        raised = ERRORS[error]()

        def action() -> None:
            raise raised

        call = one.operation(operation)
        try:
            reached = at_opcode(1 + opcode % MAX_OPCODES, action, call)
        except BaseException as found:
            assert found is raised, repr(found)  # noqa: PT017
        else:
            # Operations end early; and nothing may swallow the exception.
            assert not reached, f"{raised!r} was swallowed"
        one.check()


def handle(rng: random.Random, case: int) -> None:
    """A signal handler that uses the history, before one opcode of an operation."""
    opcode, operation = divmod(case * SPREAD, OPERATIONS)
    with trial(rng) as one:
        call = one.operation(operation)
        handlers = [one.any_operation() for _ in range(rng.randrange(1, 3))]

        def action() -> None:
            for handler in handlers:
                handler()

        at_opcode(1 + opcode % MAX_OPCODES, action, call)
        one.check()


def alarm(rng: random.Random, case: int) -> None:
    """A real signal at a random moment; its handler raises an exception or uses the history."""
    with trial(rng) as one:
        error = rng.choice([None, *ERRORS])
        handler = one.any_operation()
        raised: list[BaseException] = []

        def on_signal(*_: object) -> None:
            if error is None:
                handler()
                return
            raised.append(error())
            raise raised[-1]

        before = signal.signal(signal.SIGALRM, on_signal)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-3))
                for _ in range(20):
                    one.any_operation()()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)  # may come too late, so that it raises here
        except BaseException as found:
            assert found in raised, repr(found)  # noqa: PT017
        finally:
            signal.signal(signal.SIGALRM, before)
        one.check()


class Faults:
    """Lets system calls of the writer fail, from one of them on."""

    def __init__(self, first: int, length: int, number: int) -> None:
        self.calls, self.first, self.last = 0, first, first + length - 1
        self.error = OSError(number, os.strerror(number))
        self.failed: list[str] = []

    def is_failing(self, name: str) -> bool:
        self.calls += 1
        failing = self.first <= self.calls <= self.last
        if failing:
            self.failed.append(name)
        return failing

    def check(self, name: str) -> None:
        if self.is_failing(name):
            raise self.error

    @contextlib.contextmanager
    def injected(self) -> Iterator[None]:
        """Inject the faults into the functions that the writer calls."""
        places: list[tuple[Any, str]] = [
            (fcntl, "lockf"),
            *((os, name) for name in ("fstat", "fsync", "fchmod", "replace", "stat")),
        ]
        originals = [getattr(place, name) for place, name in places]
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, self._wrapped(name, original))
        vars(writer)["open"] = lambda *args, **options: File(self, *args, **options)
        try:
            yield
        finally:
            del vars(writer)["open"]
            for (place, name), original in zip(places, originals, strict=True):
                setattr(place, name, original)

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.check(name)
            return original(*args, **options)

        return call


class File:
    """An open file whose methods may fail, and whose writes may be short."""

    def __init__(self, faults: Faults, *args: Any, **options: Any) -> None:
        faults.check("open")
        self._faults = faults
        self._file = open(*args, **options)  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        self._faults.check(name)
        return getattr(self._file, name)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._faults.check("close")

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, data: bytes) -> int:
        is_short = self._faults.error.errno == errno.EINTR  # Python itself repeats such calls
        if self._faults.is_failing("write"):
            if not is_short:
                raise self._faults.error
            data = bytes(data)[: max(1, len(data) // 2)]
        return self._file.write(data)


def fault(rng: random.Random, case: int) -> None:
    """System calls that fail once or for a while."""
    numbers = (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EINTR)
    case, number = divmod(case, len(numbers))
    first, length = divmod(case, 2)
    faults = Faults(1 + first % 40, (1, 9)[length], numbers[number])
    with trial(rng, warned=1) as one:
        one.history.save(one.copy)
        before = Path(one.copy).read_bytes()
        with faults.injected():
            for _ in range(3):
                one.append()
            try:
                one.history.save(one.copy)
            except OSError as found:
                assert found is faults.error, repr(found)  # noqa: PT017
                assert Path(one.copy).read_bytes() == before or "close" in faults.failed
        one.check()


def damage(rng: random.Random, case: int) -> None:
    """A damaged file loads with a warning, or is refused with the number of the line."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "run.jsonl")
        data = _damaged(rng, _history_file(path), case)
        Path(path).write_bytes(data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            try:
                history = paramstats.History.load(path)
            except ValueError as error:
                message = str(error)
                assert message.startswith("paramstats.History: expected "), message
                assert ", line " in message or "of version 1" in message, message
                assert Path(path).read_bytes() == data
                return
        for warning in caught:
            assert "is broken, as after a crash" in str(warning.message), warning.message
        for name in history.names:
            series = history[name]
            assert len(series.norm) == len(series.grad.finite.std) == len(history)
            assert len(series.min_update_ratio) == len(series.grad.kurtosis) == len(history)
        for _, summary in history:
            str(summary), summary.to_dict(), summary.scalars(), summary.findings()
            for histogram in filter(None, (summary.total.histogram, *_histograms(summary))):
                histogram.edges(), histogram.quantile(0.4), histogram.overflow("float8_e4m3fn")
        assert len(history.total.grad.mean) == len(history.steps)
        history.save(path)
        assert list(paramstats.History.load(path)) == list(history)


def _history_file(path: str) -> bytes:
    """Return a file with two layouts, gradients, unread and non-finite elements, and details."""
    weight = torch.nn.Parameter(torch.tensor([1.0, float("nan"), 0.0]))
    weight.grad = torch.ones(3)
    model = torch.nn.ParameterDict({"a": weight, "b": torch.nn.Parameter(torch.ones(2, 2))})
    with paramstats.History(path) as history:
        history.append(0, paramstats.summarize(model))
        history.append(1, paramstats.summarize(model, params=False, grad_scale=8.0))
        for step in (2, 3):
            source = {"c": torch.arange(5.0)}
            history.append(step, paramstats.summarize(source, distribution=True, rows=step == 2))
    return Path(path).read_bytes()


def _histograms(summary: Summary) -> Iterator[Any]:
    for entry in summary.values():
        assert entry.rows is None or len(entry.rows.norm) >= len(entry.rows.dead)
        assert len(entry.zero_rows or ()) <= entry.zero_count
        yield from (entry.histogram, entry.grad and entry.grad.histogram)


def _damaged(rng: random.Random, data: bytes, case: int) -> bytes:
    kind, lines = case % 6, data.splitlines(keepends=True)
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    if kind == 0:
        return data[: (case // 6) % (len(data) + 1)]
    if kind == 1:
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 2:
        lines[one], lines[other] = lines[other], lines[one]
    elif kind == 3:
        lines.insert(one, lines[other])
    elif kind == 4:
        del lines[one]
    else:
        begin = rng.randrange(len(data))
        return data[:begin] + rng.randbytes(rng.randrange(20)) + data[begin + rng.randrange(20) :]
    return b"".join(lines)


KINDS = (interrupt, handle, alarm, fault, damage)


def run(seed: int) -> int:
    """Run one case; the kinds alternate."""
    case, kind = divmod(seed, len(KINDS))
    KINDS[kind](random.Random(seed), case)
    return 1
