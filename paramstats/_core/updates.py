"""The update of a parameter by its optimizer's last step, and sums of products with its gradient.

An update has four rows of `Moments`: see `ROWS`. `Update` says from which tensors they are
computed. The native backend computes them in `read`; `fill` computes them with torch operators, as
the reference backend, and where the native backend cannot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paramstats._core.detail_reader import NO_FLOAT64, reason_of
from paramstats._core.elements import check_storage, elements, gradient, numel
from paramstats._core.moments import ABSENT, ROW, Moments, is_unread, merge, unread
from paramstats._core.states import exact, from_row
from paramstats._core.torch_private import without_modes
from paramstats._core.transfers import Pending, Transfer

ROWS = UPDATE, GRAD_MOMENTUM, UPDATE_GRAD, LAG = range(4)
"""The rows of an update.

- UPDATE: the state of dw, the change of the parameter. Its zeros are the elements that did not
  change.
- GRAD_MOMENTUM, UPDATE_GRAD, LAG: the products g m, dw g and g^2 / max(v^, eps^2), where g is the
  gradient, m the momentum and v^ the bias-corrected second moment of Adam. Of these rows, only
  count, nans (the products that are not finite), the mean of the others and, in LAG, zeros have a
  meaning: zeros are the elements with sqrt(v^) < eps.
"""

_ZEROS = Moments._fields.index("zeros")

NONE, FORMULA, DIFFERENCE = range(3)
"""How the update is found: not at all, from Adam's state, or from a copy of the parameter."""

_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 22
"""Elements read at a time; a chunk's temporaries in float64 take about 100 bytes per element."""


class Update(NamedTuple):
    """The operands of an update: rows of a table of N tensors and N gradients; -1 if missing."""

    param: int
    grad: int
    momentum: int
    variance: int
    step_row: int
    """A tensor with one element: the number of the step; -1: `step` is that number."""
    old: Tensor | None
    """A copy of the parameter from before the step, for DIFFERENCE."""
    method: int
    """One of NONE, FORMULA and DIFFERENCE."""
    lr: float
    decay: float
    """The decoupled weight decay; 0 if it is a part of the gradient."""
    beta1: float
    beta2: float
    eps: float
    step: float

    def operands(self) -> tuple[int, ...]:
        """Return the rows of all operands; -1 where there is none."""
        return self.param, self.grad, self.momentum, self.variance, self.step_row

    def with_operands(self, rows: Iterable[int]) -> Update:
        """Return this update with other rows, in the order of `operands`."""
        param, grad, momentum, variance, step_row = rows
        return self._replace(
            param=param, grad=grad, momentum=momentum, variance=variance, step_row=step_row
        )

    def has_rows(self) -> tuple[bool, bool, bool, bool]:
        """Return which rows are not absent."""
        has_grad, has_update = self.grad >= 0, self.method != NONE
        return (
            has_update,
            has_grad and self.momentum >= 0,
            has_grad and has_update,
            has_grad and self.variance >= 0,
        )


@without_modes()
def fill(
    table: bytes, tensors: Sequence[Tensor], updates: Sequence[Update], deferred: Sequence[int]
) -> tuple[bytes, tuple[Transfer, ...], dict[int, str]]:
    """Compute the rows of updates that a backend has deferred.

    Args:
        table: 2 N rows for N tensors, then the rows of all updates.
        tensors: the N tensors.
        updates: all updates.
        deferred: the indexes of those to compute.

    Returns:
        The table with their rows, the transfers that complete it, and why an update could not be
        computed, by its first row.
    """
    out, n = bytearray(table), len(tensors)
    skipped: dict[int, str] = {}
    on_device: dict[torch.device, tuple[list[tuple[int, int]], list[Tensor]]] = {}
    with torch.no_grad():
        for u in deferred:
            first = 2 * n + len(ROWS) * u
            try:
                states = _states(updates[u], tensors)
            except Exception as error:  # a subclass may raise anything; training goes on
                param = tensors[updates[u].param]
                skipped[first] = reason_of(error, param)
                states = [unread(numel(param))] * len(ROWS)
            for row, state in enumerate(states, first):
                if isinstance(state, Moments):
                    ROW.pack_into(out, row * ROW.size, *state)
                elif state.is_cpu:
                    parts = [from_row(part) for part in state.tolist()]
                    ROW.pack_into(out, row * ROW.size, *merge(*parts))
                else:
                    ROW.pack_into(out, row * ROW.size, *unread(0))
                    rows, parts_on_device = on_device.setdefault(state.device, ([], []))
                    rows += [(row, 0)] * len(state)
                    parts_on_device.append(state)
    transfers = tuple(Pending(device, *parts) for device, parts in on_device.items())
    return bytes(out), transfers, skipped


