"""Checks the error bound of every backend on a hundred thousand adversarial tensors.

    python -m tools.accuracy                10 minutes; prints the table of docs/semantics.md, too
    python -m tools.accuracy --cases 2000
    python -m tools.accuracy --seed 3       other cases

A state outside its bound ends the program with the tensor, which hypothesis has made small.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings, target

from benches.hardware import cpu_name
from docs import blocks
from paramstats._core import backend as backends
from tests import oracle
from tests.fake_cuda.building import FakeCuda
from tools.accuracy import adversarial, bound, comparison

CASES_PER_RUN = 5000
"""Hypothesis remembers all cases of a run, so long runs need much memory."""

Worst = dict[tuple[str, str], list[float]]
"""By backend and lane type: number of states, then the largest of mean, std, norm error, share."""


def campaign(cases: int, first_seed: int, folder: Path) -> Worst:
    """Raises AssertionError where a state is outside its bound."""
    native, reference = backends.choose("native"), backends.choose("reference")
    levels = native.native.simd_levels()
    fake = None if torch.cuda.is_available() else FakeCuda(folder)
    on_cuda = fake.install(native) if fake else None
    worst: Worst = {}

    def measure(name: str, kind: str, backend, tensor: torch.Tensor, exact) -> None:
        state = bound.state_of(backend, tensor)
        found = bound.assert_within(kind, state, exact, tensor.dtype)
        lanes = "float32" if tensor.dtype in bound.FLOAT32_LANES else "float64"
        largest = worst.setdefault((name, lanes), [0.0] * 5)
        largest[0] += 1
        for i, error in enumerate((found.mean, found.std, found.norm, found.worst_used), 1):
            largest[i] = max(largest[i], error)
        target(found.worst_used, label=name)

    def check(tensor: torch.Tensor) -> None:
        exact = oracle.exact(tensor)
        for level in levels:
            native.native.set_simd_level(level)
            measure(f"native, {level}", "native", native, tensor, exact)
        measure("reference", "reference", reference, tensor, exact)
        if fake is not None:
            on_device = fake.runtime.to(tensor.contiguous(), 0)  # the kernels read no gaps
            measure("CUDA source on a CPU", "cuda", on_cuda, on_device, exact)

    for begin in range(0, cases, CASES_PER_RUN):
        run = settings(
            max_examples=min(CASES_PER_RUN, cases - begin),
            database=None,
            deadline=None,
            derandomize=False,
            phases=(Phase.generate, Phase.target, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )(given(adversarial.tensors())(check))
        seed(first_seed + begin)(run)()
        print(f"{min(begin + CASES_PER_RUN, cases):,} cases", flush=True)
    native.native.set_simd_level(levels[0])
    return worst


def table(worst: Worst) -> str:
    rows = []
    for (name, lanes), (states, *errors, used) in worst.items():
        # Relative errors of float64 lanes say little: most come from values far from zero.
        cells = [f"{error:.1e}" if lanes == "float32" else "-" for error in errors]
        rows.append((name, lanes, f"{states:,.0f}", *cells, f"{used:.0%}"))
    head = ("backend", "lanes", "states", "mean / rms", "std", "norm", "share of the bound")
    return blocks.table(head, rows, right=range(2, 7))


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.accuracy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        print(table(campaign(options.cases, options.seed, Path(folder))))
    print(
        f"\nLargest errors of {options.cases:,} tensors, none outside its bound; {cpu_name()}, "
        f"torch {torch.__version__}, {date.today()}, {(time.monotonic() - begin) / 60:.0f} min.\n"
    )
    print(comparison.table())


if __name__ == "__main__":
    main()
