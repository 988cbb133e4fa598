"""Times paramstats, its limits and the loop that it replaces in alternating calls.

    python -m benches.in_turns                    everything, two minutes
    python -m benches.in_turns mlp updates        some of the groups; --help lists them
    python -m benches.in_turns --json FILE        write the results for benches.report

The memory bandwidth of a shared machine may double within minutes. The benchmarks in pytest time
one contestant after the other; here each ratio compares two neighboring calls. The results of the
calls are checked first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import paramstats
from benches import checks, hardware, models, native_reads
from benches.contestants import (
    ITEM_LOOP,
    ONE_STATISTIC,
    REFERENCE_SCALARS,
    SCALARS,
    SUMMARIZE,
    TOTAL_GRAD_NORM,
    Contestant,
    each_tensor,
    from_summary,
)
from benches.read_only import ReadOnly, checksum
from benches.timing import quartiles, use_backend

Row = dict[str, Any]
Call = Callable[[], Any]

SECONDS = 1.5
"""Time for the calls of one comparison; a call of more than 0.1 s takes longer in all."""

_LEAST_TURNS, _MOST_TURNS = 3, 400
_SAMPLE_SECONDS = 2e-4
"""A shorter call is repeated for about this long."""
_BEST_OF = 3
_WARM_UP = 20
_LONG_SECONDS = 5e-3
"""A turn takes the best of three samples, but one sample of a call that lasts longer than this."""

_CPU = torch.device("cpu")


# ---- timing -------------------------------------------------------------------------------------


def turns(calls: Mapping[str, Call]) -> list[dict[str, float]]:
    """Return the seconds of each call, one dict per turn. A call was made before, to check it."""
    once = {name: _estimate(call) for name, call in calls.items()}
    repeats = {name: max(1, round(_SAMPLE_SECONDS / seconds)) for name, seconds in once.items()}
    best_of = {name: 1 if seconds > _LONG_SECONDS else _BEST_OF for name, seconds in once.items()}
    a_turn = sum(seconds * repeats[name] * best_of[name] for name, seconds in once.items())
    number = min(max(round(SECONDS / a_turn), _LEAST_TURNS), _MOST_TURNS)
    return [
        {
            name: min(_sample(call, repeats[name]) for _ in range(best_of[name]))
            for name, call in calls.items()
        }
        for _ in range(number)
    ]


def _estimate(call: Call) -> float:
    """Return about how many seconds a call takes; the first calls may be slow."""
    seconds = _sample(call, 1)
    if seconds > _LONG_SECONDS:
        return seconds
    return min(_sample(call, 1) for _ in range(_WARM_UP))


def _sample(call: Call, repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def compare(title: str, base: str, calls: Mapping[str, Call]) -> Iterator[Row]:
    """Yield the time of each call as a multiple of that of the call `base`."""
    found = turns(calls)
    for name in calls:
        if name != base:
            ratios = [turn[name] / turn[base] for turn in found]
            yield {"of": title, "call": name, "base": base, **_quartiles(ratios)}


def _quartiles(values: list[float]) -> Row:
    low, high = quartiles(values)
    return {"median": statistics.median(values), "low": low, "high": high}


def text(row: Row) -> str:
    """Return a row as one line."""
    unit = " us" if row["base"] is None else "x"
    base = f" / {row['base']}" if row["base"] else ""
    return (
        f"{row['of']}: {row['call']}{base}: {row['median']:.3g}{unit} "
        f"(middle half of the turns {row['low']:.3g} to {row['high']:.3g})"
    )


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


# ---- what is compared ---------------------------------------------------------------------------

_SUMMARIZE = "`summarize(m)`"
_SCALARS = "`summarize(m).scalars()`"
_REFERENCE = "`summarize(m).scalars()`, reference backend"
_ITEM_LOOP = "`.item()` loop under `no_grad`"
_READ_ONLY = native_reads.READ_ONLY


def _model(name: str) -> tuple[str, nn.Module, checks.Expected]:
    """Return a model of the benchmarks with its title and its correct statistics."""
    model = next(model for model in models.MODELS if model.name == name)
    built = models.build(model, _CPU)
    return model.title, built, checks.expected(models.tensors(built))


def _checked(
    model: nn.Module, expected: checks.Expected, contestants: Mapping[str, Contestant]
) -> dict[str, Call]:
    return {
        name: checks.checked_call(contestant, model, expected)
        for name, contestant in contestants.items()
    }


def _read_only(model: nn.Module, threads: int) -> ReadOnly:
    tensors = list(models.tensors(model).values())
    loop = ReadOnly(tensors, threads)
    assert loop() == checksum(tensors)
    return loop


def mlp() -> Iterator[Row]:
    """Compare the calls that people make with `summarize` alone, for a small model."""
    title, model, expected = _model("seed_mlp")
    calls = {
        _SUMMARIZE: SUMMARIZE,
        _SCALARS: SCALARS,
        "`summarize(m).total.grad.norm`": TOTAL_GRAD_NORM,
        '`summarize(m)["0.weight"].grad.norm`': ONE_STATISTIC,
        _ITEM_LOOP: ITEM_LOOP,
    }
    p = next(model.parameters())
    one_item = {"one `p.mean().item()`": lambda: p.mean().item()}
    yield from compare(title, _SUMMARIZE, _checked(model, expected, calls) | one_item)


def gpt2() -> Iterator[Row]:
    """Compare `summarize` with the memory limit and the loop, for a large model."""
    title, model, expected = _model("gpt2")
    ours = _checked(model, expected, {_SUMMARIZE: SUMMARIZE, _SCALARS: SCALARS})
    read_only = {_READ_ONLY: _read_only(model, torch.get_num_threads())}
    yield from compare(title, _SUMMARIZE, read_only | ours)
    calls = {_SUMMARIZE: SUMMARIZE, _ITEM_LOOP: ITEM_LOOP}
    yield from compare(title, _SUMMARIZE, _checked(model, expected, calls))


FALLBACK = ("seed_mlp", "mlp_16_layers", "tensors_of_16", "gpt2", "llama_bfloat16")
"""Names of models."""


def fallback() -> Iterator[Row]:
    """Compare the loop with the reference backend, which replaces it where nothing is compiled."""
    contestants = {_ITEM_LOOP: ITEM_LOOP, _REFERENCE: REFERENCE_SCALARS}
    for name in FALLBACK:
        title, model, expected = _model(name)
        with use_backend("reference"):
            yield from compare(title, _REFERENCE, _checked(model, expected, contestants))


MANY = (1_000, 20_000)
"""Numbers of tensors."""


def many() -> Iterator[Row]:
    """Measure the microseconds per tensor for many small tensors."""
    for number in MANY:
        model = models.many(number // 2, 100, _CPU)
        expected = checks.expected(models.tensors(model))
        checks.checked_call(ITEM_LOOP, model, expected)
        calls = _checked(
            model, expected, {f"{_SUMMARIZE} of a module with gradients, per tensor": SUMMARIZE}
        )
        pairs = list(models.tensors(model).items())
        listed = from_summary(paramstats.summarize(pairs))
        listed = {name: found for name, found in listed.items() if each_tensor(name)}
        checks.check(listed, expected, SUMMARIZE.tolerance)
        calls["`summarize(pairs)` of a list, per tensor"] = lambda p=pairs: paramstats.summarize(p)
        found = turns(calls)
        for call in calls:
            each = [turn[call] / number * 1e6 for turn in found]
            title = f"{number:,} tensors of 100 elements"
            yield {"of": title, "call": call, "base": None, **_quartiles(each)}


SIZES = {"1 GiB": 1 << 30, "16 MB": 16_000_000, "1 MiB": 1 << 20}


def tensors() -> Iterator[Row]:
    """Compare `summarize` of one tensor with the memory limit, on one and two threads."""
    for size, nbytes in SIZES.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model, block, repeats = models.repeating(nbytes, dtype)
            expected = checks.expected(models.tensors(block))
            for threads in range(1, min(2, hardware.cores()) + 1):
                with _threads(threads):
                    call = checks.checked_call(SUMMARIZE, model, expected, repeats)
                    calls = {_READ_ONLY: _read_only(model, threads), _SUMMARIZE: call}
                    name = str(dtype).removeprefix("torch.")
                    title = f"{size} of {name}, {threads} {'thread' if threads == 1 else 'threads'}"
                    yield from compare(title, _SUMMARIZE, calls)


def updates() -> Iterator[Row]:
    """Compare the read of a float32 parameter, its state and its update with the memory limit."""
    for title, calls in native_reads.updates():
        yield from compare(title, native_reads.MEASURED, calls)


def details() -> Iterator[Row]:
    """Compare the read of a tensor with its rows or distribution with the memory limit."""
    for title, calls in native_reads.details():
        yield from compare(title, native_reads.MEASURED, calls)


# ---- command line -------------------------------------------------------------------------------

GROUPS = {
    "mlp": mlp,
    "gpt2": gpt2,
    "fallback": fallback,
    "many": many,
    "tensors": tensors,
    "updates": updates,
    "details": details,
}


def measure(group: str) -> Iterator[Row]:
    """Measure a group, with the native backend unless the group selects another."""
    with use_backend("native"):
        yield from GROUPS[group]()


def main() -> None:
    parser = argparse.ArgumentParser("python -m benches.in_turns", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"some of {', '.join(GROUPS)}")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()
    if unknown := set(options.groups) - GROUPS.keys():
        parser.error(f"expected some of {', '.join(GROUPS)}, got {', '.join(sorted(unknown))}")
    report: dict[str, Any] = {**hardware.describe("cpu"), "in_turns": {}}
    print(paramstats.backend(), report["hardware"], sep="\n", flush=True)
    for name in options.groups or GROUPS:
        rows = []
        for row in measure(name):
            rows.append(row)
            print(text(row), flush=True)
        report["in_turns"][name] = {"date": report["date"], "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
