"""The native backend: reads tensors into tables of states and computes statistics from tables.

A table is a bytes object with 2 N rows for N tensors: the states of the tensors, then those of
their gradients. A row is a `paramstats._core.moments.Moments` in the format of `moments.ROW`. Its
count is -1 if there is no such tensor (absent); its mean is NaN if it was not read (unread).

The module is built from csrc/binding.cpp.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from typing_extensions import Buffer

from paramstats._core.moments import Statistics

BLOCK: int
"""Elements that a CPU kernel sums before it converts the sums to a state."""
CHUNK: int
"""Elements that one thread reads at a time."""
INNER: int
"""Elements of a float32 lane that are added up in a tile: part of the error bound."""
TILES_AT_ZERO: int
"""Tiles that are added up before they are widened to float64, if the pivot is 0."""
MAX_SHIFT_SHARE: float
"""Largest accepted sum(d)^2 / n as a share of sum(d^2): part of the error bound."""
SERIAL_BYTES: int
"""A call that reads fewer bytes than this runs on the calling thread alone."""

SYMBOLS: tuple[str, ...]
"""The functions of torch that `connect` needs, by their symbols."""

def connect(found: dict[str, Any]) -> None:
    """Set what was found in torch; see `paramstats._core.torch_abi`.

    Must be called before any function that takes tensors or modules.
    """

def metadata(tensor: torch.Tensor) -> dict[str, Any]:
    """Return what torch reports in C++ of a plain tensor; see `_core.torch_abi._check_metadata`."""

def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return another tensor with the same storage, sizes and strides as a plain tensor."""

RELAXED_CAPTURE: int
"""The capture mode that allows this thread to query events while a graph is being captured."""

def cuda_open(path: str) -> str:
    """Find the functions of CUDA's driver in a library. Return why that failed, or ""."""

def cuda_load(device: int, image: bytes) -> str:
    """Load compiled kernels (a cubin) on a device. Return why that failed, or "".

    `cuda_open` must have succeeded.
    """

def exchange_capture_mode(mode: int) -> int:
    """Set the capture mode of this thread; return the previous one."""

class CudaGroup:
    """The tensors of one call that the kernels read on one CUDA device.

    It refers to them, or holds their storages (`read(hold=True)`).
    """

    device: int
    """The index of the device."""
    replaced: bool
    """Whether another thread replaced a tensor before `enqueue` returned: the results may be wrong.
    This does not happen if the group holds the storages."""

    def sizes(self) -> tuple[int, int]:
        """Return the bytes of pinned host memory and of device memory that `enqueue` needs."""

    def enqueue(self, host: int, device_memory: int, stream: int) -> str:
        """Enqueue the reads on a stream (a CUstream). They write the states to the begin of `host`.

        Return an error, or "". Does not wait for the device. Both memories must stay valid until
        the stream is done, also after an error.
        """

    def write(self, table: bytearray, host: int) -> None:
        """Copy the states at `host` to their rows. Raises IndexError if the table is too small."""

    def details(self, host: int) -> dict[int, tuple[bytes | None, bytes | None, bytes | None]]:
        """Return the details at `host` by row: the distribution, None for the rows, and zero rows.

        Rows of the table without any are not in it. csrc/details.h has the formats.
        """

    def aliases(self) -> list[torch.Tensor]:
        """Return tensors with the same storages, sizes and strides, for `record_stream`.

        Return none if another thread has replaced a tensor; `enqueue` then only sets `replaced`.
        """

def walk(
    module: nn.Module, buffers: bool, make_layout: Callable[..., Any]
) -> tuple[Any, list[torch.Tensor]] | None:
    """Return `(layout, tensors)` of a module, each tensor once; None if only Python can list it.

    `layout` is the result of `make_layout(module, names, aliases, parameters, tensors)`, which is
    called again only if the model has changed.
    """

def cached_layouts() -> int:
    """Return the number of layouts that `walk` has cached. A layout lives as long as its model."""

def set_dtensor_class(type: type[torch.Tensor]) -> None:
    """Tell `walk` which class is DTensor, so that it lists models with DTensors."""

