"""Compiles the CUDA backend with nvcc for every architecture it knows; needs no GPU.

    make cuda-compile

Prints what each kernel takes, and fails where one keeps anything in local memory (a stack frame or
spilled registers: device memory, in the loop that is there to wait for memory alone), where the
tensors are not read by 16-byte loads of global memory, or where NVRTC, if it is installed, does not
take the device code as it stands.
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
KERNELS = ("paramstats_summarize_chunks", "paramstats_merge_chunks")
OLDEST = 75
LEAST_LOADS = 2 * 15  # a tile's and a single one, of 15 element types


def nvcc(*arguments: str) -> str:
    command = [os.environ.get("NVCC", "nvcc"), "-std=c++17", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CUDA)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def resources(architecture: int) -> list[str]:
    """A line for each function, and what is wrong with it."""
    told = nvcc("-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v", "-o", os.devnull,
                "engine.cu")  # fmt: skip
    found = re.findall(
        r"properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads(?:\s+ptxas info\s*: Used (\d+) registers)?",
        told,
    )
    names = [name for name, *_ in found]
    if any(kernel not in names for kernel in KERNELS):
        sys.exit(f"sm_{architecture}: expected {' and '.join(KERNELS)}, got\n{told}")
    lines = []
    for name, stack, stores, loads, registers in found:
        short = name if name in KERNELS else re.sub(r"^_ZN10paramstats4cuda\d+|E.*", "", name)
        bad = "" if stack == stores == loads == "0" else "  <- LOCAL MEMORY"
        lines.append(
            f"sm_{architecture:<4} {short:<28} {registers or '-':>3} registers, {stack} bytes of "
            f"stack, {stores} + {loads} bytes spilled{bad}"
        )
    return lines


def check_loads() -> list[str]:
    ptx = nvcc("-O3", "-ptx", f"-arch=compute_{OLDEST}", "-o", "/dev/stdout", "engine.cu")
    loads = re.findall(r"\bld\.(?!param)\S*v4\S*", ptx)
    elsewhere = {load for load in loads if not load.startswith("ld.global.nc.v4")}
    told = f"{len(loads)} loads of 16 bytes, all of global memory"
    if elsewhere or len(loads) < LEAST_LOADS:
        told = f"{len(loads)} loads of 16 bytes, {elsewhere or 'too few'}  <- GLOBAL MEMORY?"
    return [f"PTX     {told}"]


def nvrtc() -> ctypes.CDLL | None:
    roots = [path for path in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if path]
    patterns = [f"{root}/lib64/libnvrtc.so*" for root in roots]
    patterns += [f"{path}/nvidia/*/lib/libnvrtc.so*" for path in sys.path]
    for path in ["libnvrtc.so", *(p for pattern in patterns for p in sorted(glob.glob(pattern)))]:
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def check_nvrtc() -> list[str]:
    library = nvrtc()
    if library is None:
        return ["NVRTC   not installed here: left out"]
    program = ctypes.c_void_p()
    source = b'#include "kernels.h"\n'
    options = [f"-I{path}".encode() for path in (CUDA, CUDA.parent)]
    options += [b"-std=c++17", b"-arch=compute_90"]
    arguments = (ctypes.c_char_p * len(options))(*options)
    library.nvrtcCreateProgram(ctypes.byref(program), source, b"backend", 0, None, None)
    failed = library.nvrtcCompileProgram(program, len(options), arguments)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    if failed:
        return [f"NVRTC   does not take kernels.h  <- FAILED\n{log.value.decode()}"]
    return ["NVRTC   takes kernels.h as it stands"]


def main() -> int:
    listed = re.findall(r"compute_(\d+)", nvcc("--list-gpu-arch"))
    architectures = [n for n in sorted(map(int, listed)) if n >= OLDEST]
    lines = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for more in pool.map(resources, architectures):
            print("\n".join(more), flush=True)
            lines += more
    for check in (check_loads, check_nvrtc):
        more = check()
        print("\n".join(more), flush=True)
        lines += more
    return int(any("<-" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
