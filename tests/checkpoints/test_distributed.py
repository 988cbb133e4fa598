"""Folders of torch.distributed.checkpoint, written by one rank and by several."""

from __future__ import annotations

import dataclasses
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import paramstats
from paramstats._cli import main
from paramstats._summary import record_of
from paramstats.checkpoints import CheckpointError, compare_files, summarize_file
from tests import oracle
from tests.checkpoints.files import save
from tests.checkpoints.test_pickles import Calls
from tests.sharded.ranks import run_on_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)


def whole_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "rows": torch.randn(7, 50),
        "columns": torch.randn(6, 9),
        "replicated": torch.randn(5),
        "complex": torch.randn(8, 3, dtype=torch.complex64),
        "plain": torch.randn(4).bfloat16(),
        "scalar": torch.tensor(2.0),
    }


def save_sharded(folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    placements = {"rows": Shard(0), "columns": Shard(1), "complex": Shard(0)}
    placements["replicated"] = Replicate()
    sharded = {
        name: distribute_tensor(x, mesh, [placements[name]]) if name in placements else x
        for name, x in whole_tensors().items()
    }
    dcp.save({"model": sharded, "step": 3, "list": [torch.ones(2)]}, checkpoint_id=folder)
    rank = torch.distributed.get_rank()
    sharded["summand"] = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    torch.save(sharded, f"{folder}/rank_{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dcp")
    run_on_ranks(2, save_sharded, str(path))
    assert len(list(path.glob("*.distcp"))) == 2
    return path


def test_shards_are_merged_to_whole_tensors(backend, folder):
    summary = summarize_file(folder)
    tensors = whole_tensors()
    assert set(summary) == {f"model.{name}" for name in tensors} | {"list.0"}
    for name, x in tensors.items():
        entry = summary[f"model.{name}"]
        assert (entry.shape, entry.dtype, entry.count) == (tuple(x.shape), x.dtype, x.numel())
        if x.is_complex():
            expected = paramstats.summarize({"x": x})["x"]
            for stat in ("mean", "std", "norm", "min", "max"):
                assert getattr(entry, stat) == pytest.approx(getattr(expected, stat), rel=1e-12)
        else:
            oracle.check(entry, x)


@pytest.mark.parametrize("rank", [0, 1])
def test_file_of_one_rank_has_its_shards_with_labels(backend, folder, rank):
    summary = summarize_file(folder / f"rank_{rank}.pt")
    tensors = whole_tensors()
    assert list(summary) == [*tensors, "summand"] and not summary.skipped
    local = {
        **tensors,
        "rows": tensors["rows"].tensor_split([4])[rank],
        "columns": tensors["columns"].tensor_split([5], dim=1)[rank],
        "complex": tensors["complex"].tensor_split(2)[rank],
        "summand": torch.ones(3),
    }
    for name, x in local.items():
        assert summary[name].shape == tuple(x.shape)
        assert summary[name].norm == paramstats.summarize({"x": x})["x"].norm
    assert record_of(summary).file.labels == {
        "rows": "this rank's shard of [7, 50]",
        "columns": "this rank's shard of [6, 9]",
        "complex": "this rank's shard of [8, 3]",
        "summand": "this rank's summand of [3]",
    }


def save_sharded_tensor(path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ShardedTensor is deprecated
        spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])
        torch.save(
            {"w": sharded_tensor.ones(spec, 5, 4)}, f"{path}/{torch.distributed.get_rank()}.pt"
        )


def test_sharded_tensor_has_a_label(tmp_path):
    run_on_ranks(2, save_sharded_tensor, str(tmp_path))
    for rank, rows in enumerate((3, 2)):
        summary = summarize_file(tmp_path / f"{rank}.pt")
        assert (summary["w"].shape, summary["w"].mean) == ((rows, 4), 1)
        assert record_of(summary).file.labels == {"w": "this rank's shard of [5, 4]"}


def test_shards_are_compared_with_whole_tensors(backend, folder, tmp_path):
    changed = {f"model.{name}": x.clone() for name, x in whole_tensors().items()}
    changed["model.columns"][4, 8] += 100
    torch.save(changed, tmp_path / "b.pt")
    for a, b in ((folder, tmp_path / "b.pt"), (tmp_path / "b.pt", folder)):
        first, *others = compare_files(a, b).rows
        assert (first.name, first.changed_count) == ("model.columns", 1)
        assert first.largest_change == pytest.approx(100, rel=1e-6)
        assert len(others) == 5 and all(row.change_norm == 0 for row in others)


@pytest.fixture
def small(tmp_path):
    """A folder that a test may damage."""
    return save({"w": torch.ones(4, 2), "b": torch.ones(3), "n": 1}, "dcp", tmp_path)


def edit(folder, change) -> None:
    """Change the metadata of a folder."""
    path = folder / ".metadata"
    metadata: Metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def edit_tensor(**changes):
    """Return a function that sets attributes in the metadata of tensor w."""

    def change(metadata):
        entry = metadata.state_dict_metadata["w"]
        for name, value in changes.items():
            setattr(entry.properties if name == "dtype" else entry, name, value)

    return change


def edit_places(**changes):
    """Return a function that sets attributes in the place of every part; integers are added."""

    def change(metadata):
        for info in metadata.storage_data.values():
            for name, value in changes.items():
                is_number = isinstance(value, int)
                setattr(info, name, getattr(info, name) + value if is_number else value)

    return change


def remove_places(metadata):
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != "w"}


def repeat_a_part(metadata):
    edit_tensor(chunks=metadata.state_dict_metadata["w"].chunks * 2, size=torch.Size([8, 2]))(
        metadata
    )


