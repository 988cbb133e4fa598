"""Counts the instructions per element of the CPU kernels with valgrind; fails above a limit.

    make count

Counts are the same on every run and on a busy machine. They show what timings cannot: whether the
kernels are vectorized, whether a narrow dtype is read element by element, whether a chunk is read
twice. The limits are the counts of GCC 12 and a quarter more. valgrind does not support AVX-512,
whose kernels have the same source.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent.parent / "build/cpp/one_kernel"
SHORT, LONG = 16384, 65536  # elements; their difference excludes the start of the program
MARGIN = 1.25
DTYPES = ("float64", "float32", "bfloat16", "float16", "e4m3fn", "e5m2", "int8")

# Instructions per element in the order of DTYPES, by level and by how far the mean is from zero.
EXPECTED = {
    ("avx2", "near"): (2.15, 1.16, 1.13, 1.15, 1.73, 1.12, 0.95),
    ("avx2", "far"): (2.33, 1.26, 1.28, 1.27, 1.79, 1.40, 0.95),
    ("plain", "near"): (7.45, 3.89, 4.50, 9.57, 8.01, 9.97, 6.47),
    ("plain", "far"): (8.00, 4.16, 4.66, 10.14, 8.41, 10.71, 6.44),
}


def instructions(level: str, mean: str, dtype: int, n: int) -> int | None:
    """Instructions of the whole program; None where the processor does not support the level."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", str(PROGRAM)]
    command += [level, str(dtype), str(n), mean]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 3:
        return None
    collected = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or collected is None:
        sys.exit(done.stdout + done.stderr)
    return int(collected[1])


def main() -> int:
    failed = False
    for (level, mean), counts in EXPECTED.items():
        for dtype, (name, expected) in enumerate(zip(DTYPES, counts, strict=True)):
            short, long = (instructions(level, mean, dtype, n) for n in (SHORT, LONG))
            if short is None or long is None:
                print(f"{level:<7} is not supported by this processor")
                break
            count = (long - short) / (LONG - SHORT)
            too_many = count > MARGIN * expected
            failed |= too_many
            print(
                f"{level:<7} {mean:<5} {name:<9} {count:6.2f} instructions per element, expected "
                f"{expected:.2f}{'  <- TOO MANY' if too_many else ''}"
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
