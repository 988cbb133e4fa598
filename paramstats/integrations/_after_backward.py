"""Run a function at the end of each backward pass, when all gradients are complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.autograd import Variable

from paramstats._core.torch_private import without_modes


class AfterBackward:
    """Call `function` at the end of every backward pass that computes a gradient, until `remove`.

    >>> import torch
    >>> from paramstats.integrations._after_backward import AfterBackward
    >>> model = torch.nn.Linear(3, 2)
    >>> hooks = AfterBackward(model.parameters(), lambda: print(model.weight.grad.sum().item()))
    >>> model(torch.ones(1, 3)).sum().backward()
    6.0
    >>> hooks.remove()
    >>> model(torch.ones(1, 3)).sum().backward()

    The first gradient of a pass queues a callback with the autograd engine. DDP and FSDP use the
    same queue to average the last gradients and may add to it later, so the callback queues
    `function` once more, to run after them.

    Reentrant checkpointing runs a backward pass within the backward pass for each segment. Then
    `function` is called several times; all gradients are complete at the last call.

    Args:
        parameters: the parameters to put hooks on.
        function: called without arguments.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], function: Callable[[], None]
    ) -> None:
        self._function = function
        self._seen: set[int] = set()
        with without_modes():
            self._hooks = [
                p.register_post_accumulate_grad_hook(self._on_gradient)
                for p in parameters
                if p.requires_grad
            ]

    def remove(self) -> None:
        """Remove all hooks."""
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
