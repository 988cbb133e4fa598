"""One look at a model: a summary by each backend, all of it compared, and nothing left changed."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import paramstats
from paramstats._core import backend as backends
from tests import oracle

Observe = Callable[..., Any]
"""What a training calls at each step: a `Look`, or a function that does nothing."""


class Entry(NamedTuple):
    """What a summary must list: a tensor with all its names."""

    names: list[str]
    tensor: torch.Tensor
    kind: str


class Look:
    """Calls `summarize` with each backend and compares all that comes out with the oracle.

    An backend that failed is left out from there on; `failures` says why.
    """

    def __init__(self, chosen: Sequence[backends.Implementation]) -> None:
        self.backends = list(chosen)
        self.compared = dict.fromkeys((e.name for e in chosen), 0)
        self.failures: dict[str, str] = {}
        self.messages: dict[str, None] = {}

    def __call__(
        self,
        source: Any,
        *,
        truth: Mapping[str, torch.Tensor] | None = None,
        skipped: Mapping[str, str] | None = None,
        grad_scale: float = 1.0,
    ) -> paramstats.Summary:
        """The summary of the last backend, of all parameters, buffers and gradients.

        Args:
            truth: by name, plain tensors with the elements that a subclass stands for.
            skipped: what must be skipped, by name, with a pattern of its reason.
        """
        looked: list[paramstats.Summary] = []

        def look() -> int:
            entries = listing(source)
            with _nothing_changes(entries), _warnings_of(skipped or {}):
                summary = paramstats.summarize(source, buffers=True, grad_scale=grad_scale)
            looked.append(summary)
            comparison = _Comparison(summary, entries, truth or {}, skipped or {}, grad_scale)
            self.messages |= {f"skipped: {reason}": None for reason in summary.skipped.values()}
            _use(summary)
            return comparison.compared

        self.each(look)
        return looked[-1]

    def refused(
        self, call: Callable[[], Any], error: type[Exception], *patterns: str, what: str = ""
    ) -> None:
        """`call` must raise `error` with a message in which all patterns are found.

        Args:
            what: which use it is that is refused, where the row has others.
        """
        kind = f"refused {what}".strip()

        def refuse() -> int:
            try:
                call()
            except error as raised:
                message = str(raised)
            else:
                raise AssertionError(f"expected {error.__name__}, and nothing was raised")
            for pattern in patterns:
                assert re.search(pattern, message), f"no '{pattern}' in: {message}"
            self.messages[f"{kind}: {error.__name__}: {message}"] = None
            return 0

        self.each(refuse)

    def each(self, check: Callable[[], int]) -> None:
        """`check` with each backend in force; it returns how many tensors it compared."""
        before = backends._active
        for backend in self.backends:
            if backend.name in self.failures:
                continue
            backends._active = backend
            try:
                self.compared[backend.name] += check()
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{place.filename.rpartition('/')[2]}:{place.lineno}"
                self.failures[backend.name] = f"{type(error).__name__}: {error} ({where})"
            finally:
                backends._active = before


def unobserved(*_: Any, **__: Any) -> None:
    """In the place of a `Look`."""


def same_training(look: Look, train: Callable[[Observe], torch.nn.Module]) -> torch.nn.Module:
    """Trains with `look` and without: both must end with the same bits. Returns what was looked at.

    `train` gets what it is to call with the model, and returns the model.
    """
    torch.manual_seed(0)
    expected = train(unobserved).state_dict()
    torch.manual_seed(0)
    trained = train(look)
    got = trained.state_dict()
    assert list(got) == list(expected)
    for name, tensor in got.items():
        if isinstance(tensor, torch.Tensor) and not torch.equal(tensor, expected[name]):
            raise AssertionError(f"the training went another way: '{name}' differs")
    return trained


def listing(source: Any) -> list[Entry]:
    """What torch itself says is there, a tied tensor once."""
    if isinstance(source, torch.nn.Module):
        named = [(*item, "param") for item in source.named_parameters(remove_duplicate=False)]
        named += [(*item, "buffer") for item in source.named_buffers(remove_duplicate=False)]
        key: Callable[[torch.Tensor], Any] = id
    else:
        pairs = source.items() if isinstance(source, Mapping) else source
        named = [(name, tensor, "param") for name, tensor in pairs]
        key = _memory
    entries: dict[Any, Entry] = {}
    for name, tensor, kind in named:
        entries.setdefault(key(tensor), Entry([], tensor, kind)).names.append(name)
    return list(entries.values())


def _memory(tensor: torch.Tensor) -> Any:
    """As a `state_dict` holds a tied parameter: two tensors on the same memory."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    plain = plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    if not plain or tensor.layout is not torch.strided or not tensor.numel() or tensor.is_meta:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, id(gradient(tensor))


