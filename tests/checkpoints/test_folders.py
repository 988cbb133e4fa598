"""One checkpoint of a folder is read; its notes or an error name everything else."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from paramstats._summary import record_of
from paramstats.checkpoints import CheckpointError, summarize_file
from tests.checkpoints.files import save_file

ST, INDEX = ".safetensors", ".safetensors.index.json"
DIFFUSION = "diffusion_pytorch_model"


def write(folder: Path, files: dict[str, object]) -> None:
    """Write files: tensors with the names in a text, JSON of a dict, bytes, or an index of a list.

    An index of a list names the tensor "a" in the first file, "b" in the second, and so on.
    """
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, list):
            content = {"weight_map": dict(zip("abcdef", content, strict=False))}
            path.write_text(json.dumps(content))
        elif isinstance(content, dict):
            path.write_text(json.dumps(content))
        else:
            tensors = {key: torch.full((2,), float(ord(key))) for key in str(content)}
            if path.suffix == ST:
                save_file(tensors, path)
            elif path.suffix == ".npz":
                np.savez(path, **{key: x.numpy() for key, x in tensors.items()})
            else:
                torch.save(tensors, path)


def shards(stem: str, parts: int, numbers: str, suffix: str = ST) -> dict[str, object]:
    """Return files of shards by number; the first one has the tensor "a"."""
    names = (f"{stem}-0000{n}-of-0000{parts}{suffix}" for n in numbers)
    return dict(zip(names, "abcdef", strict=False))


TRAINING = {
    "optimizer.pt": "o",
    "scheduler.pt": "o",
    "rng_state.pth": "o",
    "training_args.bin": "o",
}
PIPELINE = {
    f"unet/{DIFFUSION}{ST}": "a",
    f"unet/{DIFFUSION}.fp16{ST}": "a",
    f"vae/{DIFFUSION}{ST}": "a",
    "scheduler/scheduler_config.json": {},
}
READ: dict[str, tuple[dict[str, object], str, list[str]]] = {
    "index": (
        {f"m-1{ST}": "a", f"consolidated{ST}": "b", f"model{INDEX}": [f"m-1{ST}"]},
        "a",
        [f"not read: consolidated{ST} (model{INDEX} does not name it)"],
    ),
    "index and whole model": (
        {f"m{ST}": "a", f"model{ST}": "b", "pytorch_model.bin": "c", f"model{INDEX}": [f"m{ST}"]},
        "a",
        [f"not read: model{ST}, pytorch_model.bin (model{INDEX} does not name them)"],
    ),
    "index of a variant": (
        {
            **shards("model", 2, "12"),
            **shards("model.fp16", 2, "12"),
            f"model{INDEX}": list(shards("model", 2, "12")),
            f"model{ST}.index.fp16.json": list(shards("model.fp16", 2, "12")),
        },
        "a b",
        [
            "not read: model.fp16-00001-of-00002.safetensors, model.fp16-00002-of-00002.safetensors"
            f" (model{INDEX} does not name them)"
        ],
    ),
    "two indexes": (
        {
            **shards("model", 1, "1"),
            **shards("consolidated", 1, "1"),
            f"consolidated{INDEX}": list(shards("consolidated", 1, "1")),
            f"model{INDEX}": list(shards("model", 1, "1")),
        },
        "a",
        [f"not read: consolidated-00001-of-00001{ST} (model{INDEX} does not name it)"],
    ),
    "index of another name": ({f"w{ST}": "a", f"v{ST}": "b", f"x{INDEX}": [f"w{ST}"]}, "a", [
        f"not read: v{ST} (x{INDEX} does not name it)"
    ]),
    "only the index of a variant": (
        {f"w{ST}": "a", f"model{ST}.index.fp16.json": [f"w{ST}"]},
        "a",
        [],
    ),
    "index of .bin": ({"m.bin": "a", "pytorch_model.bin.index.json": ["m.bin"]}, "a", []),
    "unused index of .bin": (
        {f"model{ST}": "a", "pytorch_model.bin.index.json": ["missing.bin"]},
        "a",
        [],
    ),
    "shards": (shards("model", 3, "123"), "a b c", []),
    "shards from 0": (shards("model", 2, "01"), "a b", []),
    "shards of .bin": (shards("pytorch_model", 2, "12", ".bin"), "a b", []),
    "shards next to others": (
        {**shards("model", 1, "1"), f"consolidated{ST}": "b"},
        "a",
        [f"not read: consolidated{ST} (model-00001-of-00001{ST} is read)"],
    ),
    "variant": (
        {f"model{ST}": "a", f"model.fp16{ST}": "a"},
        "a",
        [f"not read: model.fp16{ST} (model{ST} is read)"],
    ),
    "only a variant": ({f"model.fp16{ST}": "a"}, "a", []),
    "variant of any name": (
        {f"two{ST}": "a", f"two.fp16{ST}": "a"},
        "a",
        [f"not read: two.fp16{ST} (two{ST} is read)"],
    ),
    "both formats": (
        {f"model{ST}": "a", "pytorch_model.bin": "a"},
        "a",
        [f"not read: pytorch_model.bin (model{ST} is read)"],
    ),
    "adapter": ({f"adapter_model{ST}": "a"}, "a", []),
    "adapter in .bin": ({"adapter_model.bin": "a", "adapter_config.json": {}}, "a", []),
    "adapter and its base": (
        {f"adapter_model{ST}": "a", f"model{ST}": "b"},
        "b",
        [f"not read: adapter_model{ST} (model{ST} is read)"],
    ),
    "files of other names": (
        {f"one{ST}": "a", f"two{ST}": "b"},
        "a b",
        [f"read together: one{ST}, two{ST}"],
    ),
    "trainer": (
        {f"model{ST}": "a", **TRAINING},
        "a",
        ["not read: optimizer.pt, rng_state.pth, scheduler.pt, training_args.bin (training state)"],
    ),
    "trainer with folders": (
        {f"model{ST}": "a", "global_step5/mp_rank_00_model_states.pt": "b"},
        "a",
        ["not read: global_step5 (other folders)"],
    ),
    "only .pt and training state": (
        {"weights.pt": "a", **TRAINING},
        "a",
        ["not read: optimizer.pt, rng_state.pth, scheduler.pt, training_args.bin (training state)"],
    ),
    "only training state": ({"optimizer.pt": "o"}, "o", []),
    "llama": ({"consolidated.00.pth": "a", "params.json": {}}, "a", []),
    "lightning": ({"epoch=1-step=10.ckpt": "a"}, "a", []),
    "one rank": ({"model_world_size_1_rank_0.pt": "a", "optim_world_size_1_rank_0.pt": "o"}, "a", [
        "not read: optim_world_size_1_rank_0.pt (training state)"
    ]),
    "pickle next to weights": (
        {"model.pt": "a", "words.pkl": "b"},
        "a",
        ["not read: words.pkl (model.pt is read)"],
    ),
    "npz": ({"weights.npz": "a"}, "a", []),
    "pipeline": (
        {"model_index.json": {}, **PIPELINE},
        "unet.a vae.a",
        [f"unet: not read: {DIFFUSION}.fp16{ST} ({DIFFUSION}{ST} is read)"],
    ),
    "pipeline that names components": (
        {
            "model_index.json": {"_class_name": "P", "vae": ["diffusers", "A"], "x": [None, None]},
            **PIPELINE,
            f"sd{ST}": "b",
        },
        "vae.a",
        [f"not read: sd{ST}, unet (not named by model_index.json)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_one_checkpoint_is_read_and_notes_name_the_rest(tmp_path, name):
    files, tensors, notes = READ[name]
    write(tmp_path, files)
    summary = summarize_file(tmp_path)
    assert list(summary) == tensors.split()
    for key in summary:
        assert summary[key].mean == ord(key[-1]) and summary[key].count == 2
    assert list(record_of(summary).file.notes) == notes


RANKS = "merge them with the library that wrote them"
REFUSED: dict[str, tuple[dict[str, object], list[str]]] = {
    "missing shard": (
        shards("model", 3, "12"),
        ["expected 3 shards", f"got 2, without model-00003-of-00003{ST}", "copy the missing files"],
    ),
    "many missing shards": (
        {f"model-00001-of-90000{ST}": "a"},
        ["expected 90000 shards", "00005-of-90000.safetensors and 89,995 more"],
    ),
    "missing shard of .bin": (
        shards("pytorch_model", 2, "2", ".bin"),
        ["without pytorch_model-00001-of-00002.bin"],
    ),
    "missing shards of an index": (
        {**shards("model", 3, "1"), f"model{INDEX}": list(shards("model", 3, "123"))},
        [f"expected files model-00002-of-00003{ST}, model-00003-of-00003{ST}, which model{INDEX}"],
    ),
    "index without a shard": (
        {**shards("model", 3, "12"), f"model{INDEX}": list(shards("model", 3, "12"))},
        [f"without model-00003-of-00003{ST}"],
    ),
    "two variants": (
        {f"model.fp16{ST}": "a", f"model.bf16{ST}": "a"},
        [f"expected one checkpoint, got 2: model.bf16{ST}, model.fp16{ST}", "the path of one"],
    ),
    "two sets of shards": (
        {**shards("model", 2, "12"), **shards("model", 3, "123")},
        [f"got 2: model-00001-of-00002{ST} and 1 more, model-00001-of-00003{ST} and 2 more"],
    ),
    "same tensor in two files": ({f"one{ST}": "a", f"two{ST}": "a"}, ["got 'a' in one.safet"]),
    "several .pt": (
        {"a.pt": "a", "b.pth": "a", "c.ckpt": "a"},
        ["expected one checkpoint, got 3: a.pt, b.pth, c.ckpt", "pass the path of one of them"],
    ),
    "verl": (
        {f"model_world_size_2_rank_{i}.pt": "a" for i in range(2)},
        ["got 2: model_world_size_2_rank_0.pt, model_world_size_2_rank_1.pt", RANKS],
    ),
    "llama on two ranks": (
        {"consolidated.00.pth": "a", "consolidated.01.pth": "a"},
        ["got 2: consolidated.00.pth, consolidated.01.pth", RANKS],
    ),
    "DeepSpeed step": (
        {"mp_rank_00_model_states.pt": "a", "zero_pp_rank_0_mp_rank_00_optim_states.pt": "a"},
        ["got 2: mp_rank_00_model_states.pt, zero_pp_rank_0_mp_rank_00_optim_states.pt", RANKS],
    ),
    "DeepSpeed": (
        {f"global_step{n}/mp_rank_00_model_states.pt": "a" for n in (5, 10)}
        | {"latest": b"global_step10\n"},
        ["a folder of checkpoint folders", "global_step10, global_step5 (the last one is global_s"],
    ),
    "Megatron": (
        {
            "latest_checkpointed_iteration.txt": b"20",
            "iter_0000010/__0_0.distcp": b"x",
            "iter_0000020/__0_0.distcp": b"x",
        },
        ["pass the path of one of iter_0000020, iter_0000010 (the last one is iter_0000020)"],
    ),
    "Megatron by rank": (
        {"iter_0000010/mp_rank_00/model_optim_rng.pt": "a"},
        ["pass the path of one of iter_0000010/mp_rank_00"],
    ),
    "trainer's output": ({f"checkpoint-5/model{ST}": "a"}, ["the path of one of checkpoint-5"]),
    "unfinished distributed checkpoint": (
        {"__0_0.distcp": b"x"},
        ["a distributed checkpoint without its .metadata", "not finished"],
    ),
    "orbax": ({"_CHECKPOINT_METADATA": {}, "d/0": b"x"}, ["an orbax checkpoint", "restore it"]),
    "orbax in a folder": ({"5/_CHECKPOINT_METADATA": {}}, ["pass the path of one of 5"]),
    "Flax": ({"flax_model.msgpack": b"x"}, ["a Flax checkpoint, which paramstats does not read"]),
    "TensorFlow": (
        {"checkpoint": b"x", "model.ckpt-5.data-00000-of-00001": b"x", "model.ckpt-5.index": b"x"},
        ["a TensorFlow checkpoint"],
    ),
    "Lightning with DeepSpeed": (
        {"checkpoint/mp_rank_00_model_states.pt": "a", "latest": b"checkpoint"},
        ["a folder of checkpoint folders", "pass the path of one of checkpoint (the last one is"],
    ),
    "pipeline that is no JSON": ({"model_index.json": b"[", **PIPELINE}, ["a pipeline in JSON"]),
    "pipeline without a shard": (
        {"model_index.json": {}, **{f"unet/{k}": v for k, v in shards("m", 2, "1").items()}},
        ["without m-00002-of-00002.safetensors"],
    ),
    "nothing": ({"README.md": b"x"}, ["got a folder without one"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_folder_that_is_not_one_checkpoint_is_refused_with_a_list(tmp_path, name):
    files, messages = REFUSED[name]
    write(tmp_path, files)
    with pytest.raises(CheckpointError) as caught:
        summarize_file(tmp_path)
    for message in messages:
        assert message in str(caught.value)
    assert len(str(caught.value)) < 700 + len(str(tmp_path))


PATHS = {
    f"model-00001-of-00003{ST}": "not read: the other 2 shards (pass their folder)",
    "model_world_size_2_rank_1.pt": "not read: the files of other ranks than rank 1",
    "mp_rank_00_model_states.pt": "not read: the files of other ranks than rank 00",
    "model_world_size_1_rank_0.pt": None,
    f"model-00001-of-00001{ST}": None,
    "crank_2.pt": None,
}


@pytest.mark.parametrize("name", PATHS)
def test_path_of_one_of_several_files_is_read_with_a_note(tmp_path, name):
    write(tmp_path, {name: "a"})
    summary = summarize_file(tmp_path / name)
    note = PATHS[name]
    assert list(summary) == ["a"]
    assert record_of(summary).file.notes == ((note,) if note else ())


def test_path_of_an_index_of_a_variant_is_read(tmp_path):
    write(tmp_path, {f"w{ST}": "a", f"model{ST}.index.fp16.json": [f"w{ST}"]})
    assert list(summarize_file(tmp_path / f"model{ST}.index.fp16.json")) == ["a"]


def test_distributed_checkpoint_names_the_files_next_to_it(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is only one rank
        dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path)
    write(tmp_path, {"common.pt": "c"})
    summary = summarize_file(tmp_path)
    assert list(summary) == ["a"]
    assert record_of(summary).file.notes == ("not read: common.pt (not named by .metadata)",)
    (part,) = tmp_path.glob("*.distcp")
    with pytest.raises(CheckpointError, match="part of a distributed") as caught:
        summarize_file(part)
    assert f"pass the path of its folder {tmp_path}" in str(caught.value)


def test_links_between_folders_end(tmp_path):
    write(tmp_path, {"model_index.json": {}, f"vae/model{ST}": "a"})
    (tmp_path / "vae" / "self").symlink_to(tmp_path, target_is_directory=True)
    write(tmp_path, {"vae/model_index.json": {}})
    assert list(summarize_file(tmp_path)) == ["vae.a"]


DOWNLOADS = {
    b"": ["an empty file", "download it again"],
    b"version https://git-lfs.github.com/spec/v1\n": ["a Git LFS pointer", "git lfs pull"],
    b"<!DOCTYPE html><html><body>401</body></html>": ["an HTML or XML page", "needs a login"],
    b'{"error": "Invalid username or password."}': [
        'JSON with first bytes b\'{"error"',
        "needs a login",
    ],
    bytes(4096): ["a file that begins with zeros", "it is not complete"],
    b"\x1f\x8b\x08" + bytes(20): ["a gzip archive", "decompress it"],
}


@pytest.mark.parametrize("suffix", [ST, ".bin", ".gguf", ".npz"])
@pytest.mark.parametrize("content", DOWNLOADS, ids=lambda content: repr(content[:9]))
def test_failed_download_is_named_in_plain_words(tmp_path, suffix, content):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    for given in (path, tmp_path):
        with pytest.raises(CheckpointError) as caught:
            summarize_file(given)
        for message in DOWNLOADS[content]:
            assert message in str(caught.value)


@pytest.mark.parametrize("suffix", [ST, ".pt"])
def test_file_without_tensors_says_so(tmp_path, suffix):
    write(tmp_path, {f"model{suffix}": ""})
    summary = summarize_file(tmp_path / f"model{suffix}")
    assert not len(summary) and record_of(summary).file.notes == ("no tensors in it",)


def test_number_of_notes_is_limited(tmp_path):
    files = {f"part{i}/{name}{ST}": "a" for i in range(12) for name in ("model", "model.fp16")}
    write(tmp_path, {"model_index.json": {}, **files})
    notes = record_of(summarize_file(tmp_path)).file.notes
    assert len(notes) == 11 and notes[-1] == "2 more notes"
    assert notes[0] == f"part0: not read: model.fp16{ST} (model{ST} is read)"


def test_folder_that_cannot_be_listed_is_passed_over(tmp_path, monkeypatch):
    write(tmp_path, {f"model{ST}": "a", f"private/model{ST}": "b"})
    listdir = os.listdir

    def refuse(path):
        if str(path).endswith("private"):
            raise PermissionError(path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert list(summarize_file(tmp_path)) == ["a"]
