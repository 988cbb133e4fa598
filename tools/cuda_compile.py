"""Compiles the CUDA kernels with nvcc for every architecture; needs no GPU.

    make cuda-compile

For each architecture it prints the registers of each kernel, and for each dtype the machine
instructions (SASS) that a thread executes per 64 bytes in the main loop of a chunk. Fails where a
kernel uses local memory (stack or spilled registers), where a count is above its limit, where a
result would depend on the compiler's choice to fuse a product with an addition, or where the NVRTC
that makes the cubins of wheels fails or uses local memory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tools import cubins

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc/cuda"
OLDEST = 75

# The most instructions per 64 bytes and thread. Code differs between these architectures; the ones
# between two of them are compiled, but not counted.
COUNTED = (75, 80, 89, 90, 100, 120)
LIMITS = {
    "Float64": (200, 200, 200, 200, 200, 200),
    "Float32": (135, 135, 135, 135, 120, 135),
    "BFloat16": (280, 280, 280, 280, 250, 280),
    "Float16": (280, 280, 220, 200, 200, 215),
    "Float8E4M3FN": (800, 800, 465, 435, 415, 450),
    "Float8E5M2": (635, 635, 465, 435, 415, 450),
    "Int8": (295, 295, 295, 160, 160, 195),
    "UInt8": (295, 295, 295, 160, 160, 195),
    "Bool": (80, 80, 80, 80, 80, 80),
    "Int16": (350, 350, 350, 350, 300, 330),
    "UInt16": (330, 330, 330, 330, 300, 330),
    "Int32": (385, 385, 385, 385, 385, 385),
    "UInt32": (385, 385, 385, 385, 385, 385),
    "Int64": (205, 205, 205, 205, 205, 205),
    "UInt64": (205, 205, 205, 205, 205, 205),
}

# One kernel per dtype, so that it is known which loop is whose. Registers are limited as in the
# kernel that has the code of all dtypes.
PROBES = """
namespace paramstats::cuda {
#define PROBE(Dtype)                                                               \\
  extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSM)             \\
      probe_##Dtype(const void* data, int n, Summary* out) {                       \\
    __shared__ Shared<kThreads> shared;                                            \\
    Summary state;                                                                 \\
    if (try_chunk<Dtype>(data, n, shared, state) && threadIdx.x == 0) *out = state; \\
  }
