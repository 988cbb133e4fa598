"""Builds the fake CUDA as an extension of the installed torch and installs it in place of CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent.parent


def install(native: Any, folder: Path) -> Any:
    """Build fake_cuda.cpp, the shim and the CUDA backend as C++ in `folder`; return the module."""
    from torch.utils.cpp_extension import load

    backend = folder / "engine.cpp"  # torch would call nvcc for a .cu file
    backend.write_text(f'#include "{_ROOT}/csrc/cuda/engine.cu"\n')
    built = load(
        "paramstats_fake_cuda",
        [
            str(_ROOT / "tests/fake_cuda/fake_cuda.cpp"),
            str(_ROOT / "tests/cpp/cuda_shim/shim.cpp"),
            str(backend),
        ],
        extra_include_paths=[str(_ROOT / "tests/cpp/cuda_shim"), str(_ROOT / "csrc/cuda")],
        extra_cflags=["-O1", "-w"],
        build_directory=str(folder),
    )
    built.install()
    native.use_cuda_backend(built.api())
    return built
