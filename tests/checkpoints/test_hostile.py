"""Small files that ask for much time or memory are refused in little of either."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.checkpoints.files import safetensors_bytes
from tests.checkpoints.test_broken_files import pickled

STRING = b"\x8c\x01k"
TENSOR = b"ctorch._utils\n_rebuild_sparse_tensor\n"
PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
SHARED = b"K\x00" + b"q\x00h\x00\x86" * 60
"""A tuple that contains itself twice, sixty levels deep: small in memory, endless to hash."""

ENTRY = b"\x80\x02}" + STRING
PICKLES = {
    "key of nested tuples": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x00s.",
    "shared key": b"\x80\x02}" + SHARED + b"K\x00s.",
    "shared member of a set": b"\x80\x04\x8f(" + SHARED + b"\x90.",
    "shared frozen set": b"\x80\x04(" + SHARED + b"\x91.",
    "name that is a tuple": b"\x80\x04" + SHARED + STRING + b"\x93.",
    "pairs of a mapping": b"\x80\x02ccollections\nOrderedDict\n]" + SHARED + b"K\x00\x86a\x85R.",
    "tensors in tensors": ENTRY + b"K\x00q\x01" + (TENSOR + b"h\x01h\x01\x86Rq\x01") * 60 + b"s.",
    "parameters in parameters": ENTRY + PARAMETER + b"q\x02" + b"h\x02" * 5000 + b"K\x00"
    + b"\x85R" * 5000 + b"s.",
    "long names": b"\x80\x02}X\x00\x00\x10\x00" + b"k" * (1 << 20) + b"q\x01" + b"}h\x01" * 900
    + b"}s" + b"s" * 900 + b".",
    "dicts": b"\x80\x02" + b"}" * 3_000_000 + b".",
    "numbers": b"\x80\x02" + b"K\x00" * 3_100_000 + b".",
}  # fmt: skip

SCRIPT = """
import resource, sys
from paramstats.checkpoints import CheckpointError, _pickles, summarize_file
_pickles._MAX_INSTRUCTIONS = 3_000_000  # 10 million would take longer
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for path in sys.argv[1:]:
    try:
        summary = summarize_file(path)
        print("read", dict(summary.skipped))
    except CheckpointError as error:
        print(str(error)[:300])
print(peak() - before)
"""


def test_hostile_files_need_little_memory(tmp_path):
    """Read all files in one process, so that its peak memory covers every one of them."""
    pytest.importorskip("resource", reason="this system does not measure a process's memory")
    paths = []
    for name, data in {**PICKLES, "zeros": b""}.items():
        paths.append(tmp_path / f"{name}.pt")
        paths[-1].write_bytes(pickled(data)[1])
    with open(paths[-1], "r+b") as file:
        file.truncate(3 << 30)
    paths += [tmp_path / "expanded.pt", tmp_path / "lists.safetensors"]
    torch.save({"w": torch.ones(1).expand(1 << 45)}, paths[-2])
    paths[-1].write_bytes(safetensors_bytes(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"))
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=180,
    )
    *lines, megabytes = process.stdout.splitlines()
    assert process.returncode == 0 and len(lines) == len(paths), process.stderr
    for line in lines:
        assert line.startswith(("paramstats.checkpoints.summarize_file: expected", "read {")), line
    assert "an expanded tensor" in process.stdout
    assert int(megabytes) < 500, "megabytes beyond those of the imports"
