"""Quantized weights are shown and compared as values, or labelled as codes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from paramstats import Summary
from paramstats._core.format import dtype_name
from paramstats._summary import record_of
from paramstats.checkpoints import _reading as reading
from paramstats.checkpoints import compare_files, summarize_file
from paramstats.checkpoints._files import Files
from paramstats.checkpoints._formats import safetensors
from paramstats.checkpoints._quantized import companions as companions
from paramstats.checkpoints._quantized.grids import block_size
from paramstats.checkpoints._quantized.resolve import resolve
from paramstats.checkpoints._reading import block_view
from paramstats.checkpoints._stored_tensors import check_parts
from tests.checkpoints.files import save, save_file

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
inf, nan = math.inf, math.nan
Tensors = dict[str, torch.Tensor]
Case = tuple[Tensors, str, np.ndarray]
"""The tensors of a file, the name of the weight in it, and its values."""


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def as_float64(x: torch.Tensor) -> np.ndarray:
    return x.to(torch.float64).numpy()


def repeated(scale: torch.Tensor, shape: tuple[int, ...], blocks: tuple[int, ...]) -> np.ndarray:
    """Return one scale per element, for scales of blocks of which the last may be partial."""
    full = as_float64(scale)
    for d, block in enumerate(blocks):
        full = np.repeat(full, block, axis=d)
    return full[tuple(slice(n) for n in shape)]


def integers(shape, low, high, dtype=torch.int64) -> torch.Tensor:
    return torch.randint(low, high, shape).to(dtype)


def pack_bits(numbers: np.ndarray, bits: int, width: int = 32) -> torch.Tensor:
    """Return unsigned integers as one string of bits per row, the lowest bits first."""
    strings = (numbers[..., None].astype(np.int64) >> np.arange(bits)) & 1
    strings = strings.reshape(*numbers.shape[:-1], -1)
    missing = -strings.shape[-1] % width
    strings = np.pad(strings, [(0, 0)] * (strings.ndim - 1) + [(0, missing)])
    words = np.packbits(strings.astype(np.uint8), axis=-1, bitorder="little")
    packed = torch.from_numpy(words)
    return packed if width == 8 else packed.view(torch.int32)


# Formats


def float8(shape, scale, blocks, suffix="weight_scale_inv", dtype=E4M3) -> Case:
    codes = (100 * torch.randn(shape)).to(dtype)
    values = as_float64(codes)
    if scale.dim() == len(shape):
        values = values * repeated(scale, shape, blocks)
    else:
        values = values * as_float64(scale).reshape(*scale.shape, *[1] * (len(shape) - scale.dim()))
    return {"l.weight": codes, f"l.{suffix}": scale}, "l.weight", values


def int8(zero: torch.Tensor | None = None) -> Case:
    codes, scale = integers((24, 40), -128, 128, torch.int8), torch.rand(24, 1).bfloat16()
    tensors = {"l.weight": codes, "l.weight_scale": scale}
    values = as_float64(codes)
    if zero is not None:
        tensors["l.weight_zero_point"] = zero
        values = values - as_float64(zero)
    return tensors, "l.weight", values * as_float64(scale)


def llm_int8() -> Case:
    codes, scb = integers((24, 40), -127, 128, torch.int8), torch.rand(24)
    tensors = {"l.weight": codes, "l.SCB": scb, "l.weight_format": torch.tensor(0).byte()}
    return tensors, "l.weight", as_float64(codes) * as_float64(scb)[:, None] / 127


def packed_integers(bits: int, columns: int = 192, groups: int = 6, *, zero=False, index=None):
    rows = 32
    codes = integers((rows, columns), 0, 1 << bits).numpy()
    scale = torch.rand(rows, groups).bfloat16()
    zeros = np.full((rows, groups), 1 << (bits - 1))
    tensors = {
        "l.weight_packed": pack_bits(codes, bits),
        "l.weight_scale": scale,
        "l.weight_shape": torch.tensor([rows, columns]),
    }
    if zero:
        zeros = integers((rows, groups), 0, 1 << bits).numpy()
        tensors["l.weight_zero_point"] = pack_bits(zeros.T, bits).t().contiguous()
    group = np.arange(columns) // (columns // groups)
    if index is not None:  # columns are sorted by their index, then cut into groups
        tensors["l.weight_g_idx"] = torch.tensor(index, dtype=torch.int32)
        if -1 not in index:
            group = group[np.argsort(np.argsort(index, kind="stable"), kind="stable")]
    return tensors, "l.weight_packed", (codes - zeros[:, group]) * as_float64(scale)[:, group]


FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def nvfp4() -> Case:
    codes = integers((16, 64), 0, 16).numpy()
    scale, total = (100 * torch.rand(16, 4)).to(E4M3), torch.tensor([700.0])
    tensors = {
        "l.weight_packed": pack_bits(codes, 4, 8),
        "l.weight_scale": scale,
        "l.weight_global_scale": total,
    }
    values = FLOAT4[codes] * repeated(scale, (16, 64), (1, 16)) / 700
    return tensors, "l.weight_packed", values


def mxfp4(name: str, names: tuple[str, str], shape: tuple[int, ...]) -> Case:
    codes = integers((*shape[:-1], 32 * shape[-1]), 0, 16).numpy()
    scale = integers(shape, 100, 140, torch.uint8)
    packed = pack_bits(codes, 4, 8)
    if names[0] == "_blocks":
        packed = packed.unflatten(-1, (-1, 16))
    tensors = {name + names[0]: packed, name + names[1]: scale}
    exponents = np.repeat(scale.numpy().astype(float), 32, axis=-1) - 127
    return tensors, name + names[0], FLOAT4[codes] * 2.0**exponents


def bitsandbytes(shape=(24, 128), kind="nf4", *, nested=False, storage=torch.uint8) -> Case:
    count = math.prod(shape)
    codes = integers((count,), 0, 16).numpy()
    packed = torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8))
    table = torch.rand(16)
    state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    blocks = -(-count // 64)
    absmax = scale = torch.rand(blocks)
    tensors = {"l.weight": packed.view(storage)[:, None], "l.weight.quant_map": table}
    if nested:
        absmax, nested_map = integers((blocks,), 0, 256, torch.uint8), torch.randn(256)
        nested_absmax = torch.rand(-(-blocks // 16))
        tensors |= {
            "l.weight.nested_absmax": nested_absmax,
            "l.weight.nested_quant_map": nested_map,
        }
        state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.25}
        scale = (
            nested_map.double()[absmax.long()]
            * nested_absmax.double().repeat_interleave(16)[:blocks]
        )
        scale = scale + 0.25
    tensors["l.weight.absmax"] = absmax
    encoded = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"l.weight.quant_state.bitsandbytes__{kind}"] = encoded
    values = as_float64(table)[codes] * np.repeat(as_float64(scale), 64)[:count]
    return tensors, "l.weight", values.reshape(shape)


def gptq(bits=4, columns=128, groups=4, *, index=None, plus=1, dtype=torch.float16) -> Case:
    rows = 64
    codes = integers((rows, columns), 0, 1 << bits).numpy()
    zeros = integers((rows, groups), 0, 1 << bits).numpy()
    scale = torch.rand(groups, rows).to(dtype)
    tensors = {
        "l.qweight": pack_bits(codes, bits).t().contiguous(),
        "l.qzeros": pack_bits(zeros.T, bits),
        "l.scales": scale,
    }
    group = np.arange(columns) // (columns // groups)
    if index is not None:
        tensors["l.g_idx"] = torch.tensor(index, dtype=torch.int32)
        group = np.array(index) if len(index) else group
    values = (codes - zeros[:, group] - plus) * as_float64(scale).T[:, group]
    return tensors, "l.qweight", values


def awq() -> Case:
    rows, columns = 64, 96
    codes, zeros = integers((rows, columns), 0, 16).numpy(), integers((rows, 3), 0, 16).numpy()
    scale = torch.rand(3, rows).half()
    order = np.arange(rows).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    tensors = {
        "l.qweight": pack_bits(codes.T[:, order], 4),
        "l.qzeros": pack_bits(zeros.T[:, order], 4),
        "l.scales": scale,
    }
    values = (codes - np.repeat(zeros, 32, axis=1)) * np.repeat(as_float64(scale).T, 32, axis=1)
    return tensors, "l.qweight", values


def renamed(case: Case, names: dict[str, str]) -> Case:
    tensors, name, values = case
    return {names.get(key, key): x for key, x in tensors.items()}, names.get(name, name), values


SHUFFLED = np.random.default_rng(0).permutation(np.arange(192) // 32).tolist()
FORMATS = {
    "blocks": lambda: float8((256, 384), torch.rand(2, 3), (128, 128)),
    "partial blocks": lambda: float8((300, 200), torch.rand(3, 2), (128, 128)),
    "partial blocks, one column": lambda: float8((576, 100), torch.rand(5, 1), (128, 128)),
    "bfloat16 scale": lambda: float8((256, 128), torch.rand(2, 1).bfloat16(), (128, 128)),
    "float16 scale": lambda: float8((256, 128), torch.rand(2, 1).half(), (128, 128)),
    "float64 scale": lambda: float8((256, 128), torch.rand(2, 1).double(), (128, 128)),
    "power of two": lambda: float8((256, 128), torch.rand(2, 1).to(E8M0), (128, 128)),
    "scalar": lambda: float8((30, 20), torch.tensor(0.3), (1, 1), "weight_scale"),
    "one per tensor": lambda: float8((30, 20), torch.rand(1), (30, 20), "scale_weight", E5M2),
    "one per row": lambda: float8((30, 20), torch.rand(30, 1), (1, 20), "weight_scale"),
    "vector of rows": lambda: float8((30, 20), torch.rand(30), (1, 20), "weight_scale"),
    "groups of columns": lambda: float8((30, 64), torch.rand(30, 2), (1, 32), "weight_scale"),
    "convolution": lambda: float8((8, 4, 3, 3), torch.rand(8), (1,), "weight_scale"),
    "experts": lambda: float8((3, 256, 200), torch.rand(3, 2, 2), (1, 128, 128)),
    "experts by column": lambda: float8((3, 16, 20), torch.rand(3, 1, 20), (1, 16, 1)),
    "DeepSeek inference": lambda: float8((256, 384), torch.rand(2, 3), (128, 128), "scale"),
    "torchao": lambda: renamed(
        float8((30, 20), torch.rand(30, 1), (1, 20)),
        {"l.weight": "l._weight_qdata", "l.weight_scale_inv": "l._weight_scale"},
    ),
    "quanto": lambda: renamed(
        float8((30, 20), torch.rand(30, 1), (1, 20)),
        {"l.weight": "l.weight._data", "l.weight_scale_inv": "l.weight._scale"},
    ),
    "without a module": lambda: renamed(
        float8((30, 20), torch.rand(30, 1), (1, 20)),
        {"l.weight": "weight", "l.weight_scale_inv": "weight_scale"},
    ),
    "int8": int8,
    "int8 with zero points": lambda: int8(integers((24, 1), -9, 9, torch.int8)),
    "LLM.int8": llm_int8,
    **{f"packed, {n} bits": lambda n=n: packed_integers(n) for n in range(2, 9)},
    **{f"zeros, {n} bits": lambda n=n: packed_integers(n, zero=True) for n in range(2, 9)},
    "packed, last word partial": lambda: packed_integers(4, 100, 1),
    "packed, last group partial": lambda: packed_integers(3, 40, 1),
    "packed, sorted columns": lambda: packed_integers(4, index=SHUFFLED),
    "packed, columns in order": lambda: packed_integers(4, zero=True, index=[-1] * 192),
    "packed, columns numbered": lambda: packed_integers(4, index=list(range(192))),
    "NVFP4": nvfp4,
    "MXFP4": lambda: mxfp4("l.weight", ("_packed", "_scale"), (16, 3)),
    "gpt-oss": lambda: mxfp4("experts.up_proj", ("_blocks", "_scales"), (2, 6, 3)),
    "NF4": bitsandbytes,
    "FP4": lambda: bitsandbytes(kind="fp4"),
    "NF4, blocks across rows": lambda: bitsandbytes((33, 70)),
    "NF4, nested": lambda: bitsandbytes(nested=True),
    "NF4, nested, blocks across rows": lambda: bitsandbytes((33, 70), nested=True),
    "NF4, stored as bfloat16": lambda: bitsandbytes(storage=torch.bfloat16),
    **{f"GPTQ, {n} bits": lambda n=n: gptq(n) for n in (2, 3, 4, 8)},
    "GPTQ, bfloat16": lambda: gptq(dtype=torch.bfloat16),
    "GPTQ, one group": lambda: gptq(groups=1),
    "GPTQ, g_idx": lambda: gptq(columns=192, groups=6, index=SHUFFLED),
    "GPTQ, empty g_idx": lambda: gptq(index=[]),
    "AWQ": awq,
}


def assert_values(summary: Summary, name: str, values: np.ndarray) -> None:
    """Assert that a row has the statistics of float64 values, and that the total is the same."""
    row, finite = summary[name], values[np.isfinite(values)]
    assert row.shape == values.shape and row.count == values.size
    assert row.nan_count == np.isnan(values).sum()
    assert row.pos_inf_count == (values == inf).sum()
    assert row.neg_inf_count == (values == -inf).sum()
    assert row.zero_count == (values == 0).sum()
    if len(finite) == values.size:
        assert row.norm == pytest.approx(np.linalg.norm(values), rel=1e-6)
        assert row.mean == pytest.approx(values.mean(), abs=1e-6 * row.rms)
        assert (row.min, row.max) == pytest.approx((values.min(), values.max()), rel=1e-6)
        assert summary.total.norm == pytest.approx(row.norm)
    assert summary.total.count == values.size


def labels(summary: Summary) -> dict[str, str]:
    return dict(record_of(summary).file.labels)


def groups(summary: Summary) -> dict[str, str]:
    return dict(record_of(summary).file.groups)


@pytest.mark.parametrize("form", ["safetensors", "pt", "dcp", "sharded safetensors"])
@pytest.mark.parametrize("kind", FORMATS)
def test_codes_are_shown_as_values(tmp_path, kind, form):
    tensors, name, values = FORMATS[kind]()
    summary = summarize_file(save(tensors, form, tmp_path))
    assert_values(summary, name, values)
    assert labels(summary)[name].startswith("values of ")
    assert groups(summary) == {key: "model" if key == name else "other" for key in tensors}
    assert labels(summary).keys() == tensors.keys()
    assert not summary.skipped


@pytest.mark.parametrize("kind", FORMATS)
def test_small_pieces_give_the_same_values(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(reading, "_DECODED", 100)
    tensors, name, values = FORMATS[kind]()
    assert_values(summarize_file(save(tensors, "safetensors", tmp_path)), name, values)


@pytest.mark.parametrize("decoded", [100, reading._DECODED])
@pytest.mark.parametrize("kind", FORMATS)
def test_codes_are_compared_as_values(tmp_path, monkeypatch, kind, decoded):
    """Positions matter here: values in another order would have a large change."""
    monkeypatch.setattr(reading, "_DECODED", decoded)
    tensors, name, values = FORMATS[kind]()
    plain = torch.from_numpy(values).float()
    other = name.replace("qweight", "weight").removesuffix("_packed").removesuffix("_blocks")
    (tmp_path / "a").mkdir()
    path = save({other: plain}, "safetensors", tmp_path / "a")
    for a, b in (
        (path, save(tensors, "safetensors", tmp_path)),
        (save(tensors, "pt", tmp_path),) * 2,
    ):
        (row,) = (row for row in compare_files(a, b).rows if row.count == values.size)
        assert row.relative_change < 1e-6
        assert row.norm_b == pytest.approx(np.linalg.norm(values), rel=1e-6)


def test_a_transposed_weight_and_transposed_scales_are_read(tmp_path):
    tensors, name, values = FORMATS["partial blocks"]()
    strided = {key: x.t().contiguous().t() for key, x in tensors.items()}
    assert not strided[name].is_contiguous()
    torch.save(strided, tmp_path / "a.pt")
    assert_values(summarize_file(tmp_path / "a.pt"), name, values)
    torch.save({name: torch.from_numpy(values).float()}, tmp_path / "b.pt")
    (row,) = compare_files(tmp_path / "a.pt", tmp_path / "b.pt").rows
    assert row.relative_change < 1e-6


def test_parts_on_several_ranks_are_read(tmp_path):
    """Rows on three ranks and columns on two: the parts divide blocks of scales."""
    tensors, name, values = FORMATS["partial blocks"]()
    path = save(tensors, "safetensors", tmp_path)
    files = Files()
    contents = resolve(safetensors.read(files.open(path), str(path), files), files)
    tensor = next(t for t in contents.tensors if t.name == name)
    (whole,) = tensor.parts
    parts = []
    for rows in ((0, 50), (50, 133), (133, 300)):
        for columns in ((0, 130), (130, 200)):
            starts, sizes = zip(*((b, e - b) for b, e in (rows, columns)), strict=True)
            offset = whole.offset + starts[0] * 200 + starts[1]
            parts.append(whole._replace(offset=offset, starts=starts, sizes=sizes))
    check_parts(tensor._replace(parts=tuple(parts)), "")
    total = sum(
        as_float64(block_view(torch.from_numpy(np.fromfile(path, np.uint8)), piece, block)).sum()
        for part in parts
        for block in reading.blocks_of_part(0, part, torch.uint8, tensor.decoder)
        for piece in [reading.Piece(str(path), 0, path.stat().st_size, ())]
    )
    assert total == pytest.approx(values.sum(), rel=1e-6)


@pytest.mark.parametrize("kind", ["partial blocks", "packed, 4 bits", "GPTQ, 4 bits"])
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_scales_that_are_not_finite_are_seen(tmp_path, kind, bad):
    tensors, name, values = FORMATS[kind]()
    scale = next(key for key in tensors if "scale" in key)
    tensors[scale][1, 1] = bad
    summary = summarize_file(save(tensors, "safetensors", tmp_path))
    row = summary[name]
    before = np.isfinite(values).sum()
    finite = row.count - row.nan_count - row.pos_inf_count - row.neg_inf_count
    assert 0 < finite < before
    assert row.nan_count if math.isnan(bad) else row.pos_inf_count and row.neg_inf_count
    assert any(name in str(finding) for finding in summary.findings())


def changed(kind: str, **replaced: torch.Tensor | None) -> Tensors:
    """Return the tensors of a format, some of them replaced or removed."""
    tensors, _, _ = FORMATS[kind]()
    for key, x in replaced.items():
        name = f"l.{key.replace('__', '.')}"
        assert name in tensors
        tensors[name] = x
    return {key: x for key, x in tensors.items() if x is not None}


def state(**fields: object) -> Tensors:
    """Return NF4 tensors with other fields in their quant_state."""
    tensors, _, _ = FORMATS["NF4, nested"]()
    name = "l.weight.quant_state.bitsandbytes__nf4"
    old = json.loads(bytes(tensors[name].tolist()))
    tensors[name] = torch.tensor(list(json.dumps({**old, **fields}).encode()), dtype=torch.uint8)
    return tensors


def nf4_of(bytes_of_state: torch.Tensor | None) -> Tensors:
    tensors, _, _ = FORMATS["NF4"]()
    tensors["l.weight.quant_state.bitsandbytes__nf4"] = bytes_of_state
    return {key: x for key, x in tensors.items() if x is not None}


UNCLEAR = {
    "no scale": lambda: {"l.weight": integers((4, 4), -9, 9, torch.int8)},
    "bytes without scale": lambda: {"l.weight": integers((4, 4), 0, 9, torch.uint8)},
    "words without scale": lambda: {"l.qweight": integers((4, 4), 0, 9, torch.int32)},
    "packed without scale": lambda: changed("packed, 4 bits", weight_scale=None),
    "packed without shape": lambda: changed("packed, 4 bits", weight_shape=None),
    "scale does not fit": lambda: changed("blocks", weight_scale_inv=torch.rand(3, 5)),
    "too many scales": lambda: changed("blocks", weight_scale_inv=torch.rand(999, 3)),
    "no scales": lambda: changed("blocks", weight_scale_inv=torch.rand(0, 3)),
    "scales of columns": lambda: changed("blocks", weight_scale_inv=torch.rand(384)),
    "scale of integers": lambda: changed("blocks", weight_scale_inv=torch.ones(2, 3).int()),
    "complex scale": lambda: changed("blocks", weight_scale_inv=torch.rand(2, 3) * 1j),
    "two scales": lambda: changed("blocks") | {"l.weight_scale": torch.rand(2, 3)},
    "two levels of scales": lambda: changed("scalar") | {"l.weight_scale_2": torch.rand(1)},
    "zero points do not fit": lambda: changed(
        "int8 with zero points", weight_zero_point=torch.ones(7)
    ),
    "format of LLM.int8": lambda: changed("LLM.int8", weight_format=torch.tensor(2).byte()),
    "SCB does not fit": lambda: changed("LLM.int8", SCB=torch.rand(40)),
    "shape does not fit": lambda: changed("packed, 4 bits", weight_shape=torch.tensor([32, 999])),
    "huge shape": lambda: changed("packed, 4 bits", weight_shape=torch.tensor([1 << 62, 1 << 62])),
    "negative shape": lambda: changed("packed, 4 bits", weight_shape=torch.tensor([32, -192])),
    "long shape": lambda: changed("packed, 4 bits", weight_shape=torch.ones(999).long()),
    "shape of floats": lambda: changed("packed, 4 bits", weight_shape=torch.tensor([32.0, 192.0])),
    "bits not clear": lambda: packed_integers(4, 6, 1)[0],
    "packed zeros do not fit": lambda: changed(
        "zeros, 4 bits", weight_zero_point=torch.ones(4, 5).int()
    ),
    "index does not fit": lambda: changed(
        "packed, sorted columns", weight_g_idx=torch.ones(7).int()
    ),
    "NVFP4 without global scale": lambda: changed("NVFP4", weight_global_scale=None),
    "NVFP4 blocks do not fit": lambda: changed("NVFP4", weight_scale=torch.ones(16, 3).to(E4M3)),
    "state of random bytes": lambda: nf4_of(integers((80,), 0, 256, torch.uint8)),
    "state that is a list": lambda: nf4_of(torch.tensor(list(b"[1]"), dtype=torch.uint8)),
    "state of brackets": lambda: nf4_of(torch.full((60_000,), ord("["), dtype=torch.uint8)),
    "no state": lambda: nf4_of(None),
    "huge state": lambda: nf4_of(torch.zeros(1 << 17, dtype=torch.uint8)),
    "shape in the state": lambda: state(shape=[1 << 40, 1 << 40]),
    "shape of text": lambda: state(shape=["24", 128]),
    "odd columns": lambda: state(shape=[1024, 3]),
    "block size": lambda: state(blocksize=0),
    "block size that is a list": lambda: state(blocksize=[64]),
    "nested block size": lambda: state(nested_blocksize=0),
    "nested offset": lambda: state(nested_offset="0"),
    "absmax does not fit": lambda: changed("NF4", weight__absmax=torch.rand(5)),
    "absmax of integers": lambda: changed("NF4", weight__absmax=torch.ones(48).byte()),
    "map does not fit": lambda: changed("NF4", weight__quant_map=torch.rand(15)),
    "GPTQ without zeros": lambda: changed("GPTQ, 4 bits", qzeros=None),
    "GPTQ scales do not fit": lambda: changed("GPTQ, 4 bits", scales=torch.rand(4, 63)),
    "GPTQ bits": lambda: changed("GPTQ, 4 bits", qzeros=torch.ones(4, 10).int()),
    "GPTQ groups": lambda: gptq(columns=96, groups=3)[0] | {"l.qweight": torch.ones(16, 64).int()},
    "g_idx beyond the groups": lambda: changed("GPTQ, g_idx", g_idx=torch.full((192,), 6).int()),
    "negative g_idx": lambda: changed("GPTQ, g_idx", g_idx=torch.full((192,), -1).int()),
    "g_idx does not fit": lambda: changed("GPTQ, g_idx", g_idx=torch.ones(7).int()),
}


@pytest.mark.parametrize("form", ["safetensors", "pt"])
@pytest.mark.parametrize("kind", UNCLEAR)
def test_codes_that_cannot_be_decoded_are_labelled(tmp_path, kind, form):
    torch.manual_seed(0)
    tensors = UNCLEAR[kind]()
    (name,) = (n for n in ("l.weight", "l.qweight", "l.weight_packed") if n in tensors)
    tensors["n.weight"] = torch.randn(4, 4)
    path = save(tensors, form, tmp_path)
    summary = summarize_file(path)
    assert " codes: " in labels(summary)[name]
    assert summary[name].shape == tensors[name].shape
    assert summary[name].dtype == tensors[name].dtype
    assert groups(summary) == {key: "model" if key == "n.weight" else "other" for key in tensors}
    assert summary.total.count == 16
    assert not summary.findings() and not summary.skipped
    comparison = compare_files(path, path)
    assert comparison.skipped[name].startswith("not compared: ")
    assert name not in {row.name for row in comparison.rows}


def test_large_companions_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(companions, "MAX_BYTES", 64)
    tensors, name, _ = FORMATS["groups of columns"]()
    summary = summarize_file(save(tensors, "safetensors", tmp_path))
    assert "'l.weight_scale' has 240 bytes" in labels(summary)[name]


def test_companions_are_dropped_when_there_are_many(tmp_path, monkeypatch):
    monkeypatch.setattr(companions, "MAX_BYTES", 300)
    tensors, norms = {}, {}
    for i in range(4):
        of_layer, name, values = FORMATS["groups of columns"]()
        tensors |= {f"{i}.{key}": x for key, x in of_layer.items()}
        norms[f"{i}.{name}"] = np.linalg.norm(values)
    summary = summarize_file(save(tensors, "safetensors", tmp_path))
    assert {name: summary[name].norm for name in norms} == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize(
    ("form", "plus"), [("gptq", 1), ("gptq_v2", 0), (None, 1), ("marlin", None), ("gemm", None)]
)
@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
def test_the_format_of_gptq_is_read_from_the_configuration(tmp_path, form, plus, file):
    tensors, name, values = gptq(plus=plus or 0)
    config = {"quant_method": "gptq", "bits": 4, "checkpoint_format": form}
    content = {"quantization_config": config} if file == "config.json" else config
    (tmp_path / file).write_text(json.dumps(content))
    summary = summarize_file(save(tensors, "safetensors", tmp_path))
    if plus is None:
        assert "int32 codes: " in labels(summary)[name]
    else:
        assert_values(summary, name, values)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"quantization_config": 3}', b"[" * 99_999])
def test_a_damaged_configuration_is_ignored(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    tensors, name, values = gptq()
    assert_values(summarize_file(save(tensors, "safetensors", tmp_path)), name, values)


def plain_float8(largest: float, dtype: torch.dtype = E4M3) -> torch.Tensor:
    x = torch.randn(64, 64)
    return (x / x.abs().max() * largest).to(dtype)


FLOAT8 = {
    "values": lambda: {"l.weight": plain_float8(3)},
    "values of float8_e5m2": lambda: {"l.weight": plain_float8(3, E5M2), "n.weight": torch.ones(3)},
    "codes": lambda: {"l.weight": plain_float8(448)},
    "codes of float8_e5m2": lambda: {"l.weight": plain_float8(57344, E5M2)},
    "codes elsewhere": lambda: {"l.weight": plain_float8(3), "m.weight": plain_float8(448)},
    "codes with a mark": lambda: {
        "l.weight": plain_float8(3),
        "scaled_fp8": torch.empty(0).to(E4M3),
    },
    "codes, scales elsewhere": lambda: {
        **{key.replace("l.", "m."): x for key, x in FORMATS["blocks"]()[0].items()},
        "l.weight": plain_float8(3),
    },
}


@pytest.mark.parametrize("kind", FLOAT8)
def test_float8_without_a_scale_are_values_unless_they_fill_the_range(tmp_path, kind):
    tensors, name, are_codes = FLOAT8[kind](), "l.weight", kind.startswith("codes")
    path = save(tensors, "safetensors", tmp_path)
    summary = summarize_file(path)
    dtype = dtype_name(tensors[name].dtype)
    expected = f"{dtype} codes: no scale found" if are_codes else "float8 values; no scale found"
    assert labels(summary)[name] == expected
    assert groups(summary)[name] == ("other" if are_codes else "model")
    assert (name in compare_files(path, path).skipped) == are_codes
    assert summary[name].norm == pytest.approx(tensors[name].double().norm().item(), rel=1e-6)


def test_a_quantization_changes_little_and_codes_are_not_compared(tmp_path):
    weight = torch.randn(256, 256) * 0.02
    blocks = weight.view(2, 128, 2, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).view(256, 256).to(E4M3)
    values = as_float64(codes) * repeated(scale, (256, 256), (128, 128))
    paths = {}
    for file, tensors in (
        ("bf16", {"l.weight": weight.bfloat16()}),
        ("fp8", {"l.weight": codes, "l.weight_scale_inv": scale}),
        ("codes", {"l.weight": codes}),
    ):
        paths[file] = tmp_path / f"{file}.safetensors"
        save_file(tensors, paths[file])
    (row,) = compare_files(paths["bf16"], paths["fp8"]).rows
    original = as_float64(weight.bfloat16())
    expected = np.linalg.norm(values - original) / np.linalg.norm(original)
    assert 0.02 < expected < 0.04
    assert row.relative_change == pytest.approx(expected, rel=1e-5)
    for a, b, side in (("bf16", "codes", "b"), ("codes", "bf16", "a"), ("fp8", "codes", "b")):
        comparison = compare_files(paths[a], paths[b])
        assert not comparison.rows
        assert comparison.skipped == {
            "l.weight": f"not compared: float8_e4m3fn codes: no scale found (in {side})"
        }


def test_include_does_not_separate_a_weight_from_its_scale(tmp_path):
    tensors, name, values = FORMATS["blocks"]()
    path = save(tensors, "safetensors", tmp_path)
    summary = summarize_file(path, exclude="scale")
    assert list(summary) == [name]
    assert_values(summary, name, values)


def test_integers_that_are_no_codes_stay(tmp_path):
    tensors = {
        "e.position_ids": torch.arange(9)[None],
        "tokens": torch.arange(9, dtype=torch.int32),
        "mask": torch.ones(9, dtype=torch.uint8),
        "table": torch.ones(9, dtype=torch.int8),
        "ids.weight": torch.arange(9),
        "logit_scale": torch.tensor(2.0),
        "n.weight": torch.ones(3),
    }
    summary = summarize_file(save(tensors, "pt", tmp_path))
    assert set(groups(summary).values()) == {"model"} and not labels(summary)


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [
        (256, 2, 128), (300, 3, 128), (576, 5, 128), (129, 2, 128), (128, 1, 128), (7, 7, 1),
        (192, 3, 64), (96, 3, 32), (64, 4, 16), (60, 5, 12), (360, 3, 128), (63, 4, 16),
        (7, 3, 0), (3, 7, 0), (11, 4, 0), (1, 1, 1),
    ],
)  # fmt: skip
def test_block_sizes(size, count, expected):
    assert block_size(size, count) == expected
