"""Files of numpy, GGUF and HDF5 give the statistics of the arrays that their libraries load."""

from __future__ import annotations

import ctypes
import io
import json
import math
import os
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import paramstats
from paramstats._summary import record_of
from paramstats.checkpoints import CheckpointError, summarize_file
from paramstats.checkpoints._formats.gguf import Q8Blocks
from tests import oracle
from tests.checkpoints.test_any_bytes import edited, edits, read
from tests.checkpoints.test_hostile import MAX_MEGABYTES, SCRIPT

ARRAYS = {
    "large": np.linspace(-1, 1, 1300 * 1021, dtype="f4").reshape(1300, 1021),
    "fortran": np.asfortranarray(np.linspace(0, 9, 210).reshape(5, 6, 7)),
    "half": np.linspace(-2, 2, 12, dtype="f2").reshape(3, 4),
    "scalar": np.array(2.5),
    "empty": np.empty((0, 3)),
    "odd": np.array([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30], dtype="f4"),
    "bool": np.arange(9) % 2 == 0,
    **{name: np.arange(7, dtype=name) for name in ("i1", "i2", "i4", "i8")},
    **{name: np.arange(7, dtype=name) for name in ("u1", "u2", "u4", "u8")},
}
COMPLEX = {"c8": np.arange(7, dtype="c8") * 1j, "c16": np.arange(7, dtype="c16") - 2j}
UNREAD = {
    "big": (np.arange(3, dtype=">f4"), "big-endian elements"),
    "text": (np.array(["a"]), "text"),
    "objects": (np.array([{}, None]), "Python objects, which only a pickle could read"),
    "records": (np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]), "records of several fields"),
    "dates": (np.array(["2020-01-01"], dtype="M8[D]"), "dtype <M8[D], which torch does not have"),
    "bfloat16": (np.zeros(3, dtype="V2"), "elements without a type (arrays of ml_dtypes"),
    "long": (np.zeros(2, dtype=np.longdouble), "which torch does not have"),
}


def check(summary: paramstats.Summary, arrays: dict[str, np.ndarray]) -> None:
    """Assert the statistics of arrays, and nothing else."""
    assert list(summary) == list(arrays) and not summary.skipped
    for name, array in arrays.items():
        x = torch.from_numpy(np.array(array, order="C"))
        assert (summary[name].shape, summary[name].dtype) == (tuple(x.shape), x.dtype)
        if x.is_complex():
            assert summary[name].norm == pytest.approx(x.to(torch.complex128).norm().item())
        else:
            oracle.check(summary[name], x)


def unread(path: Path) -> paramstats.Summary:
    with pytest.warns(RuntimeWarning, match="could not be read"):
        return summarize_file(path)


def test_npz(backend, tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS, **COMPLEX)
    check(summarize_file(tmp_path / "a.npz"), {**ARRAYS, **COMPLEX})
    (tmp_path / "a.npz").rename(tmp_path / "b.pt")  # the content tells the format
    check(summarize_file(tmp_path / "b.pt"), {**ARRAYS, **COMPLEX})


@pytest.mark.parametrize("name", [*ARRAYS, *COMPLEX])
def test_npy(backend, tmp_path, name):
    array = {**ARRAYS, **COMPLEX}[name]
    np.save(tmp_path / "a.npy", array)
    check(summarize_file(tmp_path / "a.npy"), {"tensor": array})


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_of_every_version(tmp_path, version):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, ARRAYS["fortran"], version)
    check(summarize_file(tmp_path / "a.npy"), {"tensor": ARRAYS["fortran"]})


def test_arrays_that_cannot_be_read_are_listed_with_the_reason(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **{name: array for name, (array, _) in UNREAD.items()}, w=np.ones(4))
    summary = unread(path)
    assert set(summary.skipped) == set(UNREAD)
    for name, (array, reason) in UNREAD.items():
        assert reason in summary.skipped[name] and summary[name].shape == array.shape
    assert summary.total.norm == 2
    np.savez_compressed(path, **ARRAYS)
    summary = unread(path)
    assert list(summary) == list(summary.skipped) == list(ARRAYS)
    assert {name: summary[name].shape for name in ARRAYS} == {n: x.shape for n, x in ARRAYS.items()}
    assert all(text.startswith("compressed elements; save") for text in summary.skipped.values())


