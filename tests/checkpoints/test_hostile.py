"""Small files that ask for much time or memory are refused in little of either."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paramstats.checkpoints import summarize_file
from paramstats.checkpoints._budget import Budget
from paramstats.checkpoints._pickles.storages import LEGACY_PREFIX
from tests.checkpoints.files import safetensors_bytes, save
from tests.checkpoints.test_broken_files import pickled

STRING = b"\x8c\x01k"
TENSOR = b"ctorch._utils\n_rebuild_sparse_tensor\n"
PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
SIZE, ORDERED = b"ctorch\nSize\n", b"ccollections\nOrderedDict\n"
SHARED = b"K\x00" + b"q\x00h\x00\x86" * 60
"""A tuple that contains itself twice, sixty levels deep: small in memory, endless to hash."""

ENTRY = b"\x80\x02}" + STRING
DENSE = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nK\x02tQ"
    b"K\x00K\x01\x85K\x01\x85\x89)tR"
)
OBJECT, ARRAY = b"cos\nx\n", b"cnumpy.core.multiarray\n_reconstruct\n"
DTYPE = b"cnumpy\ndtype\nVu1\n\x85R(K\x03V|\ntb"
SUBCLASS = b"ctorch._tensor\n_rebuild_from_type_v2\n"
WRAPPED = b"ctorch._utils\n_rebuild_wrapper_subclass\ncos\nx\n(cos\nx\nctorch\nfloat32\nK\x01\x85t"
PRIME = (1 << 61) - 1
"""Its multiples have one hash."""


def integers(count: int, step: int, after: bytes = b"N") -> bytes:
    """Return instructions that push integers."""
    encoded = (pickle.encode_long(i * step) for i in range(1, count))
    return b"".join(b"\x8a" + bytes([len(e)]) + e + after for e in encoded)


def repeated(value: bytes, function: bytes, instructions: bytes, count: int) -> bytes:
    """Return a pickle that makes a value (2) and uses it and a function (1) many times."""
    start = b"\x80\x02" + function + b"q\x010" + value + b"q\x020"
    return start + b"](" + instructions * count + b"e."


NUMBERS = b"](" + b"J\xff\xff\x00\x00" * 50_000 + b"e"
PAIRS = b"](" + STRING + b"N\x86q\x03" + b"h\x03" * 30_000 + b"e"
LONG_TEXT = b"X\xa0\x0f\x00\x00" + b"k" * 4000
ODD_TEXT = b"X\x44\x0d\x03\x00" + "\U000e0001".encode() * 50_000 + "\U0001f600".encode()
"""Its repr needs ten times its memory."""
WIDE_TEXT = b"X\x40\x9c\x00\x00" + "\U0001f600".encode() * 10_000
PICKLES = {
    "key of nested tuples": b"\x80\x02})" + b"\x85" * 70_000 + b"K\x00s.",
    "shared key": b"\x80\x02}" + SHARED + b"K\x00s.",
    "shared key of a tensor": b"\x80\x02}" + SHARED + DENSE + b"s.",
    "shared member of a set": b"\x80\x04\x8f(" + SHARED + b"\x90.",
    "shared frozen set": b"\x80\x04(" + SHARED + b"\x91.",
    "name that is a tuple": b"\x80\x04" + SHARED + STRING + b"\x93.",
    "pairs of a mapping": b"\x80\x02" + ORDERED + b"]" + SHARED + b"K\x00\x86a\x85R.",
    "tensors in tensors": ENTRY + b"K\x00q\x01" + (TENSOR + b"h\x01h\x01\x86Rq\x01") * 60 + b"s.",
    "parameters in parameters": ENTRY + PARAMETER + b"q\x02" + b"h\x02" * 5000 + b"K\x00"
    + b"\x85R" * 5000 + b"s.",
    "long names": b"\x80\x02}" + LONG_TEXT + b"q\x01" + b"}h\x01" * 900 + b"}s" + b"s" * 900 + b".",
    "numbers": b"\x80\x02" + b"K\x00" * 100_000 + b".",
    "empty dicts": b"\x80\x02" + b"}" * 150_000 + b".",
    "empty sets": b"\x80\x04" + b"\x8f" * 150_000 + b".",
    "calls": repeated(b")", TENSOR, b"h\x01)R", 30_000),
    "calls with long arguments": repeated(
        b"(" + b"K\x07" * 50_000 + b"t", TENSOR, b"h\x01h\x02\x85R", 10_000
    ),
    "attributes": repeated(b"}", TENSOR, b"h\x01)Rh\x02b", 20_000),
    "copies of bytes": repeated(
        b"B\x20\xa1\x07\x00" + b"x" * 500_000, SIZE, b"h\x01h\x02\x85R", 20_000
    ),
    "copies of a list": repeated(NUMBERS + b"\x85", SIZE, b"h\x01h\x02R", 20_000),
    "copies of a dict": repeated(
        b"}(" + integers(30_000, 1) + b"u", ORDERED, b"h\x01h\x02\x85R", 20_000
    ),
    "copies of pairs": repeated(PAIRS, ORDERED, b"h\x01h\x02\x85R", 20_000),
    "name in many tensors": b"\x80\x02](}" + LONG_TEXT + b"q\x01" + DENSE + b"q\x02s"
    + b"}h\x01h\x02s" * 20_000 + b"e.",
    "wide names": repeated(WIDE_TEXT, SIZE, b"}h\x02}N}ss", 20_000),
    "visits of a list": repeated(NUMBERS, SIZE, b"h\x02", 30_000),
    "key of wide texts": b"\x80\x02}(" + ODD_TEXT + b"q\x010(" + b"h\x01" * 64 + b"t"
    + DENSE + b"u.",
    "colliding keys": b"\x80\x02}(" + integers(50_000, PRIME) + b"u.",
    "colliding pairs": b"\x80\x02}(" + integers(50_000, PRIME, b"\x85N") + b"u.",
    "colliding members": b"\x80\x04\x8f(" + integers(50_000, PRIME, b"") + b"\x90.",
    "objects that share a state": repeated(
        b"}(" + integers(30_000, 1) + b"K\x00](K\x00K\x00eu", OBJECT, b"h\x01)Rh\x02b", 20_000
    ),
    "subclasses that share a state": repeated(
        b"}(" + integers(30_000, 1) + b"u", SUBCLASS, b"h\x01(" + WRAPPED + b"h\x02tR", 10_000
    ),
    "subclasses in subclasses": ENTRY + SUBCLASS + b"q\x010Nq\x020"
    + (b"h\x01(" + WRAPPED + b"}Vx\nh\x02stRq\x020") * 8_000 + b"h\x02s.",
    "objects in objects": ENTRY + OBJECT + b"q\x010Nq\x020" + b"h\x01h\x02\x85Rq\x020" * 60_000
    + b"h\x02s.",
    "arrays of the same bytes": repeated(
        b"B\x00\x00\x03\x00" + bytes(0x30000), ARRAY,
        b"h\x01)R(K\x01J\x00\x00\x03\x00\x85" + DTYPE + b"\x89h\x02tb", 5_000
    ),
    "views of the same array": repeated(
        b"B\x00\x00\x03\x00" + bytes(0x30000), ARRAY,
        b"".join(
            b"h\x01)R(K\x01(" + b"K\x01" * n + b"J\x00\x00\x03\x00t" + DTYPE + b"\x89h\x02tb"
            for n in range(60)
        ),
        60,
    ),
    "storages in the same bytes": repeated(
        b"B\x00\x20\x00\x00" + LEGACY_PREFIX + b"x" * (0x2000 - len(LEGACY_PREFIX)),
        b"ctorch.storage\n_load_from_bytes\n", b"h\x01h\x02\x85R", 20_000
    ),
    "cycle": b"\x80\x02]q\x01(" + b"h\x01" * 100_000 + b"e.",
    "equal names": b"\x80\x02" + DENSE + b"q\x010}(" + (OBJECT + b"h\x01") * 30_000 + b"u.",
    "large index in the memo": b"\x80\x02Nr\xff\xff\xff\xef.",
    "digits": b"\x80\x02L" + b"9" * 200_000 + b"L\n.",
    "long number": ENTRY[:3] + b"\x8b\x40\x0d\x03\x00" + b"\x7f" * 200_000 + DENSE + b"s.",
}  # fmt: skip

MAX_MEGABYTES = 32
"""Memory for less than half a megabyte of data, if the budget begins with `BASE` bytes."""

BASE = 4 << 20

SCRIPT = f"""
import json, pathlib, sys
from paramstats.checkpoints import CheckpointError, summarize_file
from paramstats.checkpoints._budget import Budget

