"""A fake CUDA for a machine without a GPU.

`paramstats.summarize` then runs the same Python and C++ code as on a GPU, on tensors that report a
CUDA device. Only `torch.empty` and the few functions of `torch.cuda` that `_core.cuda` uses are
replaced, and CUDA's driver by tests/cpp/cuda_shim.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from paramstats._core import cuda, images
from paramstats._core.backend import Implementation

_ROOT = Path(__file__).parent.parent.parent


class FakeTorch:
    """torch with a fake `empty` and `cuda`; the rest is the real one."""

    def __init__(self, fake: Any) -> None:
        @contextlib.contextmanager
        def device(index: int) -> Iterator[None]:
            before = fake.exchange_device(index)
            try:
                yield
            finally:
                fake.exchange_device(before)

        class Event(fake.Event):
            def record(self, stream: Any) -> None:
                with device(stream.device):
                    super().record(stream.cuda_stream)

        def empty(size: int, *, dtype: Any, device: Any, pin_memory: bool = False) -> torch.Tensor:
            assert dtype == torch.uint8
            if pin_memory:
                return fake.empty_pinned(size)
            return fake.empty(size, device.index)

        self.empty = empty
        self.cuda = SimpleNamespace(
            device=device,
            current_stream=lambda device: SimpleNamespace(
                cuda_stream=fake.stream(device.index), device=device.index
            ),
            is_current_stream_capturing=fake.is_capturing,
            get_device_capability=lambda device: (9, 0),
            Event=Event,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class FakeCuda:
    """The fake CUDA as an extension of the installed torch.

    Args:
        folder: where to build it.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.cpp_extension import load

        shim = _ROOT / "tests/cpp/cuda_shim"
        self.runtime = load(
            "paramstats_fake_cuda",
            [str(_ROOT / "tests/fake_cuda/fake_cuda.cpp"), *map(str, shim.glob("*.cpp"))],
            extra_include_paths=[str(shim)],
            extra_cflags=["-O1", "-w"],
            build_directory=str(folder),
        )
        self.driver = self.runtime.__file__  # it also has the functions of libcuda
        self.torch = FakeTorch(self.runtime)

    def install(
        self, native: Implementation, setattr: Callable[[Any, str, Any], None] = setattr
    ) -> Implementation:
        """Replace what `_core.cuda` uses of torch.

        Args:
            native: the native backend.
            setattr: sets an attribute, e.g. until the end of a test.

        Returns:
            The native backend as with a CUDA build of torch.
        """
        runtime = self.runtime

        def record_stream(tensor: torch.Tensor, stream: Any) -> None:
            runtime.record_stream(tensor, stream.cuda_stream)

        image = images.Image(b"not looked at", "the fake")
        setattr(images, "find", lambda capability, wait: image)
        setattr(cuda, "torch", self.torch)
        setattr(torch.Tensor, "record_stream", record_stream)
        backend = cuda.CudaBackend(native.native, self.driver)
        return dataclasses.replace(native, read=backend.read, cuda=backend, cuda_missing=None)
