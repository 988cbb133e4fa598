"""Hooks of optimizers, which take a summary at the due steps."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from paramstats._core.layout import Layout
from paramstats._core.optimizer_state import (
    numbers_of,
    parameters_of,
    uses_formula,
    without_gradient,
)
from paramstats._core.optimizers import Request, no_parameters
from paramstats._core.torch_private import skip_dynamo, without_modes
from paramstats._rounds import Rounds
from paramstats._summarize import summarize, tensors_of

UpdateMethod = Literal["auto", "formula", "copy"] | None

_PRECISE = (torch.float32, torch.float64)
"""Dtypes whose updates the formula gives precisely; the rounding of narrower ones is too large."""


def check_optimizers(source: Any, optimizers: tuple[Any, ...]) -> None:
    """Raise ValueError if an optimizer has no parameter of `source`.

    Raises NotImplementedError if the updates of such a model are not read.
    """
    if not optimizers:
        return
    layout, tensors = tensors_of(source)
    if layout.is_sharded:
        from paramstats import _sharded

        _sharded.check_optimizers(source, layout, tensors)
    known = set(map(id, tensors))
    for optimizer in optimizers:
        if known.isdisjoint(map(id, parameters_of(optimizer))):
            raise no_parameters("watch")


def selected_tensors(source: Any, reading: Mapping[str, Any]) -> tuple[Layout, list[Any]]:
    """Return the layout and the tensors that `summarize(source, **reading)` would read."""
    return tensors_of(source, *(reading[name] for name in ("buffers", "include", "exclude")))


def tensors_of_step(optimizers: Sequence[Any], i: int, selected: set[int]) -> frozenset[int] | None:
    """Return the ids of the tensors that are read at a step of one of several optimizers.

    What no optimizer has is read with the first. None: all tensors, if there is one optimizer.

    Args:
        optimizers: the optimizers, of which `i` makes the step.
        selected: the ids of the tensors to choose from.
    """
    if len(optimizers) == 1:
        return None
    owned = [set(map(id, parameters_of(optimizer))) for optimizer in optimizers]
    return frozenset(owned[i] | (selected.difference(*owned) if i == 0 else set()))


class OptimizerHooks:
    """Takes a summary after each due step of some optimizers, with their state and updates.

    Args:
        source: the model, or a mapping of names to tensors.
        optimizers: the optimizers, without wrappers.
        update: how updates are found; see `paramstats.watch`.
        reading: the arguments of `summarize`.
        rounds: says which steps are due, and gets their summaries.
    """

    def __init__(
        self,
        source: Any,
        optimizers: tuple[Any, ...],
        update: UpdateMethod,
        reading: Mapping[str, Any],
        rounds: Rounds,
    ) -> None:
        self._source = source
        self._optimizers = optimizers
        self._update = update
        self._reading = reading
        self._rounds = rounds
        self.before_next: Callable[[], None] | None = None
        """Called once, at the beginning of the next step, whether it is due or not."""
        self._requests: list[Request | None] = [None] * len(optimizers)
        self._may_nest = list(map(_may_nest, optimizers))
        self._failed = False  # whether there was too little memory for copies
        self._before_step = [
            optimizer.register_step_pre_hook(functools.partial(self._before, i))
            for i, optimizer in enumerate(optimizers)
        ]
        # Hooks of due steps only, to keep the others fast. An optimizer cannot lose a hook while it
        # calls its hooks, so that these are removed before the next step.
        self._after_step: list[RemovableHandle | None] = [None] * len(optimizers)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in (*self._before_step, *self._after_step):
            if handle is not None:
                handle.remove()

    @skip_dynamo
    def _before(self, i: int, *_: Any) -> None:
        """Prepare the summary of a step that is due."""
        if self._may_nest[i] and _is_nested(self._optimizers[i]):
            return
        handle = self._after_step[i]
        if handle is not None:
            handle.remove()
            self._after_step[i] = self._requests[i] = None  # the step may have raised
        if self.before_next is not None:
            call, self.before_next = self.before_next, None
            call()
        if self._rounds.begin(i):
            optimizer = self._optimizers[i]
            if _skips(optimizer):
                self._rounds.postpone(i)
                return
            self._requests[i] = self._prepare(i)
            after = functools.partial(self._after, i)
            self._after_step[i] = handle = optimizer.register_step_post_hook(after)
            # Other hooks may change the learning rate or set gradients to None.
            handle.hooks_dict_ref().move_to_end(handle.id, last=False)

    @skip_dynamo
    def _after(self, i: int, *_: Any) -> None:
        """Take the summary of a step that is due."""
        if self._may_nest[i] and _is_nested(self._optimizers[i]):
            return
        request, self._requests[i] = self._requests[i], None
        if request is None:
            return
        handle, self._after_step[i] = self._after_step[i], None  # a log may call Watcher.close
        try:
            summary = summarize(self._source, optimizer=request, **self._reading)
            self._rounds.add(summary, selected_tensors(self._source, self._reading)[0])
        finally:
            self._after_step[i] = handle

    @without_modes()
    def _prepare(self, i: int) -> Request:
        """Return what to read after the step, with copies of parameters from before it."""
        selected = self._selected()
        to_copy = self._to_copy(i, selected)
        no_formula = selected if self._update is None else map(id, to_copy)
        copies = self._copies(to_copy)
        return Request(
            (self._optimizers[i],),
            copies,
            idle=without_gradient(self._optimizers[i]),
            no_formula=frozenset(no_formula),
            only=tensors_of_step(self._optimizers, i, selected),
        )

    def _selected(self) -> set[int]:
        """Return the ids of the tensors that `include` and `exclude` select."""
        return set(map(id, selected_tensors(self._source, self._reading)[1]))

    def _to_copy(self, i: int, selected: set[int]) -> list[Tensor]:
        """Return the selected parameters of an optimizer that a due step copies."""
        optimizer = self._optimizers[i]
        if self._update in (None, "formula"):
            return []
        out = []
        for group in optimizer.param_groups:
            has_formula = uses_formula(optimizer, group, numbers_of(group))
            out += [
                p
                for p in group["params"]
                if id(p) in selected
                and (p.requires_grad or p.grad is not None)
                and (self._update == "copy" or p.dtype not in _PRECISE or not has_formula)
                and not is_lazy(p)
            ]
        return out

    def copy_bytes(self) -> int:
        """Return the bytes that the copies of a due step take on this rank."""
        selected = self._selected()
        indexes = range(len(self._optimizers))
        return max(_nbytes(self._to_copy(i, selected)) for i in indexes)

    def _copies(self, params: list[Tensor]) -> dict[int, Tensor]:
        """Return copies by the id of the parameter; none if there is too little memory."""
        if self._failed or not params:
            return {}
        try:
            with torch.no_grad():
                return {id(p): p.detach().clone() for p in params}
        except (RuntimeError, MemoryError) as error:
            self._failed = True
            warnings.warn(
                f"paramstats.watch: updates are not read any more, because {_nbytes(params):,} "
                f"bytes of parameters could not be copied; use include= or update='formula'. "
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                RuntimeWarning,
                stacklevel=2,
            )
            return {}


def _may_nest(optimizer: Any) -> bool:
    """Return whether the optimizer's step may call the step of a base class, which has hooks, too.

    Torch then calls the hooks for both.
    """
    return sum("step" in vars(kind) for kind in type(optimizer).__mro__[:-1]) > 2


def _is_nested(optimizer: Any) -> bool:
    """Return whether a step of the optimizer is called by another one; called by a hook."""
    code = getattr(type(optimizer).step, "__code__", None)
    frame: FrameType | None = sys._getframe(1)
    found = 0
    while frame is not None:
        found += frame.f_code is code and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return found > 1


def _skips(optimizer: Any) -> bool:
    """Return whether a fused optimizer skips this step, because a gradient scaler found infinities.

    This waits for a GPU. The scaler itself skips the steps of other optimizers.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _nbytes(params: list[Tensor]) -> int:
    """Return the bytes of the elements of parameters that this rank holds."""
    local = [getattr(p, "_local_tensor", p) for p in params]
    return sum(p.numel() * p.element_size() for p in local)
