"""Every public function of paramstats that makes or reads tensors, and what it returns.

A call is a function of a folder. It prepares tensors and files, and returns the function that the
test calls under a mode. Modules and caches are new in each test, so that nothing was computed
outside of the mode.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import paramstats
from paramstats._cli import main
from paramstats.checkpoints import compare_files, summarize_file
from paramstats.integrations._after_backward import AfterBackward
from tests.checkpoints.files import FORMATS, save

Prepare = Callable[[Path], Callable[[], Any]]
_numbers = itertools.count()


class ReadableByFunction(torch.Tensor):
    """A subclass whose elements only its `__torch_function__` gives."""

    @staticmethod
    def __new__(cls, inner):
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.dequantize:
            return args[0].inner
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"no {func}")


class FromFactors(ReadableByFunction):
    """A subclass whose elements are a product, which autocast would round."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.dequantize:
            return args[0].inner @ args[0].inner
        return super().__torch_function__(func, types, args, kwargs)


def make_model() -> nn.Module:
    """Return a model with gradients and a buffer, in three dtypes, with subnormal elements."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3).bfloat16())
    model.register_parameter("wide", nn.Parameter(torch.randn(7, dtype=torch.float64)))
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn_like(p) * 10.0**i
    with torch.no_grad():
        model[0].weight[0] = 1e-40
        model[2].weight.mul_(1e-39)
    return model


def plain_tensors() -> dict[str, torch.Tensor]:
    """Return tensors that a file can hold, with subnormal elements."""
    torch.manual_seed(1)
    tensors = {f"{dtype}": torch.randn(40).to(dtype) for dtype in _FLOATS}
    tensors |= {f"tiny {dtype}": (torch.randn(40) * 1e-40).to(dtype) for dtype in _FLOATS[:3]}
    return {
        **tensors,
        "tiny complex": torch.randn(40, dtype=torch.complex64) * 1e-40,
        "complex": torch.randn(9, dtype=torch.complex64),
        "large": torch.randn(3, 10_000).half(),
        "odd": torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30]),
        "integers": torch.arange(-5, 60),
        "bool": torch.arange(9) % 2 == 0,
        "int8": torch.arange(-7, 9, dtype=torch.int8),
    }


_FLOATS = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float8_e5m2)


def all_tensors() -> dict[str, torch.Tensor]:
    """Return tensors of every kind that the native backend defers to torch operators."""
    torch.manual_seed(2)
    z = torch.randn(20, dtype=torch.cfloat)
    square = torch.rand(5, 5)
    leaf = nn.Parameter(torch.ones(9))
    leaf.grad = torch.tensor([1e-40, 0.0, 1.0] * 3).to_sparse()
    return {
        **plain_tensors(),
        "gap": torch.randn(6, 10)[:, ::3],
        "conj": z.conj(),
        "neg": z.conj().imag,
        "coo": square.round().mul(1e-40).to_sparse(),
        "not coalesced": torch.sparse_coo_tensor([[1, 1, 2]], torch.ones(3), (4,)),
        "csr": square.to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(square, 0.1, 3, torch.qint8),
        "own": ReadableByFunction(torch.full((3,), 1.1)),
        "factors": FromFactors(torch.rand(4, 4)),
        "meta": torch.empty(3, device="meta"),
        "with gradient": leaf,
        "not a leaf": leaf * 2,
        "view": leaf.detach()[2:5],
        "tied": leaf,
    }


def summarize_model(folder: Path) -> Any:
    model = make_model()
    return lambda: paramstats.summarize(model, buffers=True)


def summarize_tensors(folder: Path) -> Any:
    tensors = all_tensors()
    return lambda: paramstats.summarize(tensors)


def summarize_selected(folder: Path) -> Any:
    pairs = [*make_model().named_parameters()]
    return lambda: paramstats.summarize(pairs, include="weight", params=False)


def summarize_with_scaler(folder: Path) -> Any:
    model = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))
    scale = torch.tensor(2.0)
    return lambda: [
        paramstats.summarize(model, grad_scale=scaler),
        paramstats.summarize(model, grad_scale=scale),
    ]


def named_shards() -> dict[str, Any]:
    """Return shards under names that no earlier test has used, so that the ranks agree anew."""
    shards = {
        f"{name}": paramstats.LocalShard(x, 0, x.numel(), x.shape, grad=x.clone())
        for name, x in plain_tensors().items()
    }
    return {f"key {next(_numbers)}": torch.ones(2), **shards}


def without_key(summary: paramstats.Summary) -> paramstats.Summary:
    return summary.filter(exclude="^key")


def summarize_shards(folder: Path) -> Any:
    shards = named_shards()
    return lambda: without_key(paramstats.summarize(shards))


def summarize_shards_later(folder: Path) -> Any:
    shards = named_shards()
    return lambda: without_key(paramstats.summarize(shards, async_op=True).wait())


def summarize_own_shards(folder: Path) -> Any:
    shards = named_shards()
    return lambda: without_key(paramstats.summarize(shards, local=True))


def summarize_dtensors(folder: Path) -> Any:
    mesh = init_device_mesh("cpu", (1,))
    tensors: dict[str, torch.Tensor] = {f"key {next(_numbers)}": torch.ones(2)}
    for placement in (Shard(0), Replicate(), Partial(), Partial("avg"), Partial("max")):
        local = nn.Parameter(torch.tensor([1.0, -2.5, 1e-40, 3.25]))
        tensors[str(placement)] = DTensor.from_local(local, mesh, [placement])
    return lambda: without_key(paramstats.summarize(tensors))


def local_shard(folder: Path) -> Any:
    x = nn.Parameter(torch.arange(6.0).view(2, 3))

    def call() -> Any:
        shard = paramstats.LocalShard(x, 0, 6)
        return shard.numel, shard.shape, shard.requires_grad, shard.dtype, shard.device

    return call


def read_summary(folder: Path) -> Any:
    summary, same = (paramstats.summarize(make_model(), buffers=True) for _ in range(2))

    def call() -> Any:
        entry = summary["0.weight"]
        return {
            "statistics": [repr(entry), repr(entry.grad), repr(entry.finite), entry.to_dict()],
            "total": [repr(summary.total), summary.total.to_dict()],
            "scalars": [summary.scalars(), summary.scalars(depth=1, stats="norm")],
            "dict": summary.to_dict(),
            "text": [str(summary), repr(summary), summary.table(sort_by="grad.norm", limit=3)],
            "html": summary._repr_html_(),
            "findings": [repr(summary.findings()), summary.findings()._repr_html_()],
            "filter": summary.filter("weight"),
            "names": [list(summary), len(summary), "wide" in summary, summary.get("none")],
            "state": [summary.ready(), dict(summary.skipped), dict(summary.diverged)],
            "equal": summary == same,
            "pandas": summary.to_pandas().to_csv(),
        }

    return call


def watch(folder: Path) -> Any:
    model, logged, found = make_model(), [], []
    history = paramstats.History()

    def call() -> Any:
        arguments = {"every": 1, "history": history, "group": None, "on_finding": found.append}
        with paramstats.watch(
            model, lambda scalars, step: logged.append((step, scalars)), **arguments
        ) as watcher:
            watcher.step()
            watcher.step(grad_scale=2.0)
        return logged, watcher.summary, list(history), found

    return call


def after_backward(folder: Path) -> Any:
    """What the callbacks of trainers do before and after a backward pass."""
    model, summaries = make_model(), []

    def call() -> Any:
        hooks = AfterBackward(model.parameters(), lambda: None)
        hooks.remove()
        watcher = paramstats.watch(model, lambda scalars, step: summaries.append(scalars), every=1)
        assert watcher.is_due(3)
        watcher.give(3, watcher.take(2.0))
        watcher.flush()
        watcher.close()
        return summaries

    return call


def use_history(folder: Path) -> Any:
    model = make_model()
    summaries = [
        paramstats.summarize(model, distribution=True, rows=True),
        *[paramstats.summarize(model, grad_scale=scale) for scale in (3.0,) * 8 + (1e-3, 3.0)],
    ]

    def call() -> Any:
        path, saved = folder / "run.jsonl", folder / "saved.jsonl"
        path.unlink(missing_ok=True)
        with paramstats.History(path) as history:
            for step, summary in enumerate(summaries):
                history.append(step, summary)
        history.save(saved)
        loaded = paramstats.History.load(saved)
        series = loaded["0.weight"]
        return {
            "entries": [list(history), list(loaded)],
            "file": path.read_text(),
            "arrays": [series.norm.tolist(), series.grad.mean.tolist(), series.dtype],
            "total": loaded.total.norm.tolist(),
            "pandas": loaded.to_pandas("norm").to_csv(),
            "findings": list(loaded.findings()),
        }

    return call


def draw_history(folder: Path) -> Any:
    history = paramstats.History()
    for step in range(4):
        source = {"w": torch.ones(3) * step}
        history.append(step, paramstats.summarize(source, distribution=True))

    def call() -> Any:
        lines = history.plot(stat="norm", kind="param").axes[0].lines[0].get_ydata()
        cells = history.heatmap(stat="norm", kind="param").axes[0].collections[0].get_array()
        shares = history.distribution("w").axes[0].collections[0].get_array()
        return list(lines), cells.tolist(), shares.tolist()

    return call


def checkpoint(form: str) -> tuple[Prepare, Prepare]:
    """Return the calls that read a checkpoint of a format, and that compare two."""

    def paths(folder: Path) -> list[Path]:
        found = []
        for factor in (1, 3):
            here = folder / f"{form} {factor}"
            if not here.exists():
                here.mkdir()
                tensors = plain_tensors()
                tensors["large"] *= factor
                tensors["tiny torch.float32"] *= factor
                tensors["tiny complex"] *= factor
                save(tensors, form, here)
            found.append(save_path(here, form))
        return found

    def summarize(folder: Path) -> Any:
        path = paths(folder)[0]
        return lambda: summarize_file(path)

    def compare(folder: Path) -> Any:
        a, b = paths(folder)
        return lambda: compare_files(a, b)

    return summarize, compare


def save_path(folder: Path, form: str) -> Path:
    """Return the path of the checkpoint that `save` wrote."""
    names = {
        "safetensors": "model.safetensors",
        "pt": "pt.pt",
        "legacy": "legacy.pt",
        "dcp": "dcp",
        "sharded safetensors": "model.safetensors.index.json",
        "sharded bin": "pytorch_model.bin.index.json",
    }
    return folder / names[form]


def command_line(folder: Path) -> Any:
    a, b = folder / "a.pt", folder / "b.pt"
    torch.save({"w": torch.tensor([3.0, 1e-40])}, a)
    torch.save({"w": torch.tensor([3.0, 5.0])}, b)

    def call() -> Any:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            codes = [
                main(["show", str(a)]),
                main(["show", str(a), "--json"]),
                main(["show", str(a), str(b), "--csv"]),
                main(["info"]),
            ]
        text = out.getvalue().replace(str(folder), "")
        return codes, [line for line in text.splitlines() if "threads" not in line]

    return call


CALLS: dict[str, Prepare] = {
    "summarize model": summarize_model,
    "summarize tensors": summarize_tensors,
    "summarize selected": summarize_selected,
    "summarize with scaler": summarize_with_scaler,
    "summarize shards": summarize_shards,
    "summarize shards later": summarize_shards_later,
    "summarize own shards": summarize_own_shards,
    "summarize DTensors": summarize_dtensors,
    "LocalShard": local_shard,
    "Summary": read_summary,
    "watch": watch,
    "callbacks": after_backward,
    "History": use_history,
    "plot": draw_history,
    "command line": command_line,
}
for _form in FORMATS:
    CALLS[f"summarize_file {_form}"], CALLS[f"compare_files {_form}"] = checkpoint(_form)

READING = ("summarize model", "summarize tensors", "summarize shards", "summarize_file pt")
"""Calls that together use every code path that reads tensors."""


def raising(error: BaseException) -> Callable[..., None]:
    def function(*args: Any) -> None:
        raise error

    return function


class Interrupted(ReadableByFunction):
    """A tensor during whose reading Ctrl-C is pressed."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.dequantize:
            raise KeyboardInterrupt("now")
        return super().__torch_function__(func, types, args, kwargs)


