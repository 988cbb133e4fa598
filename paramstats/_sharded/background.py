"""Run exchanges on a thread, one after the other."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from queue import SimpleQueue

from paramstats._core.options import Options
from paramstats._core.record import Record
from paramstats._sharded.agreement import Arguments
from paramstats._sharded.channel import exiting
from paramstats._sharded.collectives import Ranks
from paramstats._sharded.exchange import Exchange
from paramstats._sharded.local_rows import LocalRows

_EXIT_SECONDS = 1.0
"""How long the process waits at exit for exchanges that the other ranks may be about to join."""

_POLL_SECONDS = 1.0
"""How often a waiting reader looks whether the thread still exists; a forked process has none."""


class Background:
    """An exchange and the thread that runs it, which ends when this object is freed."""

    def __init__(self, ranks: Ranks) -> None:
        self.exchange = Exchange(ranks)
        self._ranks = ranks
        self._worker = _Worker()
        self._worker.start()
        weakref.finalize(self, self._worker.queue.put, None).atexit = False

    def connect(self) -> None:
        """Connect to the other ranks at the first call, and wait for them.

        If that fails, all exchanges fail with its error.
        """
        try:
            self._ranks.connect()
        except Exception as error:
            self.exchange.leave(error)

    def submit(self, local: LocalRows, arguments: Arguments, options: Options) -> DeferredExchange:
        """Exchange the rows of this rank; see `Exchange.run`."""
        deferred = DeferredExchange(self._worker, self.exchange, local, arguments, options)
        self._worker.queue.put(deferred)
        return deferred


class DeferredExchange:
    """The record of an exchange that runs in the background."""

    def __init__(
        self,
        worker: threading.Thread,
        exchange: Exchange,
        local: LocalRows,
        arguments: Arguments,
        options: Options,
    ) -> None:
        self._worker = worker
        self._call: tuple[Exchange, LocalRows, Arguments] | None = (exchange, local, arguments)
        self._options = options
        self._outcome: Record | Exception | None = None
        # Not an Event, because a signal handler may wait in the middle of an Event's methods.
        self._running = threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        """Run the exchange; called on the thread."""
        assert self._call is not None
        exchange, local, arguments = self._call
        try:
            self._outcome = exchange.run(local, arguments)
        except Exception as error:
            exchange.close_if_broken()
            # Tracebacks refer to frames, and these to the model's tensors.
            error.__cause__ = error.__context__ = None
            self._outcome = error.with_traceback(None)
        self._call = None
        self._running.release()

    def record(self) -> None:
        """Return None: other ranks may have tensors that this rank does not know."""

    def ready(self) -> bool:
        return self._outcome is not None or not self._worker.is_alive()

    def result(self) -> Record:
        while not self.ready():
            if self._running.acquire(timeout=_POLL_SECONDS):
                self._running.release()
        outcome = self._outcome
        if outcome is None:
            raise RuntimeError(
                "paramstats.summarize: expected the exchange with the other ranks to end before "
                "the process exits or forks, got none; call wait() on the summary before"
            )
        if isinstance(outcome, Exception):
            raise outcome.with_traceback(None)  # otherwise it would grow at every call
        return outcome._replace(
            correction=self._options.correction, grad_scale=self._options.grad_scale
        )


class _Worker(threading.Thread):
    """Runs what is in `queue`, until None.

    It is a daemon, because Python would wait for any other thread before it calls `_at_exit`.
    """

    def __init__(self) -> None:
        super().__init__(name="paramstats-exchange", daemon=True)
        self.queue: SimpleQueue[DeferredExchange | None] = SimpleQueue()
        _workers.add(self)

    def run(self) -> None:
        while (deferred := self.queue.get()) is not None:
            deferred.run()
            del deferred


_workers: weakref.WeakSet[_Worker] = weakref.WeakSet()


def _at_exit() -> None:
    """End all threads: first give exchanges the time to end, then interrupt them."""
    workers = list(_workers)
    for worker in workers:
        worker.queue.put(None)
    for _ in range(2):
        end = time.monotonic() + _EXIT_SECONDS
        for worker in workers:
            worker.join(max(0, end - time.monotonic()))
        exiting.set()


atexit.register(_at_exit)
