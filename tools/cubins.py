"""Makes the package data of the CUDA kernels: kernels.cu and a cubin for each GPU generation.

    python -m tools.cubins FOLDER      with the NVRTC that wheels use, from the package index

kernels.cu is csrc/cuda/kernels.h with all its includes. At run time, NVRTC compiles it for GPUs
without a cubin. setup.py and tools/wheels.py use this file; it needs neither torch nor a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ARCHITECTURES = (75, 80, 90, 100, 120)  # their code runs on every GPU from sm_75 to sm_121
NVRTC_PACKAGE = "nvidia-cuda-nvrtc-cu12==12.9.86"  # CUDA 12 drivers load its cubins; has sm_120

_spec = importlib.util.spec_from_file_location("nvrtc", ROOT / "paramstats/_core/nvrtc.py")
assert _spec is not None and _spec.loader is not None
nvrtc = importlib.util.module_from_spec(_spec)  # without importing paramstats, which needs torch
_spec.loader.exec_module(nvrtc)


class Nvcc:
    """The compiler of the CUDA toolkit, with the interface of `nvrtc.Nvrtc`.

    Args:
        home: the folder of the toolkit.
    """

    def __init__(self, home: str) -> None:
        self._path = str(Path(home) / "bin/nvcc")
        release = re.search(r"release ([\d.]+)", self._run("--version"))
        listed = re.findall(r"sm_(\d+)\b", self._run("--list-gpu-code"))
        if release is None:
            raise nvrtc.CompileError(f"{self._path} --version names no release")
        self.version = release[1]
        self.architectures = tuple(map(int, listed))

    def __str__(self) -> str:
        return f"nvcc {self.version}"

    def compile(self, source: str, architecture: int) -> bytes:
        """Returns the cubin. Raises CompileError, with the output of nvcc."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernels.cu")
            path.write_text(source)
            cubin = path.with_suffix(".cubin")
            options = (*nvrtc.OPTIONS, f"--gpu-architecture=sm_{architecture}", "--cubin")
            self._run(*options, "--output-file", str(cubin), str(path))
            return cubin.read_bytes()

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([self._path, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise nvrtc.CompileError(f"{self._path} failed\n{done.stdout}{done.stderr}")
        return done.stdout


def flatten(path: Path) -> str:
    """Returns a source with the files of the project that it includes in place of the includes."""
    seen = set()

    def lines(path: Path) -> Iterator[str]:
        seen.add(path)
        for line in path.read_text().splitlines():
            include = re.fullmatch(r'#include "(.+)"', line)
            if include is None:
                yield from () if line == "#pragma once" else (line,)
            elif (included := (path.parent / include[1]).resolve()) not in seen:
                yield from lines(included)

    return "".join(f"{line}\n" for line in lines(path.resolve()))


def requested() -> tuple[int, ...]:
    """Returns the architectures of TORCH_CUDA_ARCH_LIST, or all if it names none by its number."""
    listed = re.findall(r"(\d+)\.(\d)", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    return tuple(sorted({int(major + minor) for major, minor in listed})) or ARCHITECTURES


def find_compiler(home: str | None, torch_cuda: str | None) -> Any:
    """Returns the compiler for the cubins, or None if none is needed or found.

    It is the NVRTC library of the variable PARAMSTATS_NVRTC. If it is not set and torch has CUDA,
    it is nvcc or, if there is none, the NVRTC that comes with torch. An nvcc of a later major
    version than torch's CUDA is not used: the driver may not load its cubins. `build` describes the
    arguments.

    Raises OSError if the library of the variable does not load, and CompileError if nvcc fails.
    """
    if os.environ.get(nvrtc.VARIABLE):
        return nvrtc.find()
    if torch_cuda is None:
        return None
    if home is not None and (Path(home) / "bin/nvcc").exists():
        nvcc = Nvcc(home)
        if int(nvcc.version.partition(".")[0]) <= int(torch_cuda.partition(".")[0]):
            return nvcc
    with contextlib.suppress(OSError):
        return nvrtc.find()
    return None


def write(folder: Path, compiler: Any, architectures: Iterable[int]) -> list[str]:
    """Replaces the content of a folder by kernels.cu and, with a compiler, the cubins.

    Returns:
        The architectures that the compiler does not know, or that are older than the kernels
        allow, for example ["sm_70"].

    Raises CompileError if a cubin cannot be made.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = flatten(ROOT / "csrc/cuda/kernels.h")
    (folder / "kernels.cu").write_text(source)
    if compiler is None:
        return []
    known = [n for n in architectures if n in compiler.architectures and n >= min(ARCHITECTURES)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cubins = pool.map(lambda number: compiler.compile(source, number), known)
        for number, cubin in zip(known, cubins, strict=True):
            (folder / f"sm_{number}.cubin").write_bytes(cubin)
    return [f"sm_{number}" for number in architectures if number not in known]


def build(folder: Path, home: str | None, torch_cuda: str | None) -> tuple[str, str]:
    """Writes kernels.cu and the cubins of `requested()` for setup.py.

    Args:
        folder: its content is replaced.
        home: the folder of the CUDA toolkit, or None.
        torch_cuda: the CUDA version of torch, for example "13.0", or None.

    Returns:
        The compiler, for example "nvcc 13.0", or "", and why cubins are missing, or "".

    Raises OSError or CompileError if there is a compiler and it fails. kernels.cu is written then.
    """
    write(folder, None, ())
    compiler = find_compiler(home, torch_cuda)
    if compiler is None:
        return "", "neither nvcc nor NVRTC was found" if torch_cuda else "torch has no CUDA"
    missing = write(folder, compiler, requested())
    reason = f"{compiler} does not compile them for {', '.join(missing)}" if missing else ""
    return str(compiler), reason


def install_nvrtc(folder: Path | None = None) -> str:
    """Returns the path of the NVRTC of wheels; pip installs it first, unless it is in `folder`."""
    folder = folder or ROOT / f"build/nvrtc-{NVRTC_PACKAGE.rpartition('=')[2]}"
    library = folder.resolve() / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"
    if not library.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*command, str(folder), NVRTC_PACKAGE], check=True)
    return str(library)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m tools.cubins",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="its content is replaced")
    parser.add_argument("--nvrtc", type=Path, help="where pip installs NVRTC (default: in build)")
    options = parser.parse_args()
    folder = options.folder
    compiler = nvrtc.Nvrtc(install_nvrtc(options.nvrtc))
    start = time.process_time()
    unknown = write(folder, compiler, ARCHITECTURES)
    print(f"{compiler}, {time.process_time() - start:.1f} s of CPU time")
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        print(f"{path.name:<14}{len(data):>8} bytes, {len(zlib.compress(data)):>6} compressed")
    if unknown:
        sys.exit(f"{compiler} does not know {' '.join(unknown)}")


if __name__ == "__main__":
    main()
