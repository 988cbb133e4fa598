"""Connect the native module to the torch that is running.

The module is built without any library of torch. It uses functions of torch by their names, the
place of the C++ object in a Python tensor, and the place of the dispatch keys in that object.
`connect` finds them, compares what they return for some tensors with what torch reports in Python,
and refuses the module if anything differs. csrc/torch_abi.h is the other side.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from paramstats._core.moments import Statistics

_DTYPES = (
    *("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8"),
    *("bool", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
)
"""The names of the dtypes, in the order of DType in csrc/dtypes.h."""

_AUTOGRAD_KEYS = ("AutogradFunctionality", "ADInplaceOrView")
_PYTHON_KEYS = ("Python", "PythonTLSSnapshot")
_DEVICES = ("CPU", "CUDA", "MPS", "XPU", "HPU", "MTIA", "PrivateUse1")
_METADATA_KEYS = (
    *("Meta", *_DEVICES, *(f"Autocast{device}" for device in _DEVICES)),
    *("Sparse", "SparseCsr", "Quantized", "Conjugate", "Negative", "ZeroTensor"),
)
"""Dispatch keys of tensors whose sizes are numbers in the C++ object; torch may lack some."""

_TENSOR_IMPL_SIZE = 184
"""Bytes of a C++ object that may be read while its dispatch keys are searched."""


class UnsupportedTorchError(Exception):
    """What about this torch is not as the native module needs it."""


def connect(native: Any) -> str | None:
    """Connect the native module to torch.

    The tensors for the comparison are made in a new thread: modes of the calling thread, such as
    torch.inference_mode or a default device, would change them. Nothing in that thread may import
    a module: it would wait forever if paramstats is imported while torch is (by a plugin of torch).

    Args:
        native: the module `paramstats._native`.

    Returns:
        None, or why the module must not be used with this torch.
    """
    outcome: str | None = "the thread that compares it with torch has failed"

    def run() -> None:
        nonlocal outcome
        try:
            _connect(native)
            outcome = None
        except UnsupportedTorchError as difference:
            outcome = str(difference)
        except BaseException as error:  # e.g. a private name of torch is missing or has changed
            outcome = " ".join(f"{type(error).__name__}: {error}".split())  # in one line

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        return f"the thread that compares it with torch could not be started ({error})"
    thread.join()
    return outcome


def _connect(native: Any) -> None:
    """Raise UnsupportedTorchError, or any exception of torch, if torch is not as expected."""
    library = ctypes.PyDLL(torch._C.__file__)  # calls keep the GIL
    probes = _probes()
    plain = probes[0]
    known = set(dir(torch._C.DispatchKey))
    autograd = _keys(_AUTOGRAD_KEYS)
    plain_cpu = _keys_of(plain) & ~autograd
    _expect(
        all(
            (_keys_of(tensor) & ~autograd == plain_cpu) == _is_plain_cpu(tensor)
            for tensor in probes
        ),
        "the dispatch keys of a plain tensor do not differ from those of other tensors",
    )
    on_cpu, on_cuda = (_keys((device, f"Autocast{device}")) for device in ("CPU", "CUDA"))
    numbers = {name: _function(library, f"aoti_torch_dtype_{name}")() for name in _DTYPES}
    for name, number in numbers.items():
        _expect(0 <= number < 128, f"the number of torch.{name} is {number}, not one of 0 to 127")
    found = {
        "functions": [_address(library, symbol) for symbol in native.SYMBOLS],
        "dtypes": list(numbers.values()),
        "impl_offset": _impl_offset(probes),
        "keys_offset": _keys_offset(probes),
        "autograd_keys": autograd,
        "plain_cpu_keys": plain_cpu,
        "plain_cuda_keys": plain_cpu & ~on_cpu | on_cuda,
        "metadata_keys": autograd | _keys(filter(known.__contains__, _METADATA_KEYS)),
        "python_keys": _keys(_PYTHON_KEYS),
        "plain": plain,
        "tensor": Tensor,
        "parameter": nn.Parameter,
        "module": nn.Module,
        "statistics": Statistics,
    }
    if hasattr(library, "torch_tensor_from_pyobject"):  # torch 2.14
        _check_official_conversion(library, probes)
    native.connect(found)
    for tensor in (*probes, *_tensors_with_gradients()):
        if _keys_of(tensor) & ~autograd == plain_cpu:
            _check_metadata(native, tensor)
    for name, number in numbers.items():
        dtype = native.metadata(torch.empty(1, dtype=getattr(torch, name), device="cpu"))["dtype"]
        _expect(dtype == number, f"torch.{name} is dtype {dtype} of a tensor, {number} by its name")
    _check_reading(native)
    threads, found_threads = torch.get_num_threads(), native.threads()
    _expect(
        found_threads == threads,
        f"it has {threads} threads, and {found_threads} by its C interface",
    )


def _expect(is_true: bool, otherwise: str) -> None:
    if not is_true:
        raise UnsupportedTorchError(otherwise)


# ---- find functions, offsets and keys -----------------------------------------------------------


def _address(library: ctypes.PyDLL, symbol: str) -> int:
    """Return the address of a function in the libraries of torch."""
    _expect(hasattr(library, symbol), f"it has no function {symbol}")
    return ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value or 0


def _function(library: ctypes.PyDLL, symbol: str, *arguments: Any) -> Callable[..., int]:
    """Return a C function that returns an int32."""
    return ctypes.PYFUNCTYPE(ctypes.c_int32, *arguments)(_address(library, symbol))


def _probes() -> list[Tensor]:
    """Return tensors of many kinds, so that what all of them have in common is no coincidence."""
    return [
        torch.empty(3, 5, dtype=torch.float32, device="cpu"),
        torch.empty(7, dtype=torch.float64, device="cpu"),
        nn.Parameter(torch.empty(2, 3, dtype=torch.bfloat16, device="cpu")),
        torch.empty(2, dtype=torch.float32, device="meta"),
        torch.empty(2, dtype=torch.complex64, device="cpu").conj(),
        torch.empty(2, dtype=torch.complex64, device="cpu").conj().imag,
        torch.zeros(4, dtype=torch.float32, device="cpu").to_sparse(),
        torch.empty(4, 6, dtype=torch.float32, device="cpu")[1:4:2, 2:5],
        torch.empty(0, 3, dtype=torch.int8, device="cpu"),
    ]


def _is_plain_cpu(tensor: Tensor) -> bool:
    is_lazy = tensor.is_conj() or tensor.is_neg()
    return tensor.device.type == "cpu" and tensor.layout is torch.strided and not is_lazy


def _bits(keys: Any) -> int:
    """Return the bits of a torch._C.DispatchKeySet."""
    bits = keys.raw_repr()
    _expect(
        isinstance(bits, int) and 0 <= bits < 1 << 64,
        f"DispatchKeySet.raw_repr() is {bits!r}, not an integer of 64 bits",
    )
    return int(bits)


def _keys_of(tensor: Tensor) -> int:
    return _bits(torch._C._dispatch_keys(tensor))


def _keys(names: Iterable[str]) -> int:
    """Return the bits of dispatch keys."""
    bits = 0
    for name in names:
        bits |= _bits(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)))
    return bits


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def _impl_offset(probes: list[Tensor]) -> int:
    """Return the offset in bytes of the pointer to the C++ object in a Python tensor."""
    end = Tensor.__basicsize__ - 7
    found = [
        offset
        for offset in range(object.__basicsize__, end, 8)
        if all(_word(id(tensor) + offset) == tensor._cdata for tensor in probes)
    ]
    _expect(len(found) == 1, f"the C++ object of a tensor was found at {len(found)} offsets")
    return found[0]


def _keys_offset(probes: list[Tensor]) -> int:
    """Return the offset in bytes of the dispatch keys in the C++ object."""
    for offset in range(8, _TENSOR_IMPL_SIZE - 7, 8):
        if all(_word(tensor._cdata + offset) == _keys_of(tensor) for tensor in probes):
            return offset
    raise UnsupportedTorchError("the dispatch keys of a tensor were not found in its C++ object")


# ---- compare with torch in Python ---------------------------------------------------------------


def _check_official_conversion(library: ctypes.PyDLL, probes: list[Tensor]) -> None:
    """Compare the C++ objects with those that torch's own conversion of Python tensors returns."""
    pointer = ctypes.c_void_p
    convert = _function(library, "torch_tensor_from_pyobject", pointer, ctypes.POINTER(pointer))
    delete = _function(library, "aoti_torch_delete_tensor_object", pointer)
    for tensor in probes:
        handle = pointer()
        error = convert(id(tensor), ctypes.byref(handle))
        _expect(error == 0 and handle.value is not None, "torch_tensor_from_pyobject failed")
        same = _word(handle.value or 0) == tensor._cdata
        delete(handle)
        _expect(same, "torch_tensor_from_pyobject returned another C++ object than Tensor._cdata")


