"""Runs a function when autograd is through with gradients, before anybody else sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.autograd import Variable


class AfterBackward:
    """Calls `function` at the end of every backward that brings a gradient, until `remove`.

    >>> import torch
    >>> from paramstats.integrations._after_backward import AfterBackward
    >>> model = torch.nn.Linear(3, 2)
    >>> hooks = AfterBackward(model.parameters(), lambda: print(model.weight.grad.sum().item()))
    >>> model(torch.ones(1, 3)).sum().backward()
    6.0
    >>> hooks.remove()
    >>> model(torch.ones(1, 3)).sum().backward()

    The first gradient to be accumulated has the backend call it when that backward is over, by what
    DistributedDataParallel and FSDP also use to average the last gradients. Theirs may come to
    the queue later: ours queues itself once more, to come after them.

    A backward within a backward, which reentrant checkpointing runs for each segment, has an
    end of its own: the last call is the one at which all gradients are there.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], function: Callable[[], None]
    ) -> None:
        self._function = function
        self._seen: set[int] = set()
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._on_gradient)
            for p in parameters
            if p.requires_grad
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if backward not in self._seen:
            self._seen.add(backward)
            _queue(self._on_end)

    def _on_end(self) -> None:
        _queue(self._function)


def _queue(function: Callable[[], None]) -> None:
    Variable._execution_engine.queue_callback(function)