def rename(name):
    """Return a function that renames tensor w."""

    def change(metadata):
        tensors, places = metadata.state_dict_metadata, metadata.storage_data
        metadata.state_dict_metadata = {name if k == "w" else k: v for k, v in tensors.items()}
        metadata.storage_data = {
            dataclasses.replace(k, fqn=name) if k.fqn == "w" else k: v for k, v in places.items()
        }

    return change


def share_bytes(metadata):
    first, second = (v for k, v in metadata.storage_data.items() if k.offset is not None)
    second.offset = first.offset + 1


CODE = Calls(open, "/nowhere/marker", "w")  # another error than CheckpointError if it is executed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_places, r"no place for the part of 'w' at \[0, 0\]"),
        (repeat_a_part, "expected parts with 16 elements in all for 'w', got 16, some of them twi"),
        (edit_tensor(chunks=[]), "expected parts with 8 elements in all for 'w', got 0"),
        (edit_tensor(size=torch.Size([5, 2])), "expected parts with 10 elements .*, got 8"),
        (edit_tensor(size=torch.Size([2, 4])), r"parts of 'w' inside \[2, 4\], got \[4, 2\] at"),
        (edit_tensor(dtype=torch.float64), r"of 'w', float64 \[4, 2\], got float32 \[4, 2\]"),
        (edit_tensor(dtype=None), "a tensor 'w' of unknown dtype"),
        (edit_places(relative_path="../other"), "a part in '../other', outside the folder"),
        (edit_places(relative_path="__1_0.distcp"), "expected a file '__1_0.distcp', got none"),
        (edit_places(offset=5, length=-5), "expected an uncompressed record"),
        (edit_places(offset=1 << 40), "the file is truncated"),
        (edit_places(transform_descriptors=["zstd"]), "transformed by .'zstd'., which are not"),
        (rename(5), "got 5 in place of a name"),
        (rename(("a", 1)), r"got \('a', 1\) in place of a name"),
        (rename(None), "got None in place of a name"),
        (edit_tensor(size=(8.0, 1.0)), r"got \(8.0, 1.0\) in place of sizes"),
        (edit_tensor(size=("\x1b", 1)), r"got \('.x1b', 1\) in place of sizes"),
        (edit_tensor(size=(0, 10**30), chunks=[]), "0{30}. in place of sizes"),
        (edit_tensor(size=(1 << 40, 1 << 40), chunks=[]), "more elements than can be counted"),
        (edit_tensor(properties=None), "a damaged file"),
        (edit_places(offset=math.nan), "nan, .* in place of sizes"),
        (edit_places(length=1 << 70), "in place of sizes"),
        (edit_places(relative_path="x\0y"), r"a part in 'x.x00y', outside the folder"),
        (edit_places(relative_path="."), "expected a file, got no regular file"),
        (edit_places(relative_path=2.5), "got 2.5 in place of a name"),
        (share_bytes, "two parts in the same bytes of '__0_0.distcp'"),
        (lambda metadata: setattr(metadata, "storage_data", []), "a damaged file"),
        (lambda metadata: metadata.state_dict_metadata.update(z=None), "in place of TensorStorage"),
        (lambda metadata: metadata.state_dict_metadata.update(z=CODE), "in place of TensorStorage"),
        (lambda metadata: metadata.storage_data.update(x=CODE), "in place of MetadataIndex"),
    ],
)
def test_metadata_that_contradicts_the_files_is_refused(small, change, message, capsys):
    assert list(summarize_file(small)) == ["w", "b"]
    edit(small, change)
    with pytest.raises(CheckpointError, match=message) as raised:
        summarize_file(small)
    assert str(small) in str(raised.value)
    for arguments in ([small], [small, small], [small, "--csv"]):
        assert main(["show", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and err[:-1].isprintable()


def test_missing_file_name_that_is_too_long_gives_one_line(small, capsys):
    edit(small, edit_places(relative_path="a" * 1000))
    assert main(["show", str(small)]) == 2
    assert capsys.readouterr().err.endswith(": File name too long\n")


@dataclasses.dataclass
class OtherMetadata(Metadata):
    """Metadata as other libraries extend it."""

    extra: object = None


def as_other_metadata(metadata):
    metadata.__class__ = OtherMetadata
    metadata.extra = {"w": {"shape": (4, 2)}}


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: setattr(metadata, "all_local_plans", [SavePlan([])]),
        lambda metadata: setattr(metadata, "version", CODE),
        lambda metadata: setattr(metadata, "planner_data", {"x": CODE}),
        as_other_metadata,
    ],
)
def test_metadata_with_objects_of_other_classes_is_read(small, change):
    expected = summarize_file(small)
    edit(small, change)
    summary = summarize_file(small)
    assert list(summary) == ["w", "b"] and summary["b"].state() == expected["b"].state()
    assert record_of(summary).file.notes == ("not read: 1 value that is not a tensor ('n')",)


@pytest.mark.parametrize("name", ["__0_0.distcp", "renamed.pt"])
def test_part_of_a_folder_is_refused(small, name):
    path = small / name
    if not path.exists():
        path.write_bytes((small / "__0_0.distcp").read_bytes())
    expected = rf"part of a distributed checkpoint: .*; pass the path of its folder {small}$"
    with pytest.raises(CheckpointError, match=expected):
        summarize_file(path)


def test_damaged_bytes_of_a_part_are_named(small):
    path = small / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(8).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="'w' could not be read"):
        summary = summarize_file(small)
    assert "damaged: the CRC-32 of record 'archive/data/0' differs" in summary.skipped["w"]