def _tensors_with_gradients() -> list[Tensor]:
    # Not by torch.tensor, which imports torch; see `connect`.
    leaf = nn.Parameter(torch.arange(2, 4, dtype=torch.float32, device="cpu"))
    leaf.grad = torch.arange(11, 13, dtype=torch.float32, device="cpu")
    retained = leaf.mul(2)
    retained.retain_grad()
    return [leaf, retained, leaf.mul(3)]


def _check_metadata(native: Any, tensor: Tensor) -> None:
    """Compare what the native module reads of a plain CPU tensor with what torch reports."""
    read = native.metadata(tensor)
    grad = read.pop("grad")
    expected = {
        "sizes": tuple(tensor.shape),
        "strides": tensor.stride(),
        "numel": tensor.numel(),
        "is_contiguous": tensor.is_contiguous(),
        "dtype": read["dtype"],  # is compared for all dtypes
        "device_type": 0,
        "device_index": -1,
        "storage_offset": tensor.storage_offset(),
        "storage_size": tensor.untyped_storage().nbytes(),
        "data_ptr": tensor.data_ptr(),
        "requires_grad": tensor.requires_grad,
        "is_leaf": tensor.is_leaf,
        "retains_grad": tensor.retains_grad,
    }
    for name, value in expected.items():
        found = read[name]
        _expect(found == value, f"{name} of a tensor is {value}, torch's C interface gave {found}")
    expected_grad = tensor.grad if tensor.is_leaf or tensor.retains_grad else None
    _expect(grad is expected_grad, "torch's C++ interface gave another gradient than Tensor.grad")
    alias = native.alias(tensor)
    _expect(
        type(alias) is Tensor
        and (alias.shape, alias.stride(), alias.data_ptr(), alias.dtype)
        == (tensor.shape, tensor.stride(), tensor.data_ptr(), tensor.dtype),
        "torch's C interface made a tensor with other memory",
    )


def _check_reading(native: Any) -> None:
    """Read a parameter and its gradient with the kernels."""
    leaf = _tensors_with_gradients()[0]
    table, deferred, *_ = native.read([leaf], True, True)
    column = Statistics._fields.index("max")  # exact
    read = [native.finalize_row(table, index, 1.0, 1.0)[column] for index in range(2)]
    _expect(
        not deferred and read == [3.0, 12.0],
        f"the maxima of a parameter and its gradient, 3.0 and 12.0, were read as {read}",
    )
