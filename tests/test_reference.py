"""The reference backend where the CPU does not show it: on devices that must not be waited for."""

from __future__ import annotations

import pytest
import torch

import paramstats
from paramstats._core import moments, reference
from paramstats._core.layout import Layout
from paramstats._summary import Summary
from tests import oracle


def test_the_definition_never_looks_at_a_value():
    """On the meta device there are no values: an operator that needs one would raise."""
    row = reference.exact(torch.empty(1000, device="meta"))
    assert row.shape == (9,) and row.dtype == torch.float64


def test_the_definition_agrees_with_the_quick_road():
    torch.manual_seed(0)
    for x in (torch.randn(5000), 1000 + torch.randn(5000), torch.zeros(7)):
        slow = paramstats.TensorStats(reference._from_row(reference.exact(x).tolist()), 1)
        fast = reference.quick(x)
        oracle.check(slow, x)
        if fast is not None:
            oracle.check(paramstats.TensorStats(fast, 1), x)


def test_pending_states_are_merged_in_order_when_waited_for():
    torch.manual_seed(0)
    x = torch.randn(3000)
    chunks = x.split(1000)
    rows = [(0, 5)] * len(chunks)
    pending = reference.Pending(
        torch.device("cpu"), rows, [reference.exact(chunk) for chunk in chunks]
    )
    assert pending.ready()
    table = bytearray(2 * moments.ROW.size)
    pending.write(table)
    state = moments.row(bytes(table), 0)
    oracle.check(paramstats.TensorStats(state, 1), torch.cat([torch.zeros(5), x]))


class Late:
    """Stands for a transfer that is under way."""

    def __init__(self, row: int, state: moments.Moments) -> None:
        self.row, self.state, self.waits = row, state, 0

    def ready(self) -> bool:
        return self.waits > 0

    def write(self, table: bytearray) -> None:
        self.waits += 1
        moments.ROW.pack_into(table, self.row * moments.ROW.size, *self.state)


@pytest.mark.parametrize(
    "read",
    [
        lambda s: s["w"].grad.norm,
        lambda s: s.total.grad.norm,
        lambda s: s.scalars()["grad_norm/w"],
        lambda s: s.to_dict()["params"]["w"]["grad"]["norm"],
        lambda s: s.wait()["w"].grad.norm,
    ],
)
def test_reading_a_figure_waits_once(read):
    w = torch.ones(3)
    layout = Layout.of(("w",), ((),), 1, [w])
    own = reference._from_row(reference.exact(w).tolist())
    table = b"".join(moments.ROW.pack(*state) for state in (own, moments.unread(3)))
    late = Late(1, reference._from_row(reference.exact(2 * w).tolist()))
    summary = Summary(layout, table, 1, 1.0, (late,))
    assert not summary.ready() and late.waits == 0
    assert repr(summary) == "<Summary of 1 tensors, 1 with gradients>"
    for _ in range(2):
        assert read(summary) == pytest.approx(12**0.5)
    assert summary.ready() and late.waits == 1


def test_under_a_fake_tensor_mode(backend, model):
    """Real tensors summarised while a dispatch mode is on, and fake ones: no crash."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    expected = paramstats.summarize(model)["0.weight"].norm
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.ones(3))
    paramstats._core.reading._warned.clear()
    with pytest.warns(RuntimeWarning, match="could not be read"):
        summary = paramstats.summarize({"fake": fake, "real": torch.ones(4)})
    assert summary["real"].norm == 2.0 and "fake" in summary.skipped
    assert paramstats.summarize(model)["0.weight"].norm == expected


def test_inside_vmap(backend):
    """functorch's wrappers cannot be read one by one: a reason, not a crash."""

    def inner(x):
        summary = paramstats.summarize({"x": x, "whole": torch.ones(4)})
        assert "x" in summary.skipped and summary["whole"].norm == 2.0
        return x

    paramstats._core.reading._warned.clear()
    with pytest.warns(RuntimeWarning, match="could not be read"):
        torch.vmap(inner)(torch.ones(3, 4))
