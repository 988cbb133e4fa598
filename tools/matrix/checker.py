"""Checks one call of `summarize`: every statistic is right, and the call changes nothing."""

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

import torch

import paramstats
from paramstats._core import backend as backends
from tests import oracle

Observe = Callable[..., Any]
"""A function that training calls at each step: a `Checker`, or a function that does nothing."""


WRAPPERS = (
    torch.nn.DataParallel,
    torch.nn.parallel.DistributedDataParallel,
    torch.optim.swa_utils.AveragedModel,
)
"""Modules whose prefix `module.` is not part of the names in a summary."""


class Entry(NamedTuple):
    """A tensor that a summary must list, with all its names."""

    names: list[str]
    tensor: torch.Tensor
    kind: str


class Checker:
    """Calls `summarize` with each backend and compares the results with the oracle.

    A backend that failed is left out of later calls; `failures` has the reason.
    """

    def __init__(self, chosen: Sequence[backends.Implementation]) -> None:
        self.backends = list(chosen)
        self.compared = {backend.name: 0 for backend in chosen}
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
        """Returns the summary of the last backend, of all parameters, buffers and gradients.

        Args:
            truth: plain tensors with the elements that a subclass represents, by name.
            skipped: patterns of the reasons of tensors that must be skipped, by name.
        """
        summaries: list[paramstats.Summary] = []

        def check() -> int:
            entries = listing(source)
            with _nothing_changes(entries), _warnings_of(skipped or {}):
                summary = paramstats.summarize(source, buffers=True, grad_scale=grad_scale)
            summaries.append(summary)
            comparison = _Comparison(summary, entries, truth or {}, skipped or {}, grad_scale)
            self.messages |= {f"skipped: {reason}": None for reason in summary.skipped.values()}
            _use(summary)
            return comparison.compared

        self.each(check)
        return summaries[-1]

    def refused(self, call: Callable[[], Any], error: type[Exception], *patterns: str) -> None:
        """Checks that `call` raises `error` with a message in which all patterns are found."""

        def refuse() -> int:
            try:
                call()
            except error as raised:
                message = str(raised)
            else:
                raise AssertionError(f"expected {error.__name__}, and nothing was raised")
            for pattern in patterns:
                assert re.search(pattern, message), f"no '{pattern}' in: {message}"
            self.messages[f"refused: {error.__name__}: {message}"] = None
            return 0

        self.each(refuse)

    def each(self, check: Callable[[], int]) -> None:
        """Calls `check` with each backend; it returns the number of tensors it compared."""
        before = backends._active
        for backend in self.backends:
            if backend.name in self.failures:
                continue
            backends._active = backend
            try:
                self.compared[backend.name] += check()
            except Exception as error:
                self.failures[backend.name] = describe(error)
            finally:
                backends._active = before


def describe(error: Exception) -> str:
    """The error with the place where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    file = place.filename.rpartition("/")[2]
    return f"{type(error).__name__}: {error} ({file}:{place.lineno})"


def unobserved(*_: Any, **__: Any) -> None:
    """Replaces a `Checker` where nothing is to be checked."""


def same_training(check: Checker, train: Callable[[Observe], torch.nn.Module]) -> torch.nn.Module:
    """Asserts that training ends with the same bits with and without the calls; returns the model.

    `train` gets the function that it calls with the model at each step.
    """
    torch.manual_seed(0)
    expected = train(unobserved).state_dict()
    torch.manual_seed(0)
    trained = train(check)
    got = trained.state_dict()
    assert list(got) == list(expected)
    for name, tensor in got.items():
        if isinstance(tensor, torch.Tensor) and not torch.equal(tensor, expected[name]):
            raise AssertionError(f"the training is not the same: '{name}' differs")
    return trained


def listing(source: Any) -> list[Entry]:
    """The tensors that torch lists, shared ones once."""
    key: Callable[[torch.Tensor], Any] = _memory
    if isinstance(source, torch.nn.Module):
        named = [(*item, "param") for item in source.named_parameters(remove_duplicate=False)]
        named += [(*item, "buffer") for item in source.named_buffers(remove_duplicate=False)]
        if isinstance(source, WRAPPERS):
            named = [(name.removeprefix("module."), *other) for name, *other in named]
        named = [(name.replace("_orig_mod.", ""), *other) for name, *other in named]
        key = id
    else:
        pairs = source.items() if isinstance(source, Mapping) else source
        named = [(name, tensor, "param") for name, tensor in pairs]
    entries: dict[Any, Entry] = {}
    for name, tensor, kind in named:
        entries.setdefault(key(tensor), Entry([], tensor, kind)).names.append(name)
    return list(entries.values())


def _memory(tensor: torch.Tensor) -> Any:
    """Equal for tensors of a `state_dict` that share one parameter's memory."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    plain = plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    if not plain or tensor.layout is not torch.strided or not tensor.numel() or tensor.is_meta:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, id(gradient(tensor))


