"""The parts of the reference backend that devices other than the CPU use."""

from __future__ import annotations

import pytest
import torch

import paramstats
from paramstats._core import moments, reference, states
from tests import oracle


def test_the_exact_computation_never_reads_a_value_on_the_host():
    """On the meta device there are no values: an operator that needs one would raise."""
    row = states.exact(torch.empty(1000, device="meta"))
    assert row.shape == (9,) and row.dtype == torch.float64


def test_the_quick_computation_agrees_with_the_exact_one():
    torch.manual_seed(0)
    for x in (torch.randn(5000), 1000 + torch.randn(5000), torch.zeros(7)):
        exact = oracle.stats_of(states.from_row(states.exact(x).tolist()))
        quick = states.quick(x)
        oracle.check(exact, x)
        if quick is not None:
            oracle.check(oracle.stats_of(quick), x)


def test_pending_chunks_of_a_row_are_merged_with_its_zeros():
    torch.manual_seed(0)
    x = torch.randn(3000)
    chunks = x.split(1000)
    rows = [(0, 5)] * len(chunks)
    pending = reference.Pending(
        torch.device("cpu"), rows, [states.exact(chunk) for chunk in chunks]
    )
    assert pending.ready()
    table = bytearray(2 * moments.ROW.size)
    pending.write(table)
    state = moments.row(bytes(table), 0)
    oracle.check(oracle.stats_of(state), torch.cat([torch.zeros(5), x]))


def test_fake_tensors_are_skipped_with_a_reason(backend, model, new_warnings):
    from torch._subclasses.fake_tensor import FakeTensorMode

    expected = paramstats.summarize(model)["0.weight"].norm
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.ones(3))
    with pytest.warns(RuntimeWarning, match="could not be read"):
        summary = paramstats.summarize({"fake": fake, "real": torch.ones(4)})
    assert summary["real"].norm == 2.0 and "fake" in summary.skipped
    assert paramstats.summarize(model)["0.weight"].norm == expected