Budget.BASE = {BASE}

def peak():  # in megabytes, since the last call
    status = pathlib.Path("/proc/self/status").read_text()
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024

for path in sys.argv[1:]:
    peak()
    before = peak()
    try:
        result = f"read {{dict(summarize_file(path).skipped)}}"
    except CheckpointError as error:
        result = str(error)[:300]
    print(json.dumps([peak() - before, result]), flush=True)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="no peak memory of a moment on this system"
)
def test_hostile_files_need_little_memory_and_time(tmp_path):
    """Read all files in one process, and measure its peak memory for each."""
    paths = []
    for i, data in enumerate((*PICKLES.values(), b"")):
        paths.append(tmp_path / f"{i}.pt")
        paths[-1].write_bytes(pickled(data)[1])
    with open(paths[-1], "r+b") as file:
        file.truncate(3 << 30)
    names = [*PICKLES, "zeros", "an expanded tensor", "brackets"]
    paths += [tmp_path / "expanded.pt", tmp_path / "lists.safetensors"]
    torch.save({"w": torch.ones(1).expand(1 << 45)}, paths[-2])
    paths[-1].write_bytes(safetensors_bytes(b'{"a":[' + b"[]," * 1_100_000 + b"[]]}"))
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    results = dict(zip(names, map(json.loads, process.stdout.splitlines()), strict=True))
    assert process.returncode == 0, process.stderr
    for name, (megabytes, result) in results.items():
        assert megabytes < MAX_MEGABYTES, name
        starts = ("paramstats.checkpoints.summarize_file: expected", "read {")
        assert result.startswith(starts), (name, result)
    assert "an expanded tensor" in results["an expanded tensor"][1]


