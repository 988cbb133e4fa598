"""Every file that is not a valid checkpoint gives one clear line and exit status 2."""

from __future__ import annotations

import copy
import io
import json
import os
import warnings
import zipfile

import pytest
import torch
from torch.utils.serialization import config

from paramstats._cli import main
from paramstats.checkpoints import CheckpointError, summarize_file
from paramstats.checkpoints._stored_tensors import Part, StoredTensor, check_parts
from tests.checkpoints.files import entry, safetensors_bytes, save_file


def header(content: object, data: bytes = b"") -> tuple[str, bytes]:
    return "a.safetensors", safetensors_bytes(content, data)


def archive(
    records: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED
) -> tuple[str, bytes]:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two records may have the same name
        for name, content in records:
            file.writestr(f"a/{name}", content)
    return "a.pt", out.getvalue()


def overlapping() -> tuple[str, bytes]:
    """Return an archive in which two storages are the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02N.")
        file.writestr("a/data/0", bytes(10_000))
        file.filelist.append(copy.copy(file.filelist[-1]))
        file.filelist[-1].filename = "a/data/1"
    return "a.pt", out.getvalue()


def pickled(code: bytes) -> tuple[str, bytes]:
    """Return a torch.save file with a pickle and one storage."""
    return archive([("data.pkl", code), ("data/0", bytes(8))])


def saved(value: object, old: bytes = b"", new: bytes = b"") -> tuple[str, bytes]:
    """Return a torch.save file, with some bytes replaced that must occur once."""
    out = io.BytesIO()
    with config.patch({"save.compute_crc32": not old}):
        torch.save(value, out)
    assert not old or out.getvalue().count(old) == 1
    return "a.pt", out.getvalue().replace(old, new) if old else out.getvalue()


def index(content: object) -> tuple[str, bytes]:
    """Return an index; next to it is one.safetensors with tensor a."""
    return "model.safetensors.index.json", json.dumps(content).encode()


def weight_map(**file_of: str) -> tuple[str, bytes]:
    return index({"weight_map": file_of})


PICKLE = ("data.pkl", b"N.")
W = {"w": torch.ones(3)}
HUGE = torch.empty(1 << 40, 1 << 22, device="meta", dtype=torch.uint8)
REBUILD = b"ctorch._utils\n_rebuild_tensor_v%d\n(%bK\x00%btR."
STORAGE = b"(Vstorage\nctorch\n%bStorage\nV0\nVcpu\nK\x02tQ"
FLOATS = STORAGE % b"Float"
ONE = "one.safetensors"
BROKEN = {
    "png": (("x.png", b"\x89PNG\r\n\x1a\n"), "got first bytes b'\\x89PNG"),
    "text": (("notes.pt", b"these are not weights"), "got first bytes b'these are not"),
    "empty": (("a.safetensors", b""), "got an empty file"),
    "part of a folder": (("__0_0.distcp", b"x"), "pass the path of its folder"),
    # safetensors
    "header not in JSON": (header(b"{" * 9), "in JSON"),
    "header is a list": (header([1]), "got list"),
    "long header": (("a.safetensors", b"\xff" * 8 + b"{}"), "not a safetensors file"),
    "nested header": (header(b"[" * 100_000), "in JSON"),
    "repeated name": (header(b'{"w":{},"w":{}}'), "a name that occurs twice"),
    "metadata of numbers": (header({"__metadata__": {"a": 1}}), "expected strings in __metadata__"),
    "shards": (header({"__metadata__": {"DCP_SHARDING_INFO": ""}}), "one rank's shards of them"),
    "unknown entry": (header({"w": 3}), "expected dtype, shape and data_offsets of 'w', got 3"),
    "unknown dtype": (header({"w": entry("F31")}, bytes(8)), "got 'F31' for 'w'"),
    "dtype is a list": (header({"w": entry([])}, bytes(8)), "got [] for 'w'"),
    "wrong shape": (header({"w": entry(shape=(3,))}, bytes(8)), "expected 12 bytes of F32 [3] for"),
    "negative shape": (header({"w": entry(shape=(-2,))}, bytes(8)), "got [-2]"),
    "fractional shape": (header({"w": entry(shape=(2.0,))}, bytes(8)), "got [2.0]"),
    "shape is a number": (header({"w": {**entry(), "shape": 2}}, bytes(8)), "got 2 and [0, 8]"),
    "overlap": (header({"w": entry(), "v": entry(offsets=(4, 12))}, bytes(12)), "got 'v' at byte"),
    "gap": (header({"w": entry(offsets=(4, 12))}, bytes(12)), "without gaps and overlaps, got 'w'"),
    "too long": (header({"w": entry()}, bytes(9)), "there is data after the last tensor"),
    "too short": (header({"w": entry()}, bytes(7)), "the file is truncated"),
    "lfs pointer": (("a.safetensors", b"version https://git-lfs.github.com"), "git lfs pull"),
    # torch.save
    "truncated pickle": (("a.pkl", b"\x80\x02]"), "a damaged pickle (its end is missing)"),
    "text named like a pickle": (("a.pkl", b"(hello)"), "got a damaged pickle"),
    "value longer than its file": (
        ("a.pkl", b"\x80\x02B\0\xff\0\0abc."),
        "a damaged pickle (its end is missing)",
    ),
    "zip": (archive([("readme.txt", b"")]), "got another zip archive"),
    "truncated": (
        ("a.pt", archive([PICKLE])[1][:-9]),
        "expected a complete torch.save archive",
    ),
    "compressed": (archive([PICKLE], zipfile.ZIP_DEFLATED), "expected an uncompressed record"),
    "repeated record": (archive([PICKLE, PICKLE]), "got 'data.pkl' twice"),
    "overlapping records": (overlapping(), "storages in different bytes"),
    "byte order": (archive([PICKLE, ("byteorder", b"big")]), "-endian data, got b'big'"),
    "long pickle": (archive([("data.pkl", b"C\x40"), ("x", b"." * 99)]), "longer than its record"),
    "no storage": (pickled(REBUILD % (2, b"N", b"))")), "a tensor without a storage"),
    "bad strides": (pickled(REBUILD % (2, FLOATS, b"K\x01\x85)")), "with invalid sizes or strides"),
    "no dtype": (pickled(REBUILD % (3, FLOATS, b"))\x89NN")), "a tensor of unknown dtype"),
    "too few elements": (saved(W, b"K\x03\x85", b"K\x09\x85"), "12 bytes in storage '0', too few"),
    "pickle with a flipped byte": (
        ("a.pt", saved(W)[1].replace(b"storage", b"storagf", 1)),
        "the CRC-32 of record 'archive/data.pkl' differs",
    ),
    "several archives": (
        ("a.pt", saved(W)[1] * 2),
        "got several archives in one file: part of a distributed checkpoint",
    ),
    "bytes before an archive": (("a.pt", b"PK\3\4" + saved(W)[1]), "several archives in one file"),
    "missing storage": (
        archive([("data.pkl", REBUILD % (2, FLOATS, b"))"))]),
        "no storage '0', wh",
    ),
    "too many elements": (saved(HUGE), "more elements than can be counted"),
    # indexes
    "index is a list": (index([]), "expected an index in JSON with a weight_map"),
    "empty index": (index({"weight_map": {}}), "expected an object with names as weight_map"),
    "index of paths": (weight_map(a="../" + ONE), "expected files of the same folder"),
    "index without file": (weight_map(a="two.safetensors"), "expected a file 'two.safetensors'"),
    "index without tensor": (weight_map(a=ONE, b=ONE), f"expected a tensor 'b' in {ONE}"),
}


def assert_one_line(path, message, capsys):
    for arguments in ([str(path)], [str(path), str(path)]):
        assert main(["show", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1, err
        assert err.startswith("paramstats show: ") and str(path.parent) in err
        assert message in err and ("expected " in err or "cannot read" in err)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_gives_one_line(tmp_path, name, capsys):
    (file_name, content), message = BROKEN[name]
    save_file({"a": torch.ones(2)}, tmp_path / ONE)
    (tmp_path / file_name).write_bytes(content)
    assert_one_line(tmp_path / file_name, message, capsys)


def test_path_that_is_not_a_file_gives_one_line(tmp_path, capsys):
    assert_one_line(tmp_path / "nothing.pt", "nothing.pt: No such file", capsys)
    (tmp_path / "other.txt").touch()
    assert_one_line(tmp_path, "got a folder without one", capsys)
    for name in ("pipe.pt", "model.safetensors.index.json"):
        os.mkfifo(tmp_path / name)
        assert_one_line(tmp_path / name, "got no regular file", capsys)
    assert_one_line(tmp_path, "got no regular file", capsys)


@pytest.mark.parametrize(
    ("boxes", "is_valid"),
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
def test_parts_must_not_overlap(boxes, is_valid):
    shape = tuple(4 for _ in boxes[0][0])
    parts = tuple(Part("x", 0, sizes, (1,) * len(sizes), starts) for starts, sizes in boxes)
    tensor = StoredTensor("w", shape, torch.float32, parts)
    if is_valid:
        check_parts(tensor, "file")
    else:
        with pytest.raises(CheckpointError, match="expected parts with"):
            check_parts(tensor, "file")


ESC = "\x1b[31m\u202e"
HOSTILE = {
    "name": header({ESC: entry(shape=(3,))}, bytes(8)),
    "gap": header({ESC: entry(offsets=(4, 12))}, bytes(12)),
    "dtype": header({ESC: entry(ESC)}, bytes(8)),
    "entry": header({ESC: ESC}),
    "not JSON": header(ESC.encode()),
    "record": archive([(ESC, b""), (ESC, b"")]),
    "key": pickled(REBUILD % (2, FLOATS.replace(b"V0", b"V\x1b"), b"))") + b"."),
    "index": weight_map(**{ESC: "two.safetensors"}),
    "file of an index": weight_map(a=ESC),
    "warning": header({ESC: entry("F4", (2,), (0, 1))}, bytes(1)),
    "sparse": saved({ESC: torch.eye(2).to_sparse()}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_errors_and_warnings_have_no_control_characters(tmp_path, name):
    file_name, content = HOSTILE[name]
    folder = tmp_path / ESC
    folder.mkdir()
    (folder / file_name).write_bytes(content)
    for arguments in ({}, {"include": "nothing"}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                summarize_file(folder / file_name, **arguments)
            except CheckpointError as error:
                caught = [error]
        messages = [str(getattr(message, "message", message)) for message in caught]
        assert all(message.isprintable() for message in messages), messages
        assert messages
