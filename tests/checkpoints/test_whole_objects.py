"""Files with objects of any class: every tensor is listed, and nothing is lost silently."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import io
import pathlib
import pickle
import warnings

import pytest
import torch
from torch import nn

import paramstats
from paramstats import checkpoints
from paramstats._summary import record_of
from paramstats.checkpoints import summarize_file
from tests.checkpoints.test_broken_files import pickled
from tests.checkpoints.test_hostile import DENSE

FORMATS = {
    "zip": torch.save,
    "zip of protocol 5": functools.partial(torch.save, pickle_protocol=5),
    "legacy": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    **{
        f"protocol {n}": lambda value, path, n=n: path.write_bytes(pickle.dumps(value, n))
        for n in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


def notes(summary) -> tuple[str, ...]:
    return record_of(summary).file.notes


def labels(summary) -> dict[str, str]:
    return dict(record_of(summary).file.labels)


class Mode(enum.Enum):
    TRAIN = 1


@dataclasses.dataclass
class Config:
    mode: Mode = Mode.TRAIN
    weight: torch.Tensor | None = None


class Slots:
    __slots__ = ("bias",)

    def __getstate__(self):
        return None, {"bias": self.bias}

    def __setstate__(self, state):
        self.bias = state[1]["bias"]


class Words(dict):
    """A dict of a class of its own."""


Pair = collections.namedtuple("Pair", "x y")


class Tagged(torch.Tensor):
    """A subclass whose elements are stored as those of a plain tensor."""


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.layers = nn.ModuleList([nn.Linear(4, 2), nn.ReLU()])
        self.tied = nn.Linear(4, 2, bias=False)
        self.tied.weight = self.layers[0].weight
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(2))])
        self.rnn = nn.LSTM(2, 3)
        self.anchors = torch.arange(6.0).view(2, 3)
        self.parent = [self]


def ones(*sizes: int) -> torch.Tensor:
    return torch.ones(sizes)


def make(kind: str) -> tuple[object, dict[str, torch.Tensor]]:
    """Return a value, and the tensors that must be listed."""
    x, y = torch.linspace(-1, 2, 6).view(2, 3), torch.linspace(3, 4, 5)
    slots = Slots()
    slots.bias = y
    parameter = nn.Parameter(x)
    parameter.scale = y
    model = Model()
    optimizer = torch.optim.SGD([nn.Parameter(x)], 0.1, momentum=0.9)
    optimizer.param_groups[0]["params"][0].grad = y.new_ones(2, 3)
    optimizer.step()
    momentum = optimizer.state_dict()["state"][0]["momentum_buffer"]
    weight = optimizer.param_groups[0]["params"][0].detach()
    cases = {
        "defaultdict": (collections.defaultdict(dict, {"a": {"w": x}}), {"a.w": x}),
        "OrderedDict": (collections.OrderedDict(w=x), {"w": x}),
        "deque": (collections.deque([x]), {"0": x}),
        "set": ({"s": {x}, "f": frozenset([y])}, {"s.0": x, "f.0": y}),
        "Namespace": (argparse.Namespace(mode=Mode.TRAIN, mean=x), {"mean": x}),
        "dataclass": (Config(weight=x), {"weight": x}),
        "slots": ({"a": slots}, {"a.bias": y}),
        "named tuple": ({"p": Pair(1, x)}, {"p.1": x}),
        "subclass of dict": ({"d": Words(w=x)}, {"d.w": x}),
        "partial": ({"f": functools.partial(print, x)}, {"f.1.0": x}),
        "enum and class as keys": (
            {Mode.TRAIN: x, Config: {"w": y}},
            {"0": x, f"{__name__}.Config.w": y},
        ),
        "tensor as key": ({x: y}, {"0.key": x, "0": y}),
        "tuple of a tensor as key": ({(x, 1): y}, {"0.key.0": x, "0": y}),
        "attribute of a parameter": ({"w": parameter}, {"w": x, "w.scale": y}),
        "equal names": (
            {1: x, "1": y, "a.b": x + 1, "a": {"b": y + 1}},
            {"1": x, "1 (2)": y, "a.b": x + 1, "a.b (2)": y + 1},
        ),
        "module": (model, dict(model.named_parameters())),
        "module in a dict": (
            {"model": model, "ema": None},
            {
                **{f"model.{name}": p for name, p in model.named_parameters()},
                **{f"model.{name}": b for name, b in model.named_buffers()},
                "model.anchors": model.anchors,
            },
        ),
        "optimizer": (
            {"o": optimizer},
            {"o.state.0.key": weight, "o.state.0.momentum_buffer": momentum},
        ),
        "GraphModule": (
            torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU())),
            {},
        ),
    }
    value, expected = cases[kind]
    if kind == "GraphModule":
        expected = dict(value.named_parameters())
    return value, expected


KINDS = (
    *("defaultdict", "OrderedDict", "deque", "set", "Namespace", "dataclass", "slots"),
    *("named tuple", "subclass of dict", "partial", "enum and class as keys", "tensor as key"),
    *("tuple of a tensor as key", "attribute of a parameter", "equal names", "module"),
    *("module in a dict", "optimizer", "GraphModule"),
)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_listed(backend, tmp_path, kind, form):
    value, expected = make(kind)
    path = tmp_path / "a.pkl"
    FORMATS[form](value, path)
    summary = summarize_file(path)
    names = {name: entry for entry in summary.values() for name in (entry.name, *entry.aliases)}
    assert expected and expected.keys() <= names.keys()
    if not isinstance(value, nn.Module):
        assert set(expected) == set(summary)
    for name, entry in paramstats.summarize(expected, grads=False).items():
        assert names[name].shape == entry.shape and names[name].norm == entry.norm, name
        assert names[name].min == entry.min and names[name].max == entry.max, name


@pytest.mark.parametrize("form", ["zip", "legacy", "protocol 2", "protocol 5"])
def test_notes_name_the_objects_without_tensors(tmp_path, form):
    shared = Config(weight=ones(4))
    value = {
        "w": ones(2),
        "shared": shared,
        "loss": nn.MSELoss(),
        "model": nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        "extra": io.BytesIO(bytes(100)),
        "config": Config(),
        "inside": Config(weight={"w": ones(3), "extra": io.BytesIO(bytes(100))}),
        # plain data, and objects whose tensors are listed elsewhere:
        "same": Config(weight=shared),
        "dtype": torch.float16,
        "class": Config,
        "size": torch.Size([2]),
        "args": argparse.Namespace(
            mode=Mode.TRAIN, path=pathlib.Path("a"), device=torch.device("cpu")
        ),
        "date": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
        "complex": complex(1, 2),
    }
    FORMATS[form](value, tmp_path / "a.pkl")
    summary = summarize_file(tmp_path / "a.pkl")
    assert list(summary) == [
        "w",
        "shared.weight",
        "model.0.weight",
        "model.0.bias",
        "inside.weight.w",
    ]
    assert notes(summary) == (
        "not read: 4 objects that are not tensors (torch.nn.modules.loss.MSELoss at "
        f"'loss', _io.BytesIO at 'extra', {__name__}.Config at 'config', and 1 more)",
    )


def test_notes_name_equal_names_and_hostile_ones_in_one_line(tmp_path):
    torch.save({1: ones(2), "1": ones(3), "\x1b[31m\n": nn.ReLU()}, tmp_path / "a.pt")
    assert notes(summarize_file(tmp_path / "a.pt")) == (
        "two tensors are named '1': the second is listed as '1 (2)'",
        "not read: 1 object that is not a tensor (torch.nn.modules.activation.ReLU at "
        r"'\x1b[31m\n')",
    )


def test_object_without_tensors_gives_a_note_alone(tmp_path):
    torch.save(Config(), tmp_path / "a.pt")
    summary = summarize_file(tmp_path / "a.pt")
    expected = f"not read: 1 object that is not a tensor ({__name__}.Config)"
    assert not list(summary) and notes(summary) == ("no tensors in it", expected)


def test_mapping_of_pairs_of_python_2_is_read(backend, tmp_path):
    mapping = b"}Vx\nccollections\nOrderedDict\n(]Vw\n" + DENSE + b"\x86atRs."
    name, content = pickled(b"\x80\x02" + mapping)
    (tmp_path / name).write_bytes(content)
    summary = summarize_file(tmp_path / name)
    assert [(key, entry.shape) for key, entry in summary.items()] == [("x.w", (1,))]


def test_bytes_after_a_pickle_are_named(tmp_path):
    first, second = pickle.dumps({"w": ones(2)}), pickle.dumps(ones(3))
    (tmp_path / "a.pkl").write_bytes(first + second)
    summary = summarize_file(tmp_path / "a.pkl")
    expected = f"not read: {len(second)} bytes after the first pickle of the file"
    assert list(summary) == ["w"] and notes(summary) == (expected,)


class Pairwise(torch.Tensor):
    """A subclass that holds two tensors and no elements of its own."""

    @staticmethod
    def __new__(cls, a, b):
        return torch.Tensor._make_wrapper_subclass(cls, (4, 4), dtype=torch.float32)

    def __init__(self, a, b):
        self.a, self.b = a, b

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


class Empty(Pairwise):
    def __init__(self, a, b):
        self.note = "nothing"


def test_tensor_subclasses_have_labels(backend, tmp_path):
    x, y = torch.linspace(0, 1, 4), torch.linspace(1, 2, 3)
    value = {
        "tagged": x.as_subclass(Tagged),
        "pair": Pairwise(x + 1, y),
        "empty": Empty(x, y),
    }
    torch.save(value, tmp_path / "a.pt")
    with pytest.warns(RuntimeWarning, match="'empty' could not be read"):
        summary = summarize_file(tmp_path / "a.pt")
    assert list(summary) == ["tagged", "pair.a", "pair.b", "empty"]
    assert [summary[name].norm for name in ("tagged", "pair.a", "pair.b")] == [
        paramstats.summarize({"x": tensor})["x"].norm for tensor in (x, x + 1, y)
    ]
    assert labels(summary) == {
        "tagged": "subclass Tagged",
        "pair.a": "inside subclass Pairwise [4, 4]",
        "pair.b": "inside subclass Pairwise [4, 4]",
    }
    assert "a tensor of subclass" in summary.skipped["empty"]
    assert summary["empty"].shape == (4, 4)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_storages_are_listed(backend, tmp_path, form):
    x = torch.linspace(0, 1, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # typed storages are deprecated
        value = {"typed": x.storage(), "untyped": (x + 1).untyped_storage()}
        FORMATS[form](value, tmp_path / "a.pt")
    with pytest.warns(RuntimeWarning, match="'untyped' could not be read"):
        summary = summarize_file(tmp_path / "a.pt")
    assert summary["typed"].state() == paramstats.summarize({"x": x})["x"].state()
    assert summary["untyped"].shape == (20,)
    assert summary.skipped == {"untyped": "a storage without a dtype"}
    assert labels(summary)["typed"] == "a storage"


@pytest.mark.parametrize("make_script", [torch.jit.script, None])
def test_torchscript_archive_is_read(backend, tmp_path, make_script):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        script = make_script(model) if make_script else torch.jit.trace(model, ones(2, 3))
        script.save(str(tmp_path / "a.pt"))
    summary = summarize_file(tmp_path / "a.pt")
    assert set(summary) == set(model.state_dict())
    expected = paramstats.summarize(model.state_dict(), grads=False)
    assert all(summary[name].norm == expected[name].norm for name in expected)


def test_whole_models_are_compared_with_state_dicts(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    torch.save(model, tmp_path / "a.pt")
    torch.save(model.state_dict(), tmp_path / "b.pt")
    comparison = checkpoints.compare_files(tmp_path / "a.pt", tmp_path / "b.pt")
    assert {row.name for row in comparison.rows} == set(model.state_dict())
    assert all(row.changed_count == 0 for row in comparison.rows)
