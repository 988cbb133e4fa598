"""Distributions, rows and zero rows of sharded tensors are those of the whole tensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import paramstats
from paramstats._core import backend as backends
from paramstats._core.details import Distribution, zero_rows_of
from paramstats._summary import record_of
from tests.sharded.ranks import on_ranks, run_on_ranks


def _weight(rows: int = 37) -> torch.Tensor:
    weight = torch.randn(rows, 24, generator=torch.Generator().manual_seed(1))
    weight[3:9] = 0
    weight[20] = weight[30]
    weight[11, 5] = torch.nan
    return weight


def _details(summary: paramstats.Summary) -> list:
    details = record_of(summary).details
    return [details.get(0), details.get(1)]


def _check(backend: str | None, placements: tuple, shape: tuple[int, ...]) -> None:
    before = backends.active()
    backends._active = backends.choose(backend) if backend else before
    try:
        whole = torch.nn.Parameter(_weight())
        whole.grad = _weight().flip(0)
        names = [f"dim{i}" for i in range(len(shape))]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        sharded = torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, placements))
        sharded.grad = distribute_tensor(whole.grad, mesh, placements)
        options = {"distribution": True, "rows": True}
        expected = _details(paramstats.summarize({"w": whole}, **options))
        summary = paramstats.summarize({"w": sharded}, **options)
        is_rows = all(p.is_replicate() or p.dim == 0 for p in placements)
        assert set(summary.skipped) == (set() if is_rows else {"w (rows)", "w (gradient, rows)"})
        for one, of_whole in zip(_details(summary), expected, strict=True):
            got, truth = map(Distribution.unpack, (one.distribution, of_whole.distribution))
            counts = slice(0, 4)
            assert got[counts] == truth[counts]
            assert got[4:9] == pytest.approx(truth[4:9], rel=1e-6)
            assert one.rows == (of_whole.rows if is_rows else None)
            assert zero_rows_of(one.zero_rows) == zero_rows_of(of_whole.zero_rows)
            assert len(zero_rows_of(one.zero_rows)) == 6
    finally:
        backends._active = before


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    ("placements", "shape"),
    [
        ((Shard(0),), (2,)),
        ((Shard(0),), (4,)),
        ((Shard(1),), (2,)),
        ((Replicate(), Shard(0)), (2, 2)),
        ((Shard(0), Shard(0)), (2, 2)),
        ((Shard(0), Shard(1)), (2, 2)),
    ],
)
def test_shards_have_the_details_of_the_whole(placements, shape, backend):
    run_on_ranks(shape[0] * (shape[1] if len(shape) > 1 else 1), _check, backend, placements, shape)


@on_ranks(2)
def test_zero_rows_that_only_one_rank_has_are_found_without_asking():
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.ones(8, 4)
    weight[6] = 0
    summary = paramstats.summarize({"w": distribute_tensor(weight, mesh, [Shard(0)])})
    assert zero_rows_of(_details(summary)[0].zero_rows) == (6,)


@on_ranks(2)
def test_slices_have_a_distribution_and_no_rows():
    rank = dist.get_rank()
    part = torch.arange(20.0)[10 * rank : 10 * rank + 10]
    shard = paramstats.LocalShard(part, index=rank, numel=20, shape=(5, 4))
    summary = paramstats.summarize({"w": shard}, distribution=True, rows=True)
    assert set(summary.skipped) == {"w (rows)"}
    detail, _ = _details(summary)
    assert Distribution.unpack(detail.distribution).positive == (1, 2, 4, 8, 4)


@on_ranks(2)
def test_partial_tensors_have_a_reason():
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
    weight.grad = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    summary = paramstats.summarize({"w": weight}, distribution=True)
    assert set(summary.skipped) == {"w (gradient, distribution)"}
    assert summary["w"].grad.mean == 2
    assert _details(summary)[1] is None


@on_ranks(2)
def test_zero_rows_that_are_not_known():
    mesh = init_device_mesh("cpu", (2,))
    values = torch.ones(4, 4)
    values[2] = 0
    weight = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Replicate()]))
    weight.grad = DTensor.from_local(values, mesh, [Partial()])
    flat = torch.arange(10.0) % 4 + 0  # with fewer zeros than a row has elements, or with more
    shards = {
        "few": paramstats.LocalShard(flat, index=dist.get_rank(), numel=20, shape=(2, 10)),
        "more": paramstats.LocalShard(flat, index=dist.get_rank(), numel=20, shape=(5, 4)),
        "all": paramstats.LocalShard(flat * 0, index=dist.get_rank(), numel=20, shape=(5, 4)),
    }
    summary = paramstats.summarize({"w": weight, **shards})
    assert summary["w"].zero_rows == (0, 1, 2, 3) and summary["w"].grad.zero_rows is None
    assert summary["few"].zero_rows == () and summary["more"].zero_rows is None
    assert summary["all"].zero_rows == (0, 1, 2, 3, 4)
    assert paramstats.summarize({"w": weight}, params=False)["w"].zero_rows is None


@on_ranks(2)
def test_different_arguments_are_refused():
    mesh = init_device_mesh("cpu", (2,))
    source = {"w": distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])}
    for first, second, got in ((True, False, "True"), ("w", True, r"\['w'\]")):
        value = first if dist.get_rank() == 0 else second
        with pytest.raises(ValueError, match=f"the same distribution on all ranks, got {got}"):
            paramstats.summarize(source, distribution=value)
    with pytest.warns(RuntimeWarning, match="no name matches rows="):
        paramstats.summarize(source, rows="nothing")


@on_ranks(2)
def test_ranks_with_other_hashes_of_rows():
    before = backends.active()
    mesh = init_device_mesh("cpu", (2,))
    source = {"w": distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])}
    assert paramstats.summarize(source, rows=True)["w"].rows.equal == ((0, 1, 2, 3),)
    if dist.get_rank() == 1:
        backends._active = backends.choose("reference")
    try:
        summary = paramstats.summarize(source, rows=True)
    finally:
        backends._active = before
    assert summary["w"].rows is None and "hashes" in summary.skipped["w (rows)"]