def _states(update: Update, tensors: Sequence[Tensor]) -> list[Moments | Tensor]:
    """Return the state of each row: absent, or float64 rows of `Moments`, one per chunk."""

    def operand(row: int) -> Tensor | None:
        if row < 0:
            return None
        n = len(tensors)
        found = tensors[row] if row < n else gradient(tensors[row - n])
        return None if found is None else _flat(found)

    w = operand(update.param)
    assert w is not None
    old = None if update.old is None else _flat(update.old)
    g, m, v = map(operand, (update.grad, update.momentum, update.variance))
    for x in (old, g, m, v):
        if x is not None and x.numel() != w.numel():
            raise ValueError(f"expected operands of {w.numel()} elements, got {x.numel()}")
    step = operand(update.step_row)
    adam = None
    if v is not None:
        adam = _Adam(update, update.step if step is None else _number(step))
    rows: list[list[Tensor]] = [[] for _ in ROWS]
    size = _CPU_CHUNK if w.is_cpu else _DEVICE_CHUNK
    for begin in range(0, w.numel(), size):
        part = slice(begin, begin + size)
        others = [None if x is None else x[part] for x in (old, g, m, v)]
        for row, state in zip(rows, _chunk(update.method, adam, w[part], *others), strict=True):
            if state is not None:
                row.append(state)
    if not w.numel():
        empty = torch.tensor([[*Moments()]], dtype=torch.float64, device="cpu")
        rows = [[empty[0]] if has_row else [] for has_row in update.has_rows()]
    return [torch.stack(row) if row else unread(ABSENT) for row in rows]


class _Adam:
    """The constants of Adam at one step, as numbers or as tensors on the device of `step`."""

    def __init__(self, update: Update, step: float | Tensor) -> None:
        self.decay = update.lr * update.decay
        self.step_size = update.lr / (1 - update.beta1**step)
        self.root_of_correction = (1 - update.beta2**step) ** 0.5
        self.eps = update.eps

    def root(self, v: Tensor) -> Tensor:
        """Return the square root of the bias-corrected second moment."""
        return v.sqrt() / self.root_of_correction

    def update(self, w: Tensor, m: Tensor, root: Tensor) -> Tensor:
        """Return the change that led to the parameter `w`."""
        change = self.step_size * m / (root + self.eps)
        return -(self.decay * w + change) / (1 - self.decay)


def _chunk(
    method: int,
    adam: _Adam | None,
    w: Tensor,
    old: Tensor | None,
    g: Tensor | None,
    m: Tensor | None,
    v: Tensor | None,
) -> list[Tensor | None]:
    """Return the state of a chunk for each row of an update, as a float64 row of `Moments`."""
    w64, *rest = (None if x is None else x.to(torch.float64) for x in (w, old, g, m, v))
    old, g, m, v = rest
    assert w64 is not None
    root = None if v is None or adam is None else adam.root(v)
    dw, update = None, None
    if method == DIFFERENCE and old is not None:
        dw = w64 - old
        update = exact(dw)
    elif method == FORMULA and adam is not None and m is not None and root is not None:
        dw = adam.update(w64, m, root)
        update = exact(dw)
        update[_ZEROS] = (dw.isfinite() & ((w64 - dw).to(w.dtype) == w)).sum()
    lag = None
    if adam is not None and g is not None and v is not None:
        root = adam.root(v.clamp(min=0))
        lag = _products((g / root.clamp(min=adam.eps)).square())
        lag[_ZEROS] = (root < adam.eps).sum()
    return [
        update,
        None if g is None or m is None else _products(g * m),
        None if g is None or dw is None else _products(dw * g),
        lag,
    ]


def _products(x: Tensor) -> Tensor:
    """Return the state of a row of products."""
    finite = x.isfinite()
    n = finite.sum()
    mean = x.where(finite, 0.0).sum() / n.clamp(min=1)
    zero = torch.zeros_like(mean)
    columns = (zero + x.numel(), zero, x.numel() - n, zero, zero, mean, zero, zero, zero)
    return torch.stack([column.to(torch.float64) for column in columns])


def _flat(x: Tensor) -> Tensor:
    """Return all elements as a flat plain tensor, in the order of the dimensions."""
    stored, zeros = elements(x)
    if zeros:
        stored = x.to_dense()
    check_storage(stored)
    if stored.is_complex():
        raise NotImplementedError("updates of complex parameters are not read")
    if stored.device.type in NO_FLOAT64:
        stored = stored.cpu()
    return stored.reshape(-1)


def _number(x: Tensor) -> float | Tensor:
    """Return the only element of a tensor; on an accelerator as a tensor, so as not to wait."""
    return float(x) if x.is_cpu else x.to(torch.float64)


def cosine(products: Moments, norm: float, other_norm: float, scale: float = 1.0) -> float:
    """Return the cosine of two tensors from their products and norms; NaN if it is undefined.

    Args:
        products: a row of products of all elements.
        norm, other_norm: the norms of the tensors.
        scale: the factor that the products contain and the norms do not.
    """
    if products.nans or not (0 < norm < math.inf and 0 < other_norm < math.inf):
        return math.nan
    value = products.mean * products.count / scale / norm / other_norm
    return max(-1.0, min(1.0, value)) if math.isfinite(value) else math.nan  # NaN if unread


def root_mean(products: Moments, scale: float = 1.0) -> float:
    """Return the square root of the mean of products of `scale`^2 times the true values."""
    if products.nans or not products.count:
        return math.nan
    return math.sqrt(products.mean) / scale


def eps_fraction(lag: Moments) -> float:
    """Return the share of the elements with sqrt(v) < eps from a row of `LAG`."""
    return math.nan if is_unread(lag) or not lag.count else lag.zeros / lag.count


def ratio(size: float, of: float) -> float:
    """Return size / of; infinite if only `of` is 0, and NaN if both are."""
    return size / of if of else (math.inf if size > 0 else math.nan)
