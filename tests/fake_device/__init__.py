"""A fake CUDA device, with which programs for a GPU run on a machine without one.

It is for a build of torch without CUDA. Tensors report a CUDA device, but their memory is the
host's, and torch's operators run their CPU kernels. Streams, events, graphs and the profiler
imitate CUDA's rules, not its speed. The kernels of paramstats run on tests/cpp/cuda_shim.

    python -m tests.fake_device -m benches.on_gpu --only smoke

runs a program, and every Python that it starts, with the fake device. No number that is measured
there means anything.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

NAME = "fake device (dry run)"
"""The name of the device, so that no result can be mistaken for a measurement."""

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent

_LIBRARY = "PARAMSTATS_FAKE_DEVICE"
"""Path of the library; set in the processes that use the fake device."""


def active() -> bool:
    """Return whether this process uses the fake device."""
    return _LIBRARY in os.environ


def scaled(size: int, least: int = 1) -> int:
    """Return `size`, or a thousandth of it but not less than `least` on the fake device."""
    return max(size >> 10, least) if active() else size


def build() -> Path:
    """Compile the fake device for the installed torch, and return the folder of the libraries."""
    from torch.utils.cpp_extension import load

    from tests import fake_nvrtc

    folder = ROOT / "build" / "fake_device"
    folder.mkdir(parents=True, exist_ok=True)
    scripts = str(Path(sys.executable).parent)  # torch looks for ninja on the PATH
    os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    shim = ROOT / "tests/cpp/cuda_shim"
    sources = [*FOLDER.glob("*.cpp"), *shim.glob("*.cpp")]
    load(
        "fake_device",
        # fake_driver.cpp includes libcuda.cpp
        [str(path) for path in sources if path.name != "libcuda.cpp"],
        extra_include_paths=[str(shim)],
        extra_cflags=["-O2", "-Wno-unknown-pragmas"],
        extra_ldflags=["-Wl,-soname,libcuda.so.1"],
        build_directory=str(folder),
        is_python_module=False,
    )
    shutil.copy(fake_nvrtc.library(), folder)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Return the environment in which every Python uses the fake device.

    Programs of CUDA such as nvidia-smi and compute-sanitizer are replaced, too. Compiled kernels
    are not stored where a real device would look for them.

    Args:
        folder: of the libraries.
    """
    path = os.pathsep.join([str(FOLDER / "bin"), os.environ.get("PATH", "")])
    python_path = [str(FOLDER / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        _LIBRARY: str(folder / "fake_device.so"),
        "PARAMSTATS_CACHE": str(folder / "cache"),
        "PARAMSTATS_NVRTC": str(folder / "libfake_nvrtc.so"),
        "PATH": path,
        "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
    }


def install() -> None:
    """Use the fake device in this process; called when torch has been imported."""
    spec = importlib.util.spec_from_file_location("fake_device", os.environ[_LIBRARY])
    assert spec is not None and spec.loader is not None
    fake: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    from tests.fake_device import torch_cuda

    torch_cuda.install(fake)
