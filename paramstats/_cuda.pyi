"""The CUDA backend: reads tensors of one device with two kernels, on a stream.

`views` are the bytes of `paramstats::cuda::TensorView`s (csrc/cuda/engine.h), one for each
tensor. Addresses and streams (cudaStream_t) are numbers. Errors are texts; "" is success. All
functions use the current device, and none waits for it.

The module is built from csrc/cuda_binding.cpp. It needs the CUDA runtime library.
"""

VIEW_BYTES: int
"""The size of a TensorView, which `paramstats._native` must agree with."""
RELAXED_CAPTURE: int
"""The capture mode that allows this thread to query events while a graph is being captured."""

def check() -> str:
    """Return why the kernels cannot run on the current device."""

def sizes(views: bytes) -> tuple[int, int]:
    """Return the bytes of pinned host memory and of device memory that `enqueue` needs."""

def enqueue(views: bytes, host: int, device: int, stream: int) -> str:
    """Enqueue the reads on a stream. They write the states, in order, to the begin of `host`.

    The tensors and both memories must stay valid until the stream is done, also after an error.
    """

def write_rows(table: bytearray, rows: bytes, host: int) -> None:
    """Copy the states at `host` to the rows of a table that `rows` has as int64.

    Raises IndexError if there is no such row.
    """

def exchange_capture_mode(mode: int) -> int:
    """Set the capture mode of this thread; return the previous one."""
