"""Names and reasons from outside reach no text output, error or warning unescaped."""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import re
from collections.abc import Callable

import pytest
import torch

from paramstats import History, Summary, summarize
from paramstats._core.backend import choose
from paramstats._summary import record_of
from tests.test_structure import MODULES

HOSTILE = {
    "escape": "a\x1b[31mred\x1b[0m",
    "c0": "".join(map(chr, range(32))),
    "del-c1": "".join(map(chr, range(0x7F, 0xA0))),
    "bidi": "".join(map(chr, (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))),
    "separators": "a\u2028b\u2029c",
    "surrogate": "\ud800lone",
    "script": "<script>\x1b</script>",
    "quotes": "'\"\x1b",
}


_numbers = itertools.count()


class Unreadable(torch.Tensor):
    """A tensor whose elements cannot be read, for a reason that is hostile itself."""

    reason = ""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (2,))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError

    def to_local(self):
        raise RuntimeError(self.reason)


def summary_of(name: str) -> Summary:
    """A summary with findings, a block, an alias and differing replicas, all of this name."""
    nan = torch.nn.Parameter(torch.full((2, 2), math.nan))
    nan.grad = torch.full((2, 2), math.nan)
    tied = torch.zeros(8, 8)
    tensors = {f"{name}.{i}": torch.eye(3) for i in range(8)}
    summary = summarize({name: nan, **tensors, f"{name}.tied": tied, f"{name}.alias": tied})
    diverged = {f"{name} (gradient)": f"rank {name} differs"}
    return Summary(record_of(summary)._replace(diverged=diverged))


def history_of(name: str) -> History:
    history = History()
    history.append(0, summarize({name: torch.ones(1)}))
    return history


def colored(name: str) -> str:
    pytest.importorskip("rich")
    return re.sub(r"\x1b\[[0-9;]*m", "", summary_of(name).table(color=True))


OUTPUTS: dict[str, Callable[[str], object]] = {
    "table": lambda name: summary_of(name).table(),
    "narrow-table": lambda name: summary_of(name).table(width=20),
    "sorted-table": lambda name: summary_of(name).table(sort_by="name", limit=3),
    "table-of-gradients": lambda name: summary_of(name).table(kind="grad"),
    "colored-table": colored,
    "str": lambda name: str(summary_of(name)),
    "repr": lambda name: repr(summary_of(name)),
    "html": lambda name: summary_of(name)._repr_html_(),
    "entries": lambda name: "\n".join(map(repr, summary_of(name).values())),
    "total": lambda name: repr(summary_of(name).total),
    "findings": lambda name: str(summary_of(name).findings()),
    "findings-html": lambda name: summary_of(name).findings()._repr_html_(),
    "finding": lambda name: "\n".join(map(str, summary_of(name).findings())),
    "finding-message": lambda name: "\n".join(f.message for f in summary_of(name).findings()),
    "series": lambda name: repr(history_of(name)[name]),
    "reason": lambda name: "\n".join(skipped(name).skipped.values()),
}


def skipped(name: str) -> Summary:
    """A summary of a tensor that could not be read; the warning has the name and the reason."""
    Unreadable.reason = f"{next(_numbers)} {name}"  # another each time: a reason is told once
    return summarize({name: Unreadable()})


ERRORS: dict[str, Callable[[str], object]] = {
    "no-such-name": lambda name: summary_of("weight")[name],
    "similar-name": lambda name: summary_of(name)[f"{name}.00"],
    "module": lambda name: summarize({f"{name}.weight": torch.ones(1)})[name],
    "attribute-of-summary": lambda name: getattr(summary_of("w"), name),
    "attribute-of-entry": lambda name: getattr(summary_of("w")["w"], name),
    "attribute-of-series": lambda name: getattr(history_of("w")["w"], name),
    "not-in-history": lambda name: history_of("w")[name],
    "twice": lambda name: summarize([(name, torch.ones(1)), (name, torch.ones(1))]),
    "no-tensor": lambda name: summarize({name: 3}),
    "mapping": lambda name: summarize({name: {}}),
    "source": lambda name: summarize(name),
    "pattern": lambda name: summarize({}, include=f"[z-{name[-1]}"),
    "key": lambda name: summary_of("w").scalars(key=f"{{{name}}}"),
    "key-format": lambda name: summary_of("w").scalars(key=f"{{name:{name}}}"),
    "key-for-two": lambda name: summary_of("w").scalars(key=name),
    "stats": lambda name: summary_of("w").scalars(stats=name),
    "sort-by": lambda name: summary_of("w").table(sort_by=name),
    "kind": lambda name: summary_of("w").table(kind=name),
    "threshold": lambda name: summary_of("w").findings({name: 1}),
    "correction": lambda name: summarize({}, correction=name),
    "backend": choose,
}
WARNINGS: dict[str, Callable[[str], object]] = {
    "not-read": skipped,
    "no-match": lambda name: summarize({"w": torch.ones(1)}, include=re.escape(name)),
}

hostile = pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)


def check(text: object) -> None:
    bad = {char for char in str(text) if not char.isprintable() and char != "\n"}
    assert not bad, ascii(bad)


@hostile
@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.filterwarnings("ignore:paramstats.summarize. .* could not be read")
def test_text_is_printable(name, output, request):
    text = output(name)
    assert text
    check(text)
    assert "<script>" not in text or "html" not in request.node.callspec.id


@hostile
@pytest.mark.parametrize("call", ERRORS.values(), ids=ERRORS)
def test_errors_are_printable(name, call):
    with pytest.raises((KeyError, ValueError, TypeError, AttributeError, re.error)) as error:
        call(name)
    check(error.value.args[0])


@hostile
@pytest.mark.parametrize("call", WARNINGS.values(), ids=WARNINGS)
def test_warnings_are_printable(name, call):
    with pytest.warns(RuntimeWarning) as caught:
        call(name)
    for warning in caught:
        check(warning.message)


SAFE = ("one_line_name(", "elide(one_line_name(", "shorten(", "type(self).__name__", "meant")


@pytest.mark.parametrize("module", MODULES)
def test_texts_quote_values_with_repr(module):
    """A value between hand-written quotes, as in "got '{name}'", would not be escaped."""
    quoted = re.findall(r"'\{([^{}!]+)\}'", inspect.getsource(importlib.import_module(module)))
    assert not [value for value in quoted if not value.startswith(SAFE)]