def model(count: int) -> dict[str, torch.Tensor]:
    return {f"model.layers.{i}.attention.query.weight": torch.ones(1) for i in range(count)}


def adam(count: int) -> dict[str, object]:
    one = torch.ones(1)
    state = {i: {"step": one + 0, "exp_avg": one + 1, "exp_avg_sq": one + 2} for i in range(count)}
    return {"state": state, "param_groups": [{"lr": 0.1, "params": list(range(count))}]}


def shared(count: int) -> dict[str, object]:
    weights = model(count)
    return {"model": weights, "ema": weights, "best": [weights]}


REAL = {
    "model": model,
    "optimizer": lambda n: {"model": model(n), "optimizer": adam(n)},
    "shared weights": shared,
    "numbers": lambda n: {"w": torch.ones(1), "order": list(range(20 * n)), "zeros": [0] * 20 * n},
    "words": lambda n: {"w": torch.ones(1), "words": {f"word{i}": i for i in range(20 * n)}},
    "floats": lambda n: {"w": torch.ones(1), "losses": [i / 7 for i in range(20 * n)]},
    "dicts": lambda n: {"w": torch.ones(1), "metadata": {f"m.{i}": {} for i in range(20 * n)}},
}


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_writes_is_within_the_limits_at_any_size(tmp_path, monkeypatch, kind, protocol):
    monkeypatch.setattr(Budget, "BASE", 1 << 12)  # the part that does not grow with the file
    torch.save(REAL[kind](200), tmp_path / "a.pt", pickle_protocol=protocol)
    assert len(summarize_file(tmp_path / "a.pt")) >= 1


def test_what_distributed_checkpoints_hold_is_within_the_limits_at_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(Budget, "BASE", 0)
    assert len(summarize_file(save(model(200), "dcp", tmp_path))) == 200