def test_bytes_after_an_array_are_noted(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.save(file, np.ones(4))
        np.save(file, np.zeros(3))
    summary = summarize_file(tmp_path / "a.npy")
    assert summary["tensor"].norm == 2
    assert record_of(summary).file.notes == ("not read: 152 bytes after the array",)


def npy(header: bytes, data: bytes = b"", version: int = 1) -> bytes:
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + data


def npz(*records: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two records may have the same name
        for name, content in records:
            archive.writestr(name, content)
    return out.getvalue()


def header(shape: str = "(2,)", descr: str = "'<f4'", order: str = "False") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


W = npy(header(), bytes(8))
OVERLAPPING = npz(("w.npy", W), ("v.npy", W)).replace(
    struct.pack("<I", 0x1E + 5 + len(W)) + b"v.npy", struct.pack("<I", 0) + b"v.npy"
)


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def gguf(
    tensors: bytes = b"", count: int = 1, pairs: bytes = b"", pair_count: int = 0, version: int = 3
) -> bytes:
    """Return a GGUF file with 64 bytes of elements."""
    begin = b"GGUF" + struct.pack("<IQQ", version, count, pair_count) + pairs + tensors
    return begin + bytes(-len(begin) % 32 + 64)


def described(sizes=(2,), kind: int = 0, offset: int = 0, name: bytes = b"w") -> bytes:
    sizes = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def pair(kind: int, value: bytes, key: bytes = b"k") -> bytes:
    return text(key) + struct.pack("<I", kind) + value


ALIGNMENT = b"general.alignment"
HUGE = struct.pack("<Q", 1 << 60)
CODE = "__import__('os')"
BROKEN = {
    "npy that is truncated": (W[:-1], f"expected {len(W)} bytes, got {len(W) - 1}"),
    "npy without a header": (W[:9], "expected an array of numpy, version 1 to 3"),
    "npy of version 4": (npy(header(), version=4), "version 1 to 3"),
    "npy with a long header": (npy(b" " * 60_000), "a header of at most 10,000 bytes, got 60000"),
    "npy with code": (npy(header(CODE), bytes(8)), "expected a header of an array of numpy"),
    "npy with nested code": (npy(header("(" * 9_000)), "expected a header of an array of numpy"),
    "npy with a negative size": (npy(header("(-2,)")), "expected a header of an array of numpy"),
    "npy with a long number": (npy(header(f"({'9' * 5000},)")), "expected the shape of an array"),
    "npy with many sizes": (npy(header(f"({'1,' * 65})")), "expected the shape of an array"),
    "npy with a huge shape": (npy(header(f"({'999999999,' * 8})")), "than can be counted"),
    "npz without a directory": (npz(("w.npy", W))[:-9], "expected a complete .npz file"),
    "npz with a name twice": (npz(("w.npy", W), ("w.npy", W)), "expected every array once"),
    "npz with a short array": (npz(("w.npy", W[:-4])), "bytes within the file, got"),
    "npz with a long array": (npz(("w.npy", W + b"x")), f"got {len(W) + 1} at byte"),
    "npz of something else": (npz(("w.npy", b"x")), "expected an array of numpy"),
    "npz with bzip2": (npz(("w.npy", W), compression=zipfile.ZIP_BZIP2), "without compression"),
    "npz with overlaps": (OVERLAPPING, "in the same bytes"),
    "gguf of version 1": (gguf(version=1), "with version 2 or 3, got 1"),
    "gguf in big-endian order": (gguf(version=3 << 24), "got big-endian numbers"),
    "gguf that is truncated": (
        gguf(described())[:40],
        "a GGUF header of at most 40 bytes, got a l",
    ),
    "gguf without elements": (gguf(described((32,)))[:-1], "128 bytes at byte 64 of 127"),
    "gguf with many tensors": (gguf(described(), count=1 << 60), "tensors and keys that fit in"),
    "gguf with many pairs": (gguf(pair_count=1 << 60), "tensors and keys that fit in"),
    "gguf with a long name": (gguf(HUGE), "a name of at most 65,536 bytes"),
    "gguf with a long text": (gguf(pairs=pair(8, HUGE), pair_count=1), "a GGUF header of at most"),
    "gguf with a long list": (
        gguf(pairs=pair(9, struct.pack("<I", 8) + HUGE), pair_count=1),
        "a GGUF header of at most",
    ),
    "gguf with a list of lists": (
        gguf(pairs=pair(9, struct.pack("<IQ", 9, 1)), pair_count=1),
        "values of a known type, got type 9",
    ),
    "gguf with an unknown value": (gguf(pairs=pair(99, b""), pair_count=1), "got type 99"),
    "gguf with many sizes": (gguf(described((1,) * 9)), "at most 8 dimensions of 'w', got 9"),
    "gguf with huge sizes": (gguf(described((1 << 63, 1 << 63))), "than can be counted"),
    "gguf with a name twice": (gguf(described() * 2, count=2), "every name once, got 'w' twice"),
    "gguf with overlaps": (
        gguf(described() + described(name=b"v"), count=2),
        "some in the same bytes",
    ),
    "gguf without alignment": (gguf(described(offset=4)), "8 bytes at byte 68 of"),
    "gguf with parts of blocks": (
        gguf(described((31,), 8)),
        "rows of 'w' in blocks of 32, got [31]",
    ),
    "gguf with a block and no size": (gguf(described((), 8)), "rows of 'w' in blocks of 32"),
    **{
        f"gguf with alignment {n}": (
            gguf(pairs=pair(4, struct.pack("<I", n), ALIGNMENT), pair_count=1),
            f"a power of two as general.alignment, got {n}",
        )
        for n in (0, 3)
    },
    "hdf5 without content": (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5 file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        summarize_file(tmp_path / "a")
    assert message in str(caught.value) and str(caught.value).isprintable()


HOSTILE = {
    "many tensors": gguf(
        b"".join(described((), 0, name=b"%d" % i) for i in range(20_000)), count=20_000
    ),
    "zeros in an archive": (npz(("w.npy", W)), 3 << 30),
    "zeros after a header": (gguf(count=0, pair_count=1 << 40), 3 << 30),
    "texts": gguf(pairs=pair(9, struct.pack("<IQ", 8, 50_000)) + bytes(400_000), pair_count=1),
    "name of an array": npz(("w" * 60_000 + ".npy", W)),
    "arrays": npz(*((f"{i}.npy", npy(header("(0,)"))) for i in range(3000))),
}


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="no peak memory of a moment on this system"
)
def test_hostile_files_need_little_memory_and_time(tmp_path):
    paths = []
    for i, content in enumerate(HOSTILE.values()):
        data, size = content if isinstance(content, tuple) else (content, 0)
        paths.append(tmp_path / str(i))
        paths[-1].write_bytes(data)
        if size:
            with open(paths[-1], "r+b") as file:
                file.truncate(size)
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    results = map(json.loads, process.stdout.splitlines())
    for name, (megabytes, result) in zip(HOSTILE, results, strict=True):
        assert megabytes < MAX_MEGABYTES, name
        assert result.startswith(("paramstats.checkpoints.summarize_file: expected", "read {"))


# GGUF


def test_gguf(backend, tmp_path):
    gguf_py = pytest.importorskip("gguf", reason="gguf is not installed")
    path = tmp_path / "a.gguf"
    writer = gguf_py.GGUFWriter(path, "llama")
    writer.add_array("tokens", ["a", "bb", ""] * 3)
    writer.add_array("scores", [1.0, 2.0])
    writer.add_bool("flag", True)
    names = ("large", "half", "i1", "i2", "i4", "i8")
    for name in names:
        writer.add_tensor(name, ARRAYS[name])
    codes = ("BF16", "Q8_0", "Q4_0", "Q6_K")
    values = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)).numpy()
    for name in codes:
        kind = gguf_py.GGMLQuantizationType[name]
        try:
            packed = gguf_py.quants.quantize(values, kind)
        except NotImplementedError:
            packed = np.zeros((6, 420), dtype="u1")  # the library only reads this one
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    summary = unread(path)
    assert list(summary) == [*names, *codes]
    for name in names:
        oracle.check(summary[name], torch.from_numpy(ARRAYS[name]))
    loaded = {t.name: t for t in gguf_py.GGUFReader(path).tensors}
    for name in codes:
        assert summary[name].shape == (6, 512) and summary[name].count == 6 * 512
        if name not in summary.skipped:
            x = gguf_py.quants.dequantize(loaded[name].data, loaded[name].tensor_type)
            oracle.check(summary[name], torch.from_numpy(np.array(x)))
    reason = "Q4_0 blocks, which paramstats does not decode"
    assert summary.skipped["Q4_0"] == reason and "BF16" not in summary.skipped
    assert record_of(summary).file.labels["Q6_K"] == "Q6_K codes"


def test_gguf_that_was_written_by_hand(tmp_path):
    elements = struct.pack("<2f", 3, 4)
    content = gguf(described((1, 2)))
    (tmp_path / "a").write_bytes(content[:-64] + elements)
    summary = summarize_file(tmp_path / "a")
    assert summary["w"].shape == (2, 1) and summary["w"].norm == 5
    (tmp_path / "a").write_bytes(gguf(described((32,), 2) + described((), 99, 32, b"v"), count=2))
    summary = unread(tmp_path / "a")
    assert summary.skipped == {
        "w": "Q4_0 blocks, which paramstats does not decode",
        "v": "type 99 blocks, which paramstats does not decode",
    }


def test_blocks_of_q8_0_are_a_factor_and_integers():
    integers = torch.arange(-32, 32, dtype=torch.int8).view(2, 32)
    factors = torch.tensor([[0.5], [-2.0]], dtype=torch.float16)
    codes = torch.cat([factors.view(torch.uint8), integers.view(torch.uint8)], 1).view(1, 68)
    values = Q8Blocks(1).decode(codes, ((0, 0), (1, 64)))
    assert values.tolist() == [[n / 2 for n in range(-32, 0)] + [-2.0 * n for n in range(32)]]


# HDF5


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py", reason="h5py is not installed")


def test_hdf5(backend, tmp_path, h5py):
    arrays = ARRAYS | COMPLEX
    with h5py.File(tmp_path / "a.h5", "w", track_order=True) as file:
        for name, array in arrays.items():
            file[f"layers/{name}"] = array
    check(summarize_file(tmp_path / "a.h5"), {f"layers.{k}": x for k, x in arrays.items()})


def test_chunks_of_hdf5_are_read_where_they_are(backend, tmp_path, h5py):
    path = tmp_path / "a.h5"
    array = ARRAYS["large"]
    with h5py.File(path, "w") as file:
        file.create_dataset("w", data=array, chunks=(256, 100))
        file["tied"] = file["w"]
        file.create_dataset("optimizer/vars/0", data=np.ones(4), chunks=(3,))
    summary = summarize_file(path)
    oracle.check(summary["w"], torch.from_numpy(array))
    assert summary["optimizer.vars.0"].norm == 2
    assert list(summary) == ["tied", "optimizer.vars.0"] and summary["w"].aliases == ("w",)
    assert record_of(summary).file.groups["optimizer.vars.0"] == "optimizer"


@contextmanager
def opened_files(path: Path) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether any process opened a file since the last call."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "inotify_init1"):
        pytest.skip("this system does not tell which files are opened")
    watch = libc.inotify_init1(os.O_NONBLOCK)
    in_open = 0x20
    assert libc.inotify_add_watch(watch, bytes(path), in_open) >= 0

    def was_opened() -> bool:
        try:
            return bool(os.read(watch, 4096))
        except BlockingIOError:
            return False

    yield was_opened
    os.close(watch)


def test_hdf5_never_leaves_its_file(tmp_path, h5py):
    """Links and datasets in other files are named, and their files are not opened."""
    path, other = tmp_path / "a.h5", tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["w"] = np.ones(4, "f4")
        file["soft"] = h5py.SoftLink("/w")
        file["outside"] = h5py.ExternalLink("other.h5", "/w")
        file["via"] = h5py.SoftLink("/outside")
        file.create_dataset("raw", shape=(4,), dtype="f4", external=[(other, 0, 16)])
        layout = h5py.VirtualLayout(shape=(4,), maxshape=(None,), dtype="f4")
        source = h5py.VirtualSource(str(other), "w", shape=(4,), maxshape=(None,))
        layout[: h5py.h5s.UNLIMITED] = source[: h5py.h5s.UNLIMITED]
        file.create_virtual_dataset("virtual", layout)
        file["loop/up"] = file["/"]
    with h5py.File(other, "w") as file:
        file["w"] = np.ones(4, "f4")
    with opened_files(other) as opened:
        summary = summarize_file(path)
        assert not opened()
        other.read_bytes()
        assert opened()
    assert list(summary) == ["w"] and summary["w"].norm == 2
    assert record_of(summary).file.notes == (
        "not read: outside, soft, via (links, which are not followed)",
        "not read: raw, virtual (made of other datasets or files)",
    )


def test_filters_of_hdf5_are_never_loaded(tmp_path, h5py):
    plugins, path = tmp_path / "plugins", tmp_path / "a.h5"
    plugins.mkdir()
    with h5py.File(path, "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((4,))
        properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (1,))  # zstd, a plugin
        space = h5py.h5s.create_simple((4,))
        dataset = h5py.h5d.create(file.id, b"w", h5py.h5t.NATIVE_FLOAT, space, properties)
        dataset.write_direct_chunk((0,), bytes(16), 0)
    h5py.h5pl.prepend(bytes(plugins))
    try:
        with opened_files(plugins) as opened:
            assert unread(path).skipped["w"].startswith("compressed elements")
            assert not opened()
            with h5py.File(path) as file, pytest.raises(OSError):
                file["w"][()]
            assert opened()
    finally:
        h5py.h5pl.remove(0)


def test_datasets_that_cannot_be_read_are_listed_with_the_reason(tmp_path, h5py):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("gzip", data=ARRAYS["large"], compression="gzip")
        file.create_dataset("sparse", shape=(9, 9), chunks=(3, 3), dtype="f4")[:3] = 1
        file.create_dataset("unwritten", shape=(9,), dtype="f4")
        file["text"] = "hello"
        file["big"] = np.arange(3, dtype=">f4")
        file["null"] = h5py.Empty("f4")
        file["w"] = np.ones(4)
        bfloat16 = h5py.h5t.IEEE_F16LE.copy()
        bfloat16.set_fields(15, 7, 8, 0, 7)
        bfloat16.set_ebias(127)
        h5py.h5d.create(file.id, b"bfloat16", bfloat16, h5py.h5s.create_simple((4,)))
    summary = unread(path)
    assert summary.total.norm == 2 and dict(summary.skipped) == {
        "bfloat16": "numbers in a format that numpy does not have",
        "big": "big-endian elements; convert them with numpy",
        "gzip": "compressed elements; write the file again without compression",
        "null": "no elements (a null dataset)",
        "sparse": "chunks that were never written",
        "text": "elements that are not numbers",
        "unwritten": "no place in the file for its elements",
    }


def test_hdf5_without_h5py_names_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(CheckpointError, match=r"h5py, which reads HDF5 files.*pip install"):
        summarize_file(tmp_path / "a.h5")


# Any bytes


@pytest.mark.parametrize("form", ["npy", "npz", "gguf"])
@settings(max_examples=60)
@given(changes=edits, near=st.sampled_from([60, 300, 1 << 30]))
def test_edited_file_is_refused_or_read(tmp_path_factory, form, changes, near):
    data = {
        "npy": npy(header("(3, 4)"), bytes(range(48))),
        "npz": npz(("w.npy", W), ("v.npy", npy(header("(2, 2)", "'<f8'", "True"), bytes(32)))),
        "gguf": gguf(
            described() + described((32,), 8, 32, b"v"),
            2,
            pair(9, struct.pack("<IQ", 8, 1) + text(b"t")),
            1,
        ),
    }[form]
    path = tmp_path_factory.getbasetemp() / f"edited.{form}"
    path.write_bytes(edited(data, changes, near))
    read(path)
