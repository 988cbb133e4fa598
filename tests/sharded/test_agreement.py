"""Tensors and arguments that differ between ranks are refused on all of them."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

import paramstats
from tests.sharded.models import messages_of, sharded
from tests.sharded.ranks import on_ranks

_TENSORS = {
    "shape": (
        lambda: {"w": torch.ones(3)},
        lambda: {"w": torch.ones(4)},
        r"shape for 'w' on all ranks, got \(3,\) on rank 0 and \(4,\) on rank 1",
    ),
    "dtype": (
        lambda: {"w": torch.ones(3)},
        lambda: {"w": torch.ones(3, dtype=torch.float64)},
        r"dtype for 'w' on all ranks, got torch\.float32 on rank 0 and torch\.float64 on rank 1",
    ),
    "kind": (
        lambda: {"w": torch.ones(3)},
        lambda: _with_buffer("w"),
        "kind for 'w' on all ranks, got param on rank 0 and buffer on rank 1",
    ),
    "ties": (
        lambda: nn.ParameterDict(dict.fromkeys("vw", nn.Parameter(torch.ones(3)))),
        lambda: nn.ParameterDict({name: torch.ones(3) for name in "vw"}),
        "'w' tied to 'v' on rank 0 and not on rank 1",
    ),
}  # fmt: skip


def _with_buffer(name: str) -> nn.Module:
    module = nn.Module()
    module.register_buffer(name, torch.ones(3))
    return module


@pytest.mark.parametrize("case", _TENSORS)
@on_ranks(3)
def test_different_tensors_of_one_name_raise_on_all_ranks(case):
    *sources, expected = _TENSORS[case]
    source = sources[dist.get_rank() == 1]()
    for async_op in (False, False, True):
        options = {"group": dist.group.WORLD, "buffers": True, "async_op": async_op}
        (message,) = messages_of(lambda: paramstats.summarize(source, **options).wait())  # noqa: B023
        assert message.startswith("ValueError: paramstats.summarize: expected ")
        assert re.search(expected, message)
        assert paramstats.summarize({"w": torch.ones(3)}, **options)["w"].count == 3


_ARGUMENTS = {
    "correction": (0, "got 1.0 on rank 0 and 0.0 on rank 1"),
    "grad_scale": (8, "got 1.0 on rank 0 and 8.0 on rank 1"),
    "params": (False, "got True on rank 0 and False on rank 1"),
    "grads": (False, "got True on rank 0 and False on rank 1"),
    "buffers": (True, "got False on rank 0 and True on rank 1"),
    "include": ("w", "got None on rank 0 and ['w'] on rank 1"),
    "exclude": ("v", "got [] on rank 0 and ['v'] on rank 1"),
}


@pytest.mark.parametrize("name", _ARGUMENTS)
@on_ranks(3)
def test_different_arguments_raise_on_all_ranks(name):
    value, expected = _ARGUMENTS[name]
    source = {"w": sharded(torch.arange(6.0))}
    own = {name: value} if dist.get_rank() == 1 else {}
    for async_op in (False, True):
        (message,) = messages_of(
            lambda: paramstats.summarize(source, async_op=async_op, **own).wait()  # noqa: B023
        )
        assert message == (
            f"ValueError: paramstats.summarize: expected the same {name} on all ranks, {expected}"
        )
        assert paramstats.summarize(source, async_op=async_op, **{name: value})["w"].count == 6


@on_ranks(2)
def test_data_of_another_collective_call_are_refused():
    source, group = {"w": torch.ones(3)}, dist.new_group()
    if dist.get_rank() == 1:
        dist.all_gather(list(torch.empty(2, 10).long()), torch.ones(10).long(), group=group)
        return
    for _ in range(2):
        with pytest.raises(RuntimeError, match="got the data of another call from rank 1"):
            paramstats.summarize(source, group=group)