def no_tensor(folder: Path) -> Any:
    return lambda: paramstats.summarize({"w": 3})


def interrupted(folder: Path) -> Any:
    tensors = {"w": Interrupted(torch.ones(3))}
    return lambda: paramstats.summarize(tensors)


def interrupted_shard(folder: Path) -> Any:
    shards = {"w": paramstats.LocalShard(Interrupted(torch.ones(3)), 0, 3)}
    return lambda: paramstats.summarize(shards)


def incomplete_shard(folder: Path) -> Any:
    shards = {f"key {next(_numbers)}": paramstats.LocalShard(torch.ones(3), 0, 9)}
    return lambda: paramstats.summarize(shards)


def too_small_numel(folder: Path) -> Any:
    x = torch.ones(3)
    return lambda: paramstats.LocalShard(x, 0, 2)


def scale_is_nan(folder: Path) -> Any:
    scale = torch.tensor(float("nan"))
    return lambda: paramstats.summarize({}, grad_scale=scale)


def interrupted_file(function: Callable[..., Any], files: int) -> Prepare:
    def prepare(folder: Path) -> Any:
        path = folder / "interrupted.pt"
        torch.save({"w": torch.ones(3)}, path)
        return lambda: function(*[path] * files, progress=raising(KeyboardInterrupt("now")))

    return prepare


def no_checkpoint(folder: Path) -> Any:
    path = folder / "empty.pt"
    path.touch()
    return lambda: summarize_file(path)


FAILING: dict[str, tuple[Prepare, type[BaseException], str]] = {
    "no tensor": (no_tensor, TypeError, "got int for 'w'"),
    "interrupted": (interrupted, KeyboardInterrupt, "now"),
    "interrupted shard": (interrupted_shard, KeyboardInterrupt, "now"),
    "incomplete shard": (incomplete_shard, RuntimeError, "got 3"),
    "numel too small": (too_small_numel, ValueError, "at least 3 for numel"),
    "scale is NaN": (scale_is_nan, ValueError, "for grad_scale"),
    "summarize_file": (interrupted_file(summarize_file, 1), KeyboardInterrupt, "now"),
    "compare_files": (interrupted_file(compare_files, 2), KeyboardInterrupt, "now"),
    "no checkpoint": (no_checkpoint, ValueError, "empty"),
}