def gradient(tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor.grad if tensor.is_leaf or tensor.retains_grad else None


# ---- nothing changes -------------------------------------------------------------------------


def _state(entries: Sequence[Entry]) -> list[Any]:
    out: list[Any] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    out += [torch.get_num_threads(), torch.get_rng_state().tolist()]
    for entry in entries:
        for tensor in (entry.tensor, gradient(entry.tensor)):
            if tensor is None:
                out.append(None)
                continue
            version = None if tensor.is_inference() else tensor._version
            out += [id(tensor), version, tensor.requires_grad, tensor.is_leaf]
    return out


@contextlib.contextmanager
def _nothing_changes(entries: Sequence[Entry]) -> Iterator[None]:
    """No version, no gradient's identity, no mode and no random state may be another after."""
    before = _state(entries)
    yield
    assert _state(entries) == before, "the call changed something"


@contextlib.contextmanager
def _warnings_of(skipped: Mapping[str, str]) -> Iterator[None]:
    """No warning but the one for each kind of what is skipped."""
    paramstats._core.reading._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(w.message) for w in caught]
    other = [t for t in texts if "could not be read, its statistics are NaN" not in t]
    assert not other, f"warned: {other[0]}"
    assert bool(texts) == bool(skipped), f"{len(texts)} warnings for {len(skipped)} skipped tensors"


def _use(summary: paramstats.Summary) -> None:
    """All that people do with one must work."""
    assert str(summary) and repr(summary) and summary.table(sort_by="norm", limit=5)
    assert all(isinstance(value, float) for value in summary.scalars().values())
    assert str(summary.findings())
    json.loads(json.dumps(summary.to_dict()))
    assert pickle.loads(pickle.dumps(summary)) == summary


# ---- statistic for statistic -----------------------------------------------------------------------


