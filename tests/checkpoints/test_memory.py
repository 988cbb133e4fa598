"""A checkpoint larger than the memory it is read in."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.checkpoints.files import save

pytest.importorskip("resource", reason="this system does not count a process's memory")

MEGABYTES = 192
MOST = 64
"""Beyond what the imports take: buffers, code that is first used, and room for the allocator."""

READ = """
import json, resource, sys
from paramstats.checkpoints import compare_files, summarize_file
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path, before = sys.argv[1], peak()
assert len(summarize_file(path)) == len(compare_files(path, path).rows) == 2
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "pt", "legacy", "dcp"])
def test_a_file_is_never_held_whole(tmp_path, form):
    x = torch.linspace(0, 1, MEGABYTES * 1024 * 1024 // 8)
    path = save({"a": x, "b": x.clone().view(1024, -1).t()}, form, tmp_path)
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert json.loads(done.stdout) * unit < MOST * 1024 * 1024
