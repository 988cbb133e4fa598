"""Connections of paramstats' own among the ranks of a process group, for use by a thread.

`Channel` communicates by gloo over connections that only it uses. Its calls cannot get out of order
with the program's own collective calls, and torch.distributed does not know it: neither its state
nor `destroy_process_group` depends on a channel.
"""

from __future__ import annotations

import ctypes
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from paramstats._sharded.collectives import Ranks, explain_errors

_MAX_PAUSE = 0.02
"""Maximum number of seconds until a waiting thread notices that a call has ended."""

exiting = threading.Event()
"""Set when the process exits. Threads that wait for other ranks then give up."""


class Channel(Ranks):
    """The ranks of a process group, connected with the group's timeout."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._gloo: Any = None
        self._is_connected = self.size == 1
        self._lock = threading.RLock()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def connect(self) -> None:
        """Connect to the other ranks, once. Waits until each of them makes this call."""
        with self._lock, explain_errors():
            group = self._group()
            if self._is_connected or group is None:
                return
            if not dist.is_gloo_available():
                raise RuntimeError("a torch without gloo; leave out async_op=True")
            self._is_connected = True  # or failed: a second attempt would find other ranks' first
            store = group.get_group_store()
            # Numbered, because the store may outlive the group, and names of groups come again.
            number = (store.add("paramstats", 1) - 1) // self.size
            store = PrefixStore(f"paramstats/{number}", store)
            self._gloo = dist.ProcessGroupGloo(store, self.rank, self.size, _timeout_of(group))

    def close(self) -> None:
        """Disconnect, so that ranks which wait for this one get an error immediately."""
        self._gloo = None

    def _all_gather(self, out: Tensor, sent: Tensor) -> None:
        self._wait(self._gloo.allgather([list(out)], [sent]), out, sent)

    def _all_to_all(self, out: Tensor, sent: Tensor) -> None:
        self._wait(self._gloo.alltoall_base(out, sent, [], []), out, sent)

    def _all_reduce(self, buffer: Tensor, operator: dist.ReduceOp) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = operator
        self._wait(self._gloo.allreduce([buffer], options), buffer)

    def _broadcast(self, buffer: Tensor, sender: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = sender
        self._wait(self._gloo.broadcast([buffer], options), buffer)

    def _wait(self, work: Any, *tensors: Tensor) -> None:
        """Wait for a call. Never stays in torch's code when the interpreter ends.

        A daemon thread that returns from C++ then would end the process with an error. The
        destructor of a group waits for its calls, so at exit the group is never freed.
        """
        pause = 1e-4
        while not work.is_completed():
            if exiting.wait(pause):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object((self._gloo, work, tensors)))
                raise RuntimeError("the process is exiting")
            pause = min(2 * pause, _MAX_PAUSE)
        work.wait()


def _timeout_of(group: dist.ProcessGroup) -> timedelta:
    """Return the timeout of a group's collective calls; torch has no public way to ask for it."""
    try:
        device = torch.device("cpu" if "cpu" in dist.get_backend_config(group) else "cuda")
        timeout: timedelta = group._get_backend(device).options._timeout
        return timeout
    except (AttributeError, RuntimeError):
        return dist.default_pg_timeout
