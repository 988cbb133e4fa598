"""The error bound on a hundred thousand adversarial tensors, by every backend.

    python -m tests.accuracy                        writes docs/accuracy.md and docs/semantics.md
    python -m tests.accuracy --cases 2000 --dry-run
    python -m tests.accuracy --seed 3               other cases

A state outside its bound ends it with the tensor, as small as hypothesis could make it.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings, target

from benches.hardware import cpu_name
from docs import blocks
from paramstats._core import backend as backends
from tests.accuracy import adversarial, bound, nasty, rational
from tests.accuracy.test_bound import assert_within, state_of
from tests.fake_cuda import building

_ROOT = Path(__file__).parent.parent.parent
_ROUND = 5000
"""Cases of one run of hypothesis, which remembers all that it tried."""


class Worst:
    """The largest of each error, by backend and by what its lanes are."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], dict[str, float]] = {}
        self.states: Counter[tuple[str, str]] = Counter()

    def take(self, name: str, dtype: torch.dtype, errors: bound.Errors) -> None:
        lanes = "float32" if dtype in bound.FLOAT32_LANES else "float64"
        worst = self.found.setdefault((name, lanes), {})
        self.states[name, lanes] += 1
        for statistic, error in dataclasses.asdict(errors).items():
            worst[statistic] = max(worst.get(statistic, 0.0), error)


def campaign(cases: int, first_seed: int, folder: Path) -> Worst:
    """Raises AssertionError where a state is outside its bound."""
    native, reference = backends.choose("native"), backends.choose("reference")
    levels = native.native.simd_levels()
    cuda = None
    if torch.version.cuda is None:
        cuda = building.install(native.native, folder)
    worst = Worst()

    def take(name: str, kind: str, chosen, tensor, on, truth) -> None:
        errors = assert_within(kind, state_of(chosen, on), tensor, truth)
        worst.take(name, tensor.dtype, errors)
        target(errors.worst_used, label=name)

    def check(tensor: torch.Tensor) -> None:
        truth = rational.exact(tensor)
        for level in levels:
            native.native.set_simd_level(level)
            take(f"native, {level}", "native", native, tensor, tensor, truth)
        take("reference", "reference", reference, tensor, tensor, truth)
        if cuda is not None:
            there = cuda.to(tensor.contiguous(), 0)  # it reads no gaps
            take("CUDA, its source on a CPU", "cuda", native, tensor, there, truth)

    for begin in range(0, cases, _ROUND):
        run = given(adversarial.tensors())(check)
        run = settings(
            max_examples=min(_ROUND, cases - begin),
            database=None,
            deadline=None,
            derandomize=False,
            phases=(Phase.generate, Phase.target, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )(run)
        seed(first_seed + begin)(run)()
        print(f"{begin + _ROUND:,} cases", flush=True)
    native.native.set_simd_level(levels[0])
    return worst


def shown(worst: Worst, cases: int, seconds: float) -> str:
    rows = []
    for (name, lanes), of in worst.found.items():
        most = max(of["mean_used"], of["std_used"], of["norm_used"])
        errors = (of["mean_of_rms"], of["std"], of["norm"])
        # float64's are next to nothing, or those of values far from zero: see the bound's E.
        cells = [f"{e:.1e}" if lanes == "float32" else "-" for e in errors]
        rows.append((name, lanes, f"{worst.states[name, lanes]:,}", *cells, f"{most:.0%}"))
    head = ("backend", "sums in", "states", "mean, of rms", "std", "norm",
            "of what the bound allows")  # fmt: skip
    return (
        f"{blocks.table(head, rows, right=range(2, 7))}\n\n"
        f"The worst of {cases:,} adversarial tensors, each against exact rational arithmetic; none "
        f"outside its bound. {cpu_name()}, torch {torch.__version__}, {date.today()}, "
        f"{seconds / 60:.0f} minutes."
    )


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.accuracy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        worst = campaign(options.cases, options.seed, Path(folder))
    result = shown(worst, options.cases, time.monotonic() - begin)
    table = nasty.table()
    print(result, table, sep="\n\n")
    if not options.dry_run:
        blocks.write(_ROOT / "docs/accuracy.md", "accuracy", result)
        blocks.write(_ROOT / "docs/semantics.md", "accuracy", table)


if __name__ == "__main__":
    main()
