"""Folders of torch.distributed.checkpoint, written by one process and by several."""

from __future__ import annotations

import io
import os
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import paramstats
from paramstats.checkpoints import CheckpointError, compare_files, summarize_file
from tests import oracle
from tests.sharded.ranks import run_on_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)


def whole() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "rows": torch.randn(7, 50),
        "columns": torch.randn(6, 9),
        "copies": torch.randn(5),
        "complex": torch.randn(8, 3, dtype=torch.complex64),
        "plain": torch.randn(4).bfloat16(),
        "scalar": torch.tensor(2.0),
    }


def save_sharded(folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    tensors = whole()
    places = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate(), "complex": Shard(0)}
    sharded = {
        name: distribute_tensor(x, mesh, [places[name]]) if name in places else x
        for name, x in tensors.items()
    }
    dcp.save({"model": sharded, "step": 3, "list": [torch.ones(2)]}, checkpoint_id=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dcp")
    run_on_ranks(2, save_sharded, str(path))
    assert len(list(path.glob("*.distcp"))) == 2
    return path


def test_shards_are_merged_to_whole_tensors(backend, folder):
    summary = summarize_file(folder)
    tensors = whole()
    assert set(summary) == {f"model.{name}" for name in tensors} | {"list.0"}
    for name, x in tensors.items():
        entry = summary[f"model.{name}"]
        assert (entry.shape, entry.dtype, entry.count) == (tuple(x.shape), x.dtype, x.numel())
        if x.is_complex():
            right = paramstats.summarize({"x": x})["x"]
            for stat in ("mean", "std", "norm", "min", "max"):
                assert getattr(entry, stat) == pytest.approx(getattr(right, stat), rel=1e-12)
        else:
            oracle.check(entry, x)


def test_shards_are_compared_with_whole_tensors(backend, folder, tmp_path):
    changed = {f"model.{name}": x.clone() for name, x in whole().items()}
    changed["model.columns"][4, 8] += 100
    torch.save(changed, tmp_path / "b.pt")
    for a, b in ((folder, tmp_path / "b.pt"), (tmp_path / "b.pt", folder)):
        first, *others = compare_files(a, b).rows
        assert (first.name, first.changed_count) == ("model.columns", 1)
        assert first.largest_change == pytest.approx(100, rel=1e-6)
        assert len(others) == 5 and all(row.change_norm == 0 for row in others)


@pytest.fixture
def small(tmp_path):
    """A folder that a test may break."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(4, 2), "b": torch.ones(3), "n": 1}, checkpoint_id=tmp_path)
    return tmp_path


def edit(folder, change) -> None:
    """Rewrites the metadata."""
    path = folder / ".metadata"
    metadata: Metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def without_a_place(metadata):
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != "w"}


def of_fewer_parts(metadata):
    metadata.state_dict_metadata["w"].chunks.clear()


def of_doubled_parts(metadata):
    entry = metadata.state_dict_metadata["w"]
    entry.chunks.append(entry.chunks[0])
    entry.size = torch.Size([8, 2])


def of_another_size(metadata):
    metadata.state_dict_metadata["w"].size = torch.Size([5, 2])


def of_another_type(metadata):
    metadata.state_dict_metadata["w"].properties.dtype = torch.float64


def outside_its_tensor(metadata):
    metadata.state_dict_metadata["w"].size = torch.Size([2, 4])


def in_another_file(metadata):
    for info in metadata.storage_data.values():
        info.relative_path = "../other"


def in_a_missing_file(metadata):
    for info in metadata.storage_data.values():
        info.relative_path = "__1_0.distcp"


def at_another_place(metadata):
    for info in metadata.storage_data.values():
        info.offset += 5
        info.length -= 5


def beyond_the_file(metadata):
    for info in metadata.storage_data.values():
        info.offset += 1 << 40


def transformed(metadata):
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["zstd"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_place, r"no place for the part of 'w' at \[0, 0\]"),
        (of_fewer_parts, "expected parts with 8 elements in all for 'w', got 0 in"),
        (of_doubled_parts, "expected parts with 16 elements in all for 'w', got 16, some twice"),
        (of_another_size, "expected parts with 10 elements in all for 'w', got 8 in"),
        (of_another_type, r"expected a part of 'w', torch.float64 \[4, 2\], got float32 \[4, 2\]"),
        (outside_its_tensor, r"expected parts of 'w' inside \[2, 4\], got \[4, 2\] at \[0, 0\]"),
        (in_another_file, "a part in '../other', outside the folder"),
        (in_a_missing_file, "expected a file '__1_0.distcp', got none"),
        (at_another_place, "expected an uncompressed record"),
        (beyond_the_file, "is cut off"),
        (transformed, "parts transformed by .'zstd'., which are not read"),
    ],
)
def test_metadata_that_the_files_do_not_bear_out(small, change, message):
    assert list(summarize_file(small)) == ["w", "b"]
    edit(small, change)
    with pytest.raises(CheckpointError, match=message) as raised:
        summarize_file(small)
    assert str(small) in str(raised.value)


def test_a_file_of_parts_that_is_cut_off(small):
    (file,) = small.glob("*.distcp")
    os.truncate(file, 1500)
    with pytest.raises(CheckpointError, match="is cut off"):
        summarize_file(small)


class Marks:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("where", ["whole", "planner_data", "storage_data", "version"])
def test_metadata_with_code_is_refused_and_not_executed(small, where):
    marker = small / "marker"
    if where == "whole":
        (small / ".metadata").write_bytes(pickle.dumps(Marks(marker)))
    elif where == "storage_data":
        edit(small, lambda m: m.storage_data.update({"x": Marks(marker)}))
    else:
        edit(small, lambda m: setattr(m, where, Marks(marker)))
    with pytest.raises(CheckpointError, match=r"refers to '_?i?o\.open', neither a tensor"):
        summarize_file(small)
    assert not marker.exists()
    assert pickle.Unpickler(io.BytesIO((small / ".metadata").read_bytes())).load() is not None
    assert marker.exists(), "the pickle would have made it"