def gradient(tensor: torch.Tensor) -> torch.Tensor | None:
    """`tensor.grad`, without torch's warning about tensors that are not leaves."""
    return tensor.grad if tensor.is_leaf or tensor.retains_grad else None


@contextlib.contextmanager
def _nothing_changes(entries: Sequence[Entry]) -> Iterator[None]:
    """Asserts that versions, gradients, modes and the random state stay the same."""

    def state() -> list[Any]:
        out: list[Any] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
        out += [torch.get_num_threads(), torch.get_rng_state().tolist()]
        for entry in entries:
            for tensor in (entry.tensor, gradient(entry.tensor)):
                if tensor is not None:
                    version = None if tensor.is_inference() else tensor._version
                    out += [version, tensor.requires_grad, tensor.is_leaf]
                out.append(id(tensor))
        return out

    before = state()
    yield
    assert state() == before, "the call changed something"


@contextlib.contextmanager
def _warnings_of(skipped: Mapping[str, str]) -> Iterator[None]:
    """Asserts that skipped tensors are the only ones with a warning."""
    paramstats._core.reading._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(w.message) for w in caught]
    other = [t for t in texts if "could not be read" not in t]
    assert not other, f"warned: {other[0]}"
    assert bool(texts) == bool(skipped), f"{len(texts)} warnings for {len(skipped)} skipped tensors"


def _use(summary: paramstats.Summary) -> None:
    """Everything that is made from a summary must work."""
    assert str(summary) and repr(summary) and summary.table(sort_by="norm", limit=5)
    assert all(isinstance(value, float) for value in summary.scalars().values())
    assert str(summary.findings())
    json.loads(json.dumps(summary.to_dict()))
    assert pickle.loads(pickle.dumps(summary)) == summary


class _Comparison:
    """Compares a summary with the tensors; raises AssertionError with the tensor's name."""

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
        self._all: dict[str, list[torch.Tensor]] = {"param": [], "grad": [], "buffer": []}
        expected = [entry.names[0] for entry in entries]
        assert list(summary) == expected, f"lists {list(summary)}, expected {expected}"
        assert set(summary.skipped) == set(skipped), f"skipped {dict(summary.skipped)}"
        for name, pattern in skipped.items():
            assert re.search(pattern, summary.skipped[name]), summary.skipped[name]
        for entry in entries:
            self._entry(summary[entry.names[0]], entry)
        self._total(summary.total, "param")
        assert (summary.total.grad is None) == (not self._all["grad"])
        if summary.total.grad is not None:
            self._total(summary.total.grad, "grad")

    def _entry(self, stats: paramstats.ParamStats, entry: Entry) -> None:
        (name, *aliases), tensor, kind = entry
        expected = (name, tuple(aliases), tuple(tensor.shape), tensor.dtype, tensor.device)
        got = (stats.name, stats.aliases, stats.shape, stats.dtype, stats.device)
        assert got == expected, f"{got}, expected {expected}"
        assert (stats.requires_grad, stats.kind) == (tensor.requires_grad, kind), name
        self._statistics(name, stats, tensor, kind)
        grad = gradient(tensor)
        assert (stats.grad is None) == (grad is None), f"the gradient of '{name}'"
        if grad is not None:
            self._statistics(f"{name} (gradient)", stats.grad, grad, "grad")

    def _statistics(
        self, name: str, stats: paramstats.TensorStats, tensor: torch.Tensor, kind: str
    ) -> None:
        if name in self._skipped:
            assert math.isnan(stats.mean) and math.isnan(stats.norm), f"statistics of '{name}'"
            return
        plain = _plain(self._truth.get(name, tensor))
        if kind == "grad" and self._scale != 1:
            plain = plain.to(torch.float64) / self._scale
        try:
            oracle.check(stats, plain)
        except AssertionError as error:
            raise AssertionError(f"'{name}': {error}".splitlines()[0] + f", got {stats}") from error
        self.compared += 1
        self._all[kind].append(plain)

    def _total(self, stats: paramstats.TensorStats, kind: str) -> None:
        tensors = [t.flatten() for t in self._all[kind]]
        if any(t.is_complex() for t in tensors):
            assert stats.count == sum(t.numel() for t in tensors)
        elif tensors:
            oracle.check(stats, torch.cat([t.to(torch.float64) for t in tensors]))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A plain strided tensor with the elements that this one represents."""
    plain = tensor.detach()
    subclass = type(plain) not in (torch.Tensor, torch.nn.Parameter)
    if plain.is_quantized or (subclass and hasattr(plain, "dequantize")):
        plain = plain.dequantize()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    return plain.resolve_conj().resolve_neg()
