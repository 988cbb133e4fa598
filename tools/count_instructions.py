"""Counts the instructions that the CPU kernels take for an element, under valgrind.

    make count

A count is the same on every run and on a busy machine, so it guards what a timing cannot: that
the kernels are vectorised, that a narrow type is not read element by element, that a chunk is not
read twice. Limits are what GCC 12 needs, and a quarter more. (valgrind knows no AVX-512, which is
made of the same source.)
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent.parent / "build/cpp/one_kernel"
SHORT, LONG = 16384, 65536
MARGIN = 1.25
DTYPES = ("float64", "float32", "bfloat16", "float16", "e4m3fn", "e5m2", "int8")

# Instructions an element, by level and by how far the mean is from zero, in the order of DTYPES.
EXPECTED = {
    ("avx2", "near"): (2.15, 1.16, 1.13, 1.15, 1.73, 1.12, 0.95),
    ("avx2", "far"): (2.33, 1.26, 1.28, 1.27, 1.79, 1.40, 0.95),
    ("plain", "near"): (7.45, 3.89, 4.50, 9.57, 8.01, 9.97, 6.47),
    ("plain", "far"): (8.00, 4.16, 4.66, 10.14, 8.41, 10.71, 6.44),
}


def instructions(level: str, where: str, dtype: int, n: int) -> int | None:
    """All that the program takes; None where the processor, or valgrind, has not this level."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", str(PROGRAM)]
    done = subprocess.run(
        [*command, level, str(dtype), str(n), where], capture_output=True, text=True
    )
    if done.returncode == 3:
        return None
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    collected = re.search(r"Collected : (\d+)", done.stderr)
    assert collected is not None, done.stderr
    return int(collected[1])


def main() -> int:
    failed = False
    for (level, where), limits in EXPECTED.items():
        for dtype, (name, expected) in enumerate(zip(DTYPES, limits, strict=True)):
            short, long = (instructions(level, where, dtype, n) for n in (SHORT, LONG))
            if short is None or long is None:
                print(f"{level:<7} not here")
                break
            each = (long - short) / (LONG - SHORT)
            bad = each > MARGIN * expected
            failed = failed or bad
            print(
                f"{level:<7} {where:<5} {name:<9} {each:6.2f} instructions an element, expected "
                f"{expected:.2f}{'  <- TOO MANY' if bad else ''}"
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