class _Comparison:
    """Of a summary with what is there; raises AssertionError, which names the tensor."""

    def __init__(
        self,
        summary: paramstats.Summary,
        entries: Sequence[Entry],
        truth: Mapping[str, torch.Tensor],
        skipped: Mapping[str, str],
        grad_scale: float,
    ) -> None:
        self.compared = 0
        self._truth = truth
        self._skipped = skipped
        self._scale = grad_scale
        self._all: dict[str, list[torch.Tensor]] = {"param": [], "grad": []}
        expected = [entry.names[0] for entry in entries]
        assert list(summary) == expected, f"lists {list(summary)}, expected {expected}"
        assert set(summary.skipped) == set(skipped), f"skipped {dict(summary.skipped)}"
        for name, pattern in skipped.items():
            assert re.search(pattern, summary.skipped[name]), summary.skipped[name]
        for entry in entries:
            self._entry(summary[entry.names[0]], entry)
        self._total(summary.total, "param")
        if self._all["grad"]:
            assert summary.total.grad is not None
            self._total(summary.total.grad, "grad")
        else:
            assert summary.total.grad is None

    def _entry(self, stats: paramstats.ParamStats, entry: Entry) -> None:
        name, tensor = entry.names[0], entry.tensor
        expected = (name, tuple(entry.names[1:]), tuple(tensor.shape), tensor.dtype, tensor.device)
        got = (stats.name, stats.aliases, stats.shape, stats.dtype, stats.device)
        assert got == expected, f"{got}, expected {expected}"
        assert stats.requires_grad == tensor.requires_grad, f"requires_grad of '{name}'"
        assert stats.kind == entry.kind
        self._statistics(name, stats, tensor, entry.kind)
        grad = gradient(tensor)
        if grad is None:
            assert stats.grad is None, f"a gradient of '{name}', which has none"
        else:
            assert stats.grad is not None, f"no gradient of '{name}'"
            self._statistics(f"{name} (gradient)", stats.grad, grad, "grad")

    def _statistics(
        self, name: str, stats: paramstats.TensorStats, tensor: torch.Tensor, kind: str
    ) -> None:
        if name in self._skipped:
            assert math.isnan(stats.mean) and math.isnan(stats.norm), f"statistics of '{name}'"
            return
        plain = elements(self._truth.get(name, tensor))
        if kind == "grad" and self._scale != 1:
            wide = torch.complex128 if plain.is_complex() else torch.float64
            plain = plain.to(wide) / self._scale
        try:
            check(stats, plain)
        except AssertionError as error:
            raise AssertionError(f"'{name}': {error}".splitlines()[0] + f", got {stats}") from error
        self.compared += 1
        if kind in self._all:
            self._all[kind].append(plain)

    def _total(self, stats: paramstats.TensorStats, kind: str) -> None:
        tensors = [t.flatten() for t in self._all[kind]]
        if not tensors:
            return
        if not any(t.is_complex() for t in tensors):
            oracle.check(stats, torch.cat([t.to(torch.float64) for t in tensors]))
            return
        together = torch.cat([t.to(torch.complex128) for t in tensors])
        norm = together.norm().item()
        assert abs(stats.norm - norm) <= oracle.NORM_TOLERANCE * norm
        assert stats.count == together.numel()
        assert stats.zero_count == together.numel() - int(together.count_nonzero())


def elements(tensor: torch.Tensor) -> torch.Tensor:
    """A plain tensor with the elements that this one stands for."""
    plain = tensor.detach()
    if hasattr(plain, "dequantize") and type(plain) not in (torch.Tensor, torch.nn.Parameter):
        plain = plain.dequantize()
    if plain.is_quantized:
        plain = plain.dequantize()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    return plain.resolve_conj().resolve_neg()


def check(stats: paramstats.TensorStats, tensor: torch.Tensor) -> None:
    """Every statistic; of complex tensors as the README has them."""
    if not tensor.is_complex():
        oracle.check(stats, tensor)
        return
    z = tensor.to(torch.complex128).numpy().astype(np.clongdouble).ravel()
    assert np.isfinite(z).all(), "an oracle for finite complex numbers alone"
    modulus, mean = np.abs(z), z.mean()
    rms = float(np.sqrt(np.square(modulus).mean()))
    norm = float(np.sqrt(np.square(modulus).sum()))
    std = float(np.sqrt(np.square(np.abs(z - mean)).sum() / max(z.size - 1, 1)))
    assert (stats.count, stats.zero_count) == (z.size, int((z == 0).sum()))
    assert stats.nonfinite_count == 0
    assert abs(stats.mean - float(np.abs(mean))) <= oracle.NORM_TOLERANCE * rms
    assert abs(stats.norm - norm) <= oracle.NORM_TOLERANCE * norm
    assert abs(stats.rms - rms) <= oracle.NORM_TOLERANCE * rms
    if z.size > 1:
        assert abs(stats.std - std) <= oracle.STD_TOLERANCE * std
    for got, expected in ((stats.min, modulus.min()), (stats.max, modulus.max())):
        assert abs(got - float(expected)) <= oracle.NORM_TOLERANCE * float(expected)
