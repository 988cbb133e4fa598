"""A call on ranks ends in time, whatever a rank does, and the next call works."""

from __future__ import annotations

import functools
import os
import time

import pytest
import torch.distributed as dist

from tests.sharded import ranks


def _on_rank_1(action) -> None:
    if dist.get_rank() == 1:
        action()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (functools.partial(int, "on purpose"), "rank 1: .*'on purpose'"),
        (functools.partial(os._exit, 1), "rank 1: the process has ended"),
        (functools.partial(time.sleep, 600), "rank 1 did not finish"),
    ],
)
def test_failing_rank_fails_the_call_and_not_the_next_one(action, message, monkeypatch):
    monkeypatch.setattr(ranks, "_GRACE_SECONDS", 1)
    if "finish" in message:
        monkeypatch.setattr(ranks, "SECONDS", 5)
    with pytest.raises(pytest.fail.Exception, match=f"(?s){message}"):
        ranks.run_on_ranks(2, _on_rank_1, action)
    monkeypatch.undo()
    assert ranks.run_on_ranks(2, os.getpid) == ranks.run_on_ranks(2, os.getpid)
