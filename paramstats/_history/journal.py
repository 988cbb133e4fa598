"""Append to a store from any thread and any signal handler."""

from __future__ import annotations

import contextlib
import sys
import threading
from types import FrameType
from typing import Any

from paramstats._core import forked
from paramstats._history.store import Pending, Store, is_lost
from paramstats._summary import Summary, is_ready_within


class Journal:
    """Takes summaries in one operation, and moves them to the store when they are available.

    A call may be interrupted at any moment by an exception, or by a signal handler that itself
    calls the journal. An exception leaves a state that the next call continues from. A signal
    handler works on a copy of the store, writes the file from it, and drops the copy: the
    interrupted call then continues as if there had been no handler, and writes the same bytes
    again.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending: list[Pending] = []
        self._lock = threading.RLock()
        self._running: FrameType | None = None
        self._forks = forked.count()

    def __reduce__(self) -> tuple[Any, ...]:
        return Journal, (Store(self.settle().kept.copy()),)  # only one may write a file

    def __len__(self) -> int:
        """Return the number of entries whose statistics have not arrived yet."""
        return len(self._pending)

    @property
    def store(self) -> Store:
        """The store as it is now; does not wait."""
        return self._store

    @property
    def last_step(self) -> float:
        """The step of the latest entry, -inf without entries."""
        pending = self._pending[-1:]
        return pending[0][0] if pending else self._store.kept.last_step

    def append(self, step: int, summary: Summary) -> None:
        """Add an entry; never waits for its statistics."""
        if forked.count() != self._forks:
            self._after_fork()
        self._pending.append((step, summary))
        self._settle()

    def settle(self) -> Store:
        """Wait for all statistics, move the entries to the store, and return the store.

        Shows warnings as if they came from the caller's caller.
        """
        if forked.count() != self._forks:
            self._after_fork()
        for _, summary in self._pending[:]:  # without the lock, so that other threads can append
            try:
                summary.wait()
            except Exception:
                if not is_lost(summary):
                    raise  # a signal handler has raised it
        return self._settle()

    def settle_within(self, seconds: float) -> Store:
        """Wait at most this long, and move the entries that are available to the store."""
        if forked.count() != self._forks:
            self._after_fork()
        for _, summary in self._pending[-1:]:
            with contextlib.suppress(Exception):  # `_settle` handles it
                is_ready_within(summary, seconds)
        return self._settle()

    def _settle(self) -> Store:
        with self._lock:
            store, pending = self._store, self._pending
            if self._running is not None and _is_on_stack(self._running):
                store = store.copy()
                store.settle(pending[:])
                store.show_messages()
            else:
                self._running = sys._getframe()
                try:
                    store.settle(pending)
                    if store.messages:
                        store.show_messages()
                finally:
                    self._running = None
        return store

    def _after_fork(self) -> None:
        """Leave the file and the pending entries to the parent process."""
        self._lock = threading.RLock()  # a thread of the parent may have held the other
        self._running = None
        self._pending = []
        self._store.forget_unwritten()
        self._forks = forked.count()


def _is_on_stack(frame: FrameType) -> bool:
    """Return whether this function is called by `frame`, directly or not."""
    caller: FrameType | None = sys._getframe()
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None
