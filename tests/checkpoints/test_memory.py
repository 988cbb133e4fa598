"""A checkpoint may be larger than the memory of the process that reads it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.checkpoints.files import save

pytest.importorskip("resource", reason="this system does not measure a process's memory")

FILE_MEGABYTES = 192
MAX_MEGABYTES = 64
"""Memory beyond that of the imports: buffers, code that is first used, and the allocator's."""

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
def test_file_is_never_in_memory_as_a_whole(tmp_path, form):
    x = torch.linspace(0, 1, FILE_MEGABYTES * 1024 * 1024 // 8)
    path = save({"a": x, "b": x.clone().view(1024, -1).t()}, form, tmp_path)
    process = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert json.loads(process.stdout) * unit < MAX_MEGABYTES * 1024 * 1024
