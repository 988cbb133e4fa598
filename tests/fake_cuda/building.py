"""Builds the fake CUDA as an extension of this torch, and puts it in CUDA's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent.parent


def install(native: Any, folder: Path) -> Any:
    """From fake_cuda.cpp, the shim and the backend's own source, as C++, built in `folder`."""
    from torch.utils.cpp_extension import load

    backend = folder / "engine.cpp"  # by its own name nvcc would be asked for
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
