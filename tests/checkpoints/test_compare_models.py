"""`compare` of models and state_dicts in memory, against torch and numpy."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from paramstats.checkpoints import compare
from paramstats.checkpoints._compare import memory
from tests.checkpoints.files import save


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.BatchNorm1d(3)
        self.large = torch.nn.Linear(1000, 1100, bias=False)  # more than a piece
        self.tied = self.large
        self.low = torch.nn.Parameter(torch.randn(5, 4).bfloat16().t())
        self.register_buffer("temporary", torch.ones(2), persistent=False)


@pytest.mark.parametrize("form", ["pt", "safetensors", "dcp"])
@pytest.mark.parametrize(
    "wrap", [Net, lambda: torch.nn.DataParallel(Net()), lambda: Net().state_dict()]
)
def test_a_model_in_memory_is_compared_with_a_file(tmp_path, form, wrap):
    source = wrap()
    tensors = source if isinstance(source, dict) else source.state_dict()
    tensors = {name.removeprefix("module."): x for name, x in tensors.items()}
    before = {name: x.clone() for name, x in tensors.items()}
    for x in before.values():
        x[(0,) * x.dim()] += 1
    path = save(before, form, tmp_path)
    for result in (compare(source, path), compare(path, source)):
        rows = {row.name: row for row in result.rows}
        assert result.only_in_a == result.only_in_b == () and result.reason == ""
        assert set(rows) == set(tensors)
        for name, x in tensors.items():
            y = before[name].double().numpy()
            assert rows[name].changed_count == (x.double().numpy() != y).sum() == 1
            change = float(np.linalg.norm(x.double().numpy() - y))
            assert rows[name].change_norm == pytest.approx(change, rel=1e-6)


def test_sources_in_memory(backend):
    w = torch.arange(12.0).view(3, 4)
    a = {"model": {"w": w.t(), "every": w[:, ::2], "one": torch.ones(1).expand(3)}, "lists": [w[0]]}
    a |= {
        "offset": torch.arange(9.0)[4:],
        "conj": torch.tensor([1 + 2j]).conj(),
        "neg": torch.tensor([1 + 2j]).conj().imag,
    }
    b = {name: x.clone() for name, x in memory._flat(a)}
    for x in (a, dict(reversed(a.items()))):
        rows = compare(x, b).rows
        assert len(rows) == 7 and all(row.changed_count == 0 for row in rows)
    assert compare(a, b, include="w").rows[0].name == "model.w"
    cyclic = {"w": w}
    cyclic["self"] = cyclic
    assert [row.name for row in compare(cyclic, {"w": w}).rows] == ["w"]
    assert compare({"a": 1}, {"w": w}).reason.endswith("a has no tensors")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_in_memory_that_cannot_be_read():
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    a = {
        "freed": freed,
        "lazy": torch.nn.UninitializedParameter(),
        "meta": torch.ones(3, device="meta"),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
        "sparse": torch.eye(3).to_sparse(),
        "w": torch.ones(3),
    }
    result = compare(a, {name: torch.ones(3) for name in a})
    assert [row.name for row in result.rows] == ["w"]
    assert set(result.skipped) == set(a) - {"w"}
    assert all(reason.endswith(" (in a)") for reason in result.skipped.values())
    result = compare({"v": torch.ones(3)}, a)
    assert any(note.startswith("b: not read: sparse: only dense") for note in result.notes)


@pytest.mark.parametrize(
    "source", [torch.ones(1), 3, None, [("w", torch.ones(1))], torch.nn.Linear]
)
def test_other_sources_are_refused(source):
    with pytest.raises(TypeError, match="expected a path, a module or a mapping of tensors, got"):
        compare({}, source)
    with pytest.raises(ValueError, match=r"every name once, got 'a\.b' twice"):
        compare({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, {})


SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from paramstats.checkpoints import compare
dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
mesh = init_device_mesh("cpu", (2, 2))
x = torch.arange(35.0).view(5, 7)
def sharded(local, *placements):
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=(5, 7), stride=(7, 1))
a = {
    "row": sharded(x[0:3, 4:7], Shard(0), Shard(1)),
    "one": sharded(x[3:5], Replicate(), Shard(0)),
    "all": sharded(x, Replicate(), Replicate()),
    "sum": sharded(x, Replicate(), Partial()),
}
y = x.clone()
y[0, 0] = y[2, 5] = y[3, 1] = -1
result = compare(a, dict.fromkeys(a, y))
for row in sorted(result.rows):
    print(row.name, row.count, row.changed_count, row.norm_a, result.labels.get(row.name))
print(result.skipped)
"""


def test_the_elements_of_this_rank_are_compared():
    """Rank 1 of 2 x 2: rows 0 to 2 and columns 4 to 6, or rows 3 and 4, or all."""
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    x = np.arange(35.0).reshape(5, 7)
    *lines, skipped = done.stdout.splitlines()
    expected = {"all": (x, 3), "one": (x[3:], 1), "row": (x[:3, 4:], 1)}
    for line, (name, (part, changed)) in zip(lines, expected.items(), strict=True):
        words = line.split(" ", 4)
        assert words[:3] == [name, str(part.size), str(changed)]
        assert float(words[3]) == pytest.approx(np.linalg.norm(part))
        label = f"a: this rank's {part.size} of 35 elements" if name != "all" else "None"
        assert words[4] == label
    assert "a DTensor placed as" in skipped and "never communicates" in skipped
