"""Reading in a child of fork(), which has none of the threads of torch in its parent."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from paramstats.checkpoints import summarize_file


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork() exists on POSIX only")
def test_a_forked_child_reads(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(1 << 18)}, path)
    torch.ones(1 << 22).sin().sum()  # starts the threads of the parent
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # ends a child that waits for threads
        os._exit(0 if summarize_file(path)["w"].norm == 512 else 1)
    assert os.waitpid(child, 0)[1] == 0