"""
PROBES += "\n".join(f"PROBE({dtype})" for dtype in LIMITS) + "\n}\n"


class Compiled(NamedTuple):
    architecture: int
    lines: list[str]  # of registers, to print
    instructions: dict[str, int]  # of each dtype; empty if not counted


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=CUDA)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def nvcc(*arguments: str) -> str:
    return run(os.environ.get("NVCC", "nvcc"), "-std=c++17", f"-I{CUDA}", *arguments)


def find_nvdisasm() -> str:
    paths = [*(ROOT / "build").glob("nvdisasm/nvidia/*/bin/nvdisasm"), shutil.which("nvdisasm")]
    for path in paths:
        if path:
            return str(path)
    sys.exit("nvdisasm was not found: `make cuda-compile` installs it")


def count_instructions(function: str) -> int:
    """The instructions per 64 bytes in the main loop of a function's SASS.

    A loop is a branch back to a label, with all instructions between them. The main loop is the one
    with the most 16-byte loads, among those that contain no other loop with such loads.
    """
    size, loads, loops = 0, [], []
    labels: dict[str, int] = {}
    for line in function.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = size
        instruction = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?(\S+)(.*)", line)
        if not instruction or instruction[1] == "NOP":
            continue
        if instruction[1].startswith("LDG.E.128"):
            loads.append(size)
        target = re.search(r"\.L_x_\d+", instruction[2])
        if instruction[1].startswith("BRA") and target and target[0] in labels:
            loops.append(range(labels[target[0]], size + 1))
        size += 1
    loaded = {loop: sum(at in loop for at in loads) for loop in loops}
    counted = [loop for loop in loops if loaded[loop]]
    inner = [
        a for a in counted if not any(b != a and a[0] <= b[0] and b[-1] <= a[-1] for b in counted)
    ]
    main = max(inner, key=loaded.__getitem__, default=range(0))
    return round(len(main) * 4 / loaded[main]) if len(main) else sys.maxsize


def compile_for(architecture: int) -> Compiled:
    counted = architecture in COUNTED
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = f"{folder}/kernels.cu", f"{folder}/kernels.cubin"
        Path(source).write_text('#include "kernels.h"\n' + PROBES * counted)
        output = nvcc("-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v", "-o", cubin, source)
        sass = run(find_nvdisasm(), "-c", cubin) if counted else ""
    functions = re.findall(
        r"properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads(?:\s+ptxas info\s*: Used (\d+) registers)?",
        output,
    )
    kernels = re.findall(r"\b(paramstats_\w+)\(", (CUDA / "kernels.h").read_text())
    if not kernels or not {name for name, *_ in functions}.issuperset(kernels):
        sys.exit(f"sm_{architecture}: expected {' and '.join(kernels)}, got\n{output}")
    lines = []
    for name, stack, stores, loads, registers in functions:
        local = not stack == stores == loads == "0"
        if name in kernels or local:
            failed = f", {stack} + {stores} + {loads} bytes  <- LOCAL MEMORY" if local else ""
            lines.append(f"sm_{architecture:<4} {name:<30} {registers or '-':>3} registers{failed}")
    text = dict(re.findall(r"^\.text\.probe_(\w+):\n(.*?)(?=^//---|\Z)", sass, re.S | re.M))
    return Compiled(architecture, lines, {d: count_instructions(text[d]) for d in text})


def table_of(results: list[Compiled]) -> list[str]:
    counted = [result for result in results if result.instructions]
    title = "instructions per 64 bytes"
    lines = [f"{title:<26}" + "".join(f"{f'sm_{r.architecture}':>8}" for r in counted)]
    for dtype, limits in LIMITS.items():
        counts = [result.instructions[dtype] for result in counted]
        above = [n for n, limit in zip(counts, limits, strict=True) if n > limit]
        failed = f"  <- LIMITS {limits}" if above else ""
        lines.append(f"{dtype:<26}" + "".join(f"{n:>8}" for n in counts) + failed)
    return lines


def check_roundings(architecture: int) -> str:
    """Compares the code with that of a compiler that may not fuse products and additions.

    The power function of CUDA's library, which also differs, is not counted.
    """

    def fused(*options: str) -> int:
        with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
            target = f"-arch=compute_{architecture}"
            nvcc("-ptx", target, *options, "-x", "cu", "-o", file.name, "kernels.h")
            power = rb"^\.func [^\n]*__internal_accurate_pow\(.*?^}"
            own = re.sub(power, b"", file.read(), flags=re.DOTALL | re.MULTILINE)
            return len(re.findall(rb"\bfma\.rn\.f(?:32|64)\b", own))

    free, fixed = fused(), fused("-fmad=false")
    failed = f"  <- THE COMPILER ADDS {free - fixed}" if free != fixed else ""
    return f"sm_{architecture:<4} {fixed} fused products{failed}"


def check_cubin(architecture: int) -> str:
    """Compiles as for a wheel. Other compilers than nvcc may need more registers."""
    compiler = cubins.nvrtc.Nvrtc(cubins.install_nvrtc())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiler.compile(cubins.flatten(CUDA / "kernels.h"), architecture))
        file.flush()
        sass = run(find_nvdisasm(), "-c", file.name)
    spills = len(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?(?:LDL|STL)\b", sass, re.M))
    failed = f"  <- {spills} ACCESSES OF LOCAL MEMORY" if spills else ""
    return f"sm_{architecture:<4} compiled by {compiler}{failed}"


def main() -> int:
    listed = {int(n) for n in re.findall(r"compute_(\d+)", nvcc("--list-gpu-arch"))}
    # Those that are counted take longest.
    order = sorted({n for n in listed if n >= OLDEST}, key=lambda n: (n not in COUNTED, n))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = sorted(pool.map(compile_for, order))
        roundings = pool.map(check_roundings, (OLDEST, 90))  # both kinds of 8-bit floats
        lines = [line for result in results for line in result.lines]
        lines += [*table_of(results), *roundings]
    lines += map(check_cubin, cubins.ARCHITECTURES)
    print("\n".join(lines))
    return int(any("<-" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
