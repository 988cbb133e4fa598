"""Reading in a child of fork(), which has none of the threads of torch in its parent."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from paramstats.checkpoints import compare, summarize_file

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="fork() exists on POSIX only")


@pytest.mark.parametrize("function", ["summarize_file", "compare"])
def test_a_forked_child_reads(tmp_path, function):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(1 << 18), "v": torch.ones(1 << 18, dtype=torch.float64)}, path)
    torch.ones(1 << 22).sin().sum()  # starts the threads of the parent
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # ends a child that waits for threads
        if function == "compare":
            right = [row.change_norm for row in compare(path, path).rows] == [0, 0]
        else:
            right = summarize_file(path)["w"].norm == 512
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
