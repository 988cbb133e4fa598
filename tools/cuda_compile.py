"""Compiles the CUDA backend with nvcc for every architecture; needs no GPU.

    make cuda-compile

Prints the registers of each kernel. Fails where a kernel uses local memory (stack or spilled
registers), where tensors are not read with 16-byte loads from global memory, or where NVRTC (if it
is installed) does not compile the device code.
"""

from __future__ import annotations

import ctypes
import glob
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CUDA = Path(__file__).parent.parent / "csrc/cuda"
SOURCE = next(CUDA.glob("*.cu")).name
KERNELS = ("paramstats_summarize_chunks", "paramstats_merge_chunks")
OLDEST = 75
LEAST_LOADS = 2 * 15  # of a tile and of a single vector, for each of 15 dtypes


def nvcc(*arguments: str) -> str:
    command = [os.environ.get("NVCC", "nvcc"), "-std=c++17", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CUDA)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def check_resources(architecture: int) -> list[str]:
    """A line for each function with its registers, stack and spills."""
    arguments = ("-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v", "-o", os.devnull)
    output = nvcc(*arguments, SOURCE)
    found = re.findall(
        r"properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads(?:\s+ptxas info\s*: Used (\d+) registers)?",
        output,
    )
    if not {name for name, *_ in found}.issuperset(KERNELS):
        sys.exit(f"sm_{architecture}: expected {' and '.join(KERNELS)}, got\n{output}")
    lines = []
    for name, stack, stores, loads, registers in found:
        short = re.sub(r"^_ZN10paramstats4cuda\d+|E.*", "", name) if name[0] == "_" else name
        failed = "" if stack == stores == loads == "0" else "  <- LOCAL MEMORY"
        lines.append(
            f"sm_{architecture:<4} {short:<28} {registers or '-':>3} registers, {stack} bytes of "
            f"stack, {stores} + {loads} bytes spilled{failed}"
        )
    return lines


def check_loads() -> str:
    ptx = nvcc("-O3", "-ptx", f"-arch=compute_{OLDEST}", "-o", "/dev/stdout", SOURCE)
    loads = re.findall(r"\bld\.(?!param)\S*v4\S*", ptx)
    other = {load for load in loads if not load.startswith("ld.global.nc.v4")}
    failed = f"  <- {other or 'TOO FEW'}" if other or len(loads) < LEAST_LOADS else ""
    return f"PTX     {len(loads)} loads of 16 bytes{failed}"


def load_nvrtc() -> ctypes.CDLL | None:
    roots = [path for path in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if path]
    patterns = [f"{root}/lib64/libnvrtc.so*" for root in roots]
    patterns += [f"{path}/nvidia/*/lib/libnvrtc.so*" for path in sys.path]
    for path in ["libnvrtc.so", *(p for pattern in patterns for p in sorted(glob.glob(pattern)))]:
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def check_nvrtc() -> str:
    library = load_nvrtc()
    if library is None:
        return "NVRTC   is not installed"
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"-I{path}".encode() for path in (CUDA, CUDA.parent)]
    options += [b"-std=c++17", b"-arch=compute_90"]
    arguments = (ctypes.c_char_p * len(options))(*options)
    source = b'#include "kernels.h"\n'
    library.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels", 0, None, None)
    failed = library.nvrtcCompileProgram(program, len(options), arguments)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    if failed:
        return f"NVRTC   does not compile kernels.h  <- FAILED\n{log.value.decode()}"
    return "NVRTC   compiles kernels.h"


def main() -> int:
    listed = re.findall(r"compute_(\d+)", nvcc("--list-gpu-arch"))
    architectures = [n for n in sorted(map(int, listed)) if n >= OLDEST]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines = [line for found in pool.map(check_resources, architectures) for line in found]
    lines += [check_loads(), check_nvrtc()]
    print("\n".join(lines))
    return int(any("<-" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