def read(
    tensors: list[torch.Tensor],
    params: bool,
    grads: bool,
    cuda_devices: int = 0,
    hold: bool = False,
    updates: tuple[tuple[Any, ...], ...] = (),
    details: bytes = b"",
) -> tuple[
    bytes,
    tuple[tuple[int, torch.Tensor], ...],
    tuple[CudaGroup, ...],
    Mapping[int, tuple[bytes | None, bytes | None, bytes | None]],
]:
    """Read tensors and their gradients; return `(table, deferred_rows, groups, details)`.

    `deferred_rows` are rows that the kernels cannot read, with their tensors. The tensors on the
    CUDA devices whose bits are set in `cuda_devices` are in `groups`, and their rows are unread. If
    `hold`, the groups hold the storages.

    The argument `details` is empty or has a byte per tensor: bit 0 asks for its distribution, bit 1
    for the states of its rows (indices of dimension 0), both also of its gradient. The result
    `details` has, by row of the table, `(distribution, rows, zero_rows)`, packed as
    `paramstats._core.details.Detail` describes. Each is None if there is none; `zero_rows` needs
    not be asked for, and is None if no row is zero. Tensors on CUDA devices whose rows are asked
    for are in `deferred_rows`, and Python must read their details. Those of other tensors on CUDA
    devices are in `CudaGroup.details`.

    Each of `updates` adds four rows at the end of the table, in the order of UpdateRow in
    csrc/updates.h: the state of the update dw, and the products g * m, dw * g and
    g^2 / max(v / bc2, eps^2). A row is absent if one of its operands is missing. An update that the
    kernels cannot read is in `deferred_rows` once, with its first row and the parameter, and its
    rows are unread. An update is a tuple of these fields:

    - param, grad, momentum, variance: rows of the table, or -1 if there is none; all but `grad` are
      rows of tensors. They are read as operands, also where `params` or `grads` is false.
    - step_row: the row of a tensor whose only element is the step; -1: `step` is the step.
    - old: the parameter before the step, or None.
    - method: 0: dw is not known; 1: dw is computed by the formula of Adam and AdamW, and `zeros`
      counts the elements that the update did not change; 2: dw is the parameter minus `old`.
    - lr, decay, beta1, beta2, eps, step: floats. `decay` is 0 unless the weight decay is decoupled.

    Raises ValueError if `details` has another length, if a row is out of range, or if an operand
    that the method needs is missing.
    """

def crc32(data: Buffer, value: int = 0) -> int:
    """Return the CRC-32 of contiguous bytes, as `zlib.crc32` does, at the speed of memory."""

def merge_rows(table: bytes, begin: int, end: int) -> bytes:
    """Return a table of one tensor: the tensors [begin, end) merged, and their gradients merged.

    Absent and unread rows do not count. A result is unread if no row was read, and absent if all
    rows are. Without tensors, the first row is an empty state and the second is absent.
    """

def scalars(
    table: bytes,
    total: bytes,
    keys: dict[str, None],
    columns: bytes,
    correction: float,
    grad_scale: float,
) -> dict[str, float]:
    """Return `{key: statistic}` of the rows of two tables, without absent and unread rows.

    `keys` contains, row by row, one key per entry of `columns` (positions in `Statistics`).
    """

def statistic(table: bytes, index: int, column: int, correction: float, scale: float) -> float:
    """Return the statistic at position `column` of `Statistics`, divided by `scale`."""

def finalize_row(table: bytes, index: int, correction: float, scale: float) -> Statistics:
    """Return the statistics of a row, divided by `scale`, in the order of `Statistics`."""

def finalize_table(table: bytes, correction: float, grad_scale: float) -> bytes:
    """Return the statistics of every row as float64, in the order of `Statistics`.

    Absent rows are NaN. Gradients, the second half, are divided by `grad_scale` first.
    """

def threads() -> int:
    """Return the number of threads that large calls use: torch's own."""

def simd_levels() -> list[str]:
    """Return the SIMD levels that this CPU supports, fastest first: "avx512", "avx2", "neon",
    "plain"."""

def simd_level() -> str:
    """Return the SIMD level in use."""

def set_simd_level(name: str) -> None:
    """Use the kernels of a SIMD level. Raises ValueError if this CPU does not support it."""
