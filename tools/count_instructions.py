"""Counts the instructions per element of the CPU kernels; fails above a limit.

    make count

Counts are the same on every run and on a busy machine. They show what timings cannot: whether the
kernels are vectorized, whether a narrow dtype is read element by element, whether a chunk is read
twice. The limits are the counts of GCC 12 and a quarter more, and no level may need more than
`plain`, which is what the compiler makes of the same source.

valgrind counts on x86-64. It does not support AVX-512, whose kernels have the same source. QEMU
counts on arm64, where the cross compiler and the emulator are installed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BUILD = Path(__file__).parent.parent / "build/cpp"
SHORT, LONG = 16384, 65536  # elements; their difference excludes the start of the program
MARGIN = 1.25
DTYPES = {  # their values of the enum DType
    "float64": 0,
    "float32": 1,
    "bfloat16": 2,
    "float16": 3,
    "e4m3fn": 4,
    "e5m2": 5,
    "int8": 6,
    "bool": 8,
    "int16": 9,
    "int32": 11,
    "int64": 13,
}

# Instructions per element in the order of DTYPES, by machine, level and how far the mean of floats
# is from zero. Floats without a zero are "near", floats with zeros are "far".
EXPECTED = {
    ("x86-64", "avx2", "near"): (2.06, 1.05, 0.75, 0.68, 1.30, 1.08, 0.57, 0.32, 1.03, 2.68, 3.51),
    ("x86-64", "avx2", "far"): (2.31, 1.23, 1.19, 1.24, 1.35, 1.25, 0.57, 0.32, 1.03, 2.68, 3.51),
    ("x86-64", "plain", "near"): (7.16, 3.71, 2.39, 6.04, 4.49, 6.73, 2.22, 0.58, 2.83, 9.92, 9.16),
    ("x86-64", "plain", "far"): (7.79, 4.11, 4.03, 8.05, 4.88, 7.27, 2.22, 0.58, 2.83, 9.92, 9.16),
    ("arm64", "neon", "near"): (3.78, 1.98, 1.64, 1.54, 2.17, 1.85, 0.89, 0.49, 2.09, 3.66, 4.28),
    ("arm64", "neon", "far"): (4.53, 2.39, 2.36, 2.43, 2.43, 2.12, 0.89, 0.49, 2.09, 3.66, 4.28),
    ("arm64", "plain", "near"): (4.78, 2.51, 1.66, 4.07, 2.86, 4.10, 1.38, 0.49, 2.12, 5.03, 5.28),
    ("arm64", "plain", "far"): (5.78, 3.13, 2.47, 4.87, 3.17, 4.58, 1.38, 0.49, 2.12, 5.03, 5.28),
}


class NotSupportedError(Exception):
    """The processor does not have the level's instructions."""


def run(command: list[str]) -> str:
    """Run `command` and return its error output, where valgrind and QEMU write."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 3:
        raise NotSupportedError
    if done.returncode:
        sys.exit(done.stdout + done.stderr[-4000:])
    return done.stderr


def valgrind(level: str, arguments: list[str]) -> int:
    """Return the instructions of the whole program, counted by valgrind."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    log = run([*command, str(BUILD / "one_kernel"), level, *arguments])
    collected = re.search(r"Collected : (\d+)", log)
    return int(collected[1]) if collected else sys.exit(log)


def qemu(level: str, arguments: list[str]) -> int:
    """Return the instructions of the level's functions, counted in QEMU's log.

    QEMU translates code in blocks. It logs the instructions of a block when it translates it, and a
    line whenever it executes it.
    """
    program = str(BUILD / "one_kernel_arm64")
    symbols = subprocess.run(
        ["aarch64-linux-gnu-nm", "--demangle", "--print-size", program],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    pattern = rf"^([0-9a-f]+) ([0-9a-f]+) [tTwW] .*\bcpu::{level}::"
    functions = ",".join(
        f"0x{address}+0x{size}" for address, size in re.findall(pattern, symbols, re.MULTILINE)
    )
    command = ["qemu-aarch64", "-d", "in_asm,exec,nochain", "-dfilter", functions]
    sizes: dict[int, int] = {}
    begin: int | None = None
    total = 0
    for line in run([*command, program, level, *arguments]).splitlines():
        if line.startswith("0x"):
            if begin is None:
                begin = int(line.split(":")[0], 16)
                sizes[begin] = 0
            sizes[begin] += 1
        elif line.startswith("Trace"):
            total += sizes[int(line.split("/")[1], 16)]
        elif line.startswith("IN:"):
            begin = None
    return total


COUNTERS: dict[str, Callable[[str, list[str]], int]] = {"x86-64": valgrind, "arm64": qemu}


def per_element(case: tuple[str, str, str, str]) -> float | None:
    """Return the instructions per element, or None where the processor lacks the level."""
    machine, level, mean, dtype = case
    try:
        short, long = (
            COUNTERS[machine](level, [str(DTYPES[dtype]), str(n), mean]) for n in (SHORT, LONG)
        )
    except NotSupportedError:
        return None
    return (long - short) / (LONG - SHORT)


def main() -> int:
    machines = sorted({machine for machine, _, _ in EXPECTED})
    parser = argparse.ArgumentParser(prog="tools/count_instructions.py")
    parser.add_argument("machine", choices=machines)
    machine = parser.parse_args().machine
    cases = {
        (*key, dtype): expected
        for key, counts in EXPECTED.items()
        for dtype, expected in zip(DTYPES, counts, strict=True)
        if key[0] == machine
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = dict(zip(cases, pool.map(per_element, cases), strict=True))
    failed = False
    for case, count in counts.items():
        _, level, mean, dtype = case
        if count is None:
            print(f"{machine} {level} is not supported by this processor")
            continue
        plain = counts[machine, "plain", mean, dtype]
        too_many = count > MARGIN * cases[case] or (plain is not None and count > plain)
        failed |= too_many
        print(
            f"{machine:<6} {level:<5} {mean:<4} {dtype:<8} {count:6.2f} instructions per element, "
            f"expected {cases[case]:.2f}{'  <- TOO MANY' if too_many else ''}"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
