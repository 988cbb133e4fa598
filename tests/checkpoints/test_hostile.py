"""Small files that ask for more time or memory than there is: refused, in little of either."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from paramstats.checkpoints import CheckpointError, summarize_file
from paramstats.checkpoints._stored import Part, Stored, check_total
from tests.checkpoints.files import save_file

STRING = b"\x8c\x01k"
TENSOR = b"ctorch._utils\n_rebuild_sparse_tensor\n"
PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
SHARED = b"K\x00" + b"q\x00h\x00\x86" * 60
"""A tuple of itself twice, sixty times over: small in memory, endless to hash or to print."""

ENTRY = b"\x80\x02}" + STRING
PICKLES = {
    "a key of tuples in tuples": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x00s.",
    "a shared key": b"\x80\x02}" + SHARED + b"K\x00s.",
    "a shared member of a set": b"\x80\x04\x8f(" + SHARED + b"\x90.",
    "a shared frozen set": b"\x80\x04(" + SHARED + b"\x91.",
    "a name that is a tuple": b"\x80\x04" + SHARED + STRING + b"\x93.",
    "pairs of a mapping": b"\x80\x02ccollections\nOrderedDict\n]" + SHARED + b"K\x00\x86a\x85R.",
    "tensors in tensors": ENTRY + b"K\x00q\x01" + (TENSOR + b"h\x01h\x01\x86Rq\x01") * 60 + b"s.",
    "parameters in parameters": ENTRY + PARAMETER + b"q\x02" + b"h\x02" * 5000 + b"K\x00"
    + b"\x85R" * 5000 + b"s.",
    "long names": b"\x80\x02}X\x00\x00\x10\x00" + b"k" * (1 << 20) + b"q\x01" + b"}h\x01" * 900
    + b"}s" + b"s" * 900 + b".",
    "dicts": b"\x80\x02" + b"}" * 3_000_000 + b".",
    "numbers": b"\x80\x02" + b"K\x00" * 11_000_000 + b".",
}  # fmt: skip

SCRIPT = """
import resource, sys
from paramstats.checkpoints import CheckpointError, summarize_file
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for path in sys.argv[1:]:
    try:
        summary = summarize_file(path)
        print(path, "read", dict(summary.skipped))
    except CheckpointError as error:
        print(path, str(error)[:300])
print(peak() - before)
"""


def archive(path: Path, data: bytes) -> Path:
    """A torch.save file whose pickle is `data`."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", data)
        file.writestr("x/data/0", b"\0" * 8)
    return path


def test_pickles_that_never_end(tmp_path):
    """All of them in one process, whose memory is looked at: what is refused is refused early."""
    pytest.importorskip("resource", reason="this system does not count a process's memory")
    paths = [archive(tmp_path / f"{name}.pt", data) for name, data in PICKLES.items()]
    torch.save({"w": torch.ones(1).expand(1 << 45)}, tmp_path / "expanded.pt")
    paths.append(tmp_path / "expanded.pt")
    header = b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"
    (tmp_path / "lists.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    paths.append(tmp_path / "lists.safetensors")
    with open(archive(tmp_path / "zeros.pt", b""), "r+b") as file:
        file.truncate(3 << 30)
    paths.append(tmp_path / "zeros.pt")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=180,
    )
    *lines, more = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(paths), done.stderr
    for path, line in zip(paths, lines, strict=True):
        said = line.removeprefix(str(path)).strip()
        assert said.startswith(("paramstats: expected", "read {")), line
    assert "an expanded tensor" in done.stdout
    assert int(more) < 500, "MB beside what imports take"


def test_a_small_expanded_tensor_is_read(tmp_path):
    torch.save({"w": torch.ones(1).expand(3, 4)}, tmp_path / "a.pt")
    assert summarize_file(tmp_path / "a.pt")["w"].norm == pytest.approx(12**0.5)


def test_a_tensor_too_large_to_count(tmp_path):
    torch.save({"w": torch.empty(1 << 40, 1 << 20, device="meta")}, tmp_path / "a.pt")
    with pytest.warns(RuntimeWarning, match="a meta tensor"):
        assert summarize_file(tmp_path / "a.pt")["w"].count == 1 << 60
    torch.save(
        {"w": torch.empty(1 << 40, 1 << 22, device="meta", dtype=torch.uint8)}, tmp_path / "b.pt"
    )
    with pytest.raises(CheckpointError, match="more elements than can be counted"):
        summarize_file(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("boxes", "fits"),
    [
        ([((0,), (3,)), ((3,), (1,))], True),
        ([((0,), (3,)), ((2,), (1,))], False),
        ([((0,), (3,)), ((0,), (1,))], False),
        ([((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 4))], True),
        ([((0, 0), (2, 3)), ((0, 2), (2, 2)), ((2, 0), (2, 3))], False),
        ([((), ())], True),
        ([((), ()), ((), ())], False),
    ],
)
def test_parts_must_not_overlap(boxes, fits):
    shape = tuple(4 for _ in boxes[0][0])
    parts = tuple(Part("x", 0, sizes, (1,) * len(sizes), starts) for starts, sizes in boxes)
    tensor = Stored("w", shape, torch.float32, parts)
    if fits:
        check_total(tensor, "here")
    else:
        with pytest.raises(CheckpointError, match="expected parts with"):
            check_total(tensor, "here")


def test_one_process_s_part_is_not_taken_for_the_whole(tmp_path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": {"DCP_SHARDING_INFO": "{}"}, "w": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"one process's parts.*consolidate"):
        summarize_file(path)


def test_an_index_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="no regular file"):
        summarize_file(tmp_path)


def test_a_file_that_is_replaced_while_it_is_read(tmp_path):
    for name in ("a", "b"):
        save_file({name: torch.ones(3_000_000)}, tmp_path / f"{name}.safetensors")
    save_file({"b": torch.full((3_000_000,), 7.0)}, tmp_path / "new")

    def replace(done: int, total: int) -> None:
        if (tmp_path / "new").exists():
            os.replace(tmp_path / "new", tmp_path / "b.safetensors")

    with pytest.raises(CheckpointError, match=r"got .*b\.safetensors, which has changed"):
        summarize_file(tmp_path, progress=replace)
    assert summarize_file(tmp_path)["b"].mean == 7
