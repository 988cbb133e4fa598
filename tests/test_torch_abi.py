"""How the native module finds torch, and that it is not used if anything in torch is different.

The module is connected again after each test that changes torch.
"""

from __future__ import annotations

import ast
import ctypes
import gc
import os
import re
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from ctypes import c_bool, c_int32, c_int64, c_uint64, c_void_p, py_object
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import paramstats
from paramstats._core import backend as backends
from paramstats._core import torch_abi
from tests import oracle
from tests.conftest import run_python
from tools.fuzz.kinds import WithDispatch, WithFunction

Fallback = Callable[[str], None]


@pytest.fixture
def patch(native: backends.Implementation) -> Iterator[pytest.MonkeyPatch]:
    """Changes torch; connects the native module to the real one afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_extensions", None)
        patch.setattr(backends, "_active", None)
        patch.setattr(backends, "_explained", set())
        patch.delenv("PARAMSTATS_BACKEND", raising=False)
        yield patch
    assert torch_abi.connect(native.native) is None


@pytest.fixture
def falls_back(patch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fallback:
    """Check that torch operators are used for a reason, which matches a pattern."""

    def check(pattern: str) -> None:
        layer = nn.Linear(7, 5)
        layer.weight.grad = torch.randn(5, 7)
        with pytest.warns(RuntimeWarning, match="uses torch operators") as caught:
            summary = paramstats.summarize(layer)
        assert len(caught) == 1
        oracle.check(summary["weight"], layer.weight)
        oracle.check(summary["bias"], layer.bias)
        oracle.check(summary["weight"].grad, layer.weight.grad)
        info = paramstats.backend()
        assert info.cpu == info.cuda == "reference" and info.missing in str(caught[0].message)
        introduction = f"the native backend cannot be used with torch {torch.__version__}: "
        assert info.missing.startswith(introduction) and "\n" not in info.missing
        assert re.search(pattern, info.missing.removeprefix(introduction)), info.missing
        with pytest.raises(RuntimeError, match=r"PARAMSTATS_BACKEND=native\), but ") as error:
            backends.choose("native")
        reasons = (
            re.sub(r"\d{6,}", "<address>", text) for text in (info.missing, str(error.value))
        )
        assert next(reasons) in next(reasons)
        assert capfd.readouterr().err == ""

    return check


# ---- functions ----------------------------------------------------------------------------------

DTYPE_FUNCTIONS = [f"aoti_torch_dtype_{name}" for name in torch_abi._DTYPES]
OFFICIAL = "torch_tensor_from_pyobject"  # torch 2.14
HAS_OFFICIAL = hasattr(ctypes.PyDLL(torch._C.__file__), OFFICIAL)
Make = Callable[[int], Any]
"""From the address of a function of torch to another function, which is used in its place."""


def replace_function(patch: pytest.MonkeyPatch, symbol: str, make: Make | None) -> None:
    """Let torch have another function of this name; None: let it have none."""

    class Library(ctypes.PyDLL):
        def __getitem__(self, name: str) -> Any:
            function = super().__getitem__(name)
            if name != symbol:
                return function
            if make is None:
                raise AttributeError(name)
            return make(ctypes.cast(function, c_void_p).value)

    patch.setattr(torch_abi.ctypes, "PyDLL", Library)


_kept: list[Any] = []
"""The functions and memory that C++ code may still use."""


def keep(thing: Any) -> Any:
    _kept.append(thing)
    return thing


GETTER = ctypes.PYFUNCTYPE(c_int32, c_void_p, c_void_p)


def getter(change: Callable[[int], object], error: int = 0) -> Make:
    """Return a function that changes the result at an address, and perhaps reports an error."""

    def make(address: int) -> Any:
        original = GETTER(address)

        def function(tensor: int, result: int) -> int:
            original(tensor, result)
            change(result)
            return error

        return keep(GETTER(function))

    return make


def add(kind: Any, difference: int) -> Make:
    def change(result: int) -> None:
        kind.from_address(result).value += difference

    return getter(change)


def change_array(result: int) -> None:
    """Let a pointer to a tensor's sizes or strides point to others."""
    pointer = c_void_p.from_address(result)
    others = keep((c_int64 * 5).from_buffer_copy((c_int64 * 5).from_address(pointer.value)))
    others[0] += 1
    pointer.value = ctypes.addressof(others)


def negate(address: int) -> Any:
    original = ctypes.PYFUNCTYPE(c_bool, c_void_p)(address)
    return keep(ctypes.PYFUNCTYPE(c_bool, c_void_p)(lambda tensor: not original(tensor)))


def returning(kind: Any, *arguments: Any, result: Any) -> Make:
    return lambda address: keep(ctypes.PYFUNCTYPE(kind, *arguments)(lambda *_: result))


OTHER = torch.zeros(2)
OTHER_POINTER = keep(c_void_p(OTHER._cdata))


def reference_to_another(address: int) -> Any:
    original = GETTER(address)
    return keep(GETTER(lambda _, out: original(ctypes.addressof(OTHER_POINTER), out)))


def another_tensor(_: int) -> Any:
    """Return a function that returns a tensor in place of an undefined one."""
    library = ctypes.PyDLL(torch._C.__file__)
    new = GETTER(ctypes.cast(library.aoti_torch_new_tensor_handle, c_void_p).value)
    other = ctypes.addressof(OTHER_POINTER)
    return keep(ctypes.PYFUNCTYPE(c_int32, c_void_p)(lambda out: new(other, out)))


def with_another_offset(address: int) -> Any:
    kind = ctypes.PYFUNCTYPE(c_int32, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p)
    original = kind(address)
    return keep(kind(lambda t, n, sizes, strides, _, out: original(t, n, sizes, strides, 1, out)))


CXX = {
    "grad": "_ZNK3c1010TensorImpl4gradEv",
    "requires_grad": "_ZNK3c1010TensorImpl13requires_gradEv",
    "is_leaf": "_ZNK2at10TensorBase7is_leafEv",
    "retains_grad": "_ZNK2at10TensorBase12retains_gradEv",
    "wrap": "_Z16THPVariable_WrapRKN2at10TensorBaseE",
}
OTHER_GRADIENT = r"torch's C\+\+ interface gave another gradient than Tensor\.grad"
OTHER_MEMORY = "torch's C interface made a tensor with other memory"
WRONG: dict[str, tuple[Make, str]] = {
    "aoti_torch_get_sizes": (getter(change_array), r"sizes of a tensor is \(3, 5\), .* \(4, 5\)"),
    "aoti_torch_get_strides": (getter(change_array), r"strides .* is \(5, 1\), .* gave \(6, 1\)"),
    "aoti_torch_get_dim": (add(c_int64, 1), r"sizes of a tensor is \(3, 5\), .* \(3, 5, \d+\)"),
    "aoti_torch_get_numel": (add(c_int64, 1), "numel of a tensor is 15, .* gave 16"),
    "aoti_torch_get_dtype": (add(c_int32, 1), r"torch\.float64 is dtype \d+ of a tensor, \d+ by"),
    "aoti_torch_get_device_type": (add(c_int32, 1), "device_type of a tensor is 0, .* gave 1"),
    "aoti_torch_get_device_index": (add(c_int32, 1), "device_index of a tensor is -1, .* gave 0"),
    "aoti_torch_get_storage_offset": (add(c_int64, 2), "storage_offset of a .* is 0, .* gave 2"),
    "aoti_torch_get_storage_size": (add(c_int64, -1), "storage_size of a .* is 60, .* gave 59"),
    "torch_get_const_data_ptr": (add(c_uint64, 4), r"data_ptr of a tensor is \d+, .* gave \d+"),
    "aoti_torch__reinterpret_tensor": (with_another_offset, OTHER_MEMORY),
    "aoti_torch_is_contiguous": (
        getter(lambda result: c_bool.from_address(result).__setattr__("value", False)),
        "is_contiguous of a tensor is True, .* gave False",
    ),
    "aoti_torch_assign_tensors": (reference_to_another, OTHER_MEMORY),
    "aoti_torch_new_uninitialized_tensor": (another_tensor, OTHER_GRADIENT),
    "torch_get_num_threads": (
        lambda _: keep(ctypes.PYFUNCTYPE(c_int32, c_void_p)(add_threads)),
        r"it has \d+ threads, and 1000 by its C interface",
    ),
    CXX["grad"]: (
        returning(c_void_p, c_void_p, result=ctypes.addressof(OTHER_POINTER)),
        OTHER_GRADIENT,
    ),
    CXX["requires_grad"]: (negate, "requires_grad of a tensor is False, .* gave True"),
    CXX["is_leaf"]: (negate, "is_leaf of a tensor is True, .* gave False"),
    CXX["retains_grad"]: (negate, "retains_grad of a tensor is False, .* gave True"),
    CXX["wrap"]: (returning(py_object, c_void_p, result=OTHER), OTHER_MEMORY),
}
"""For each function another one, and the reason for which the native module is then not used."""

NOT_COMPARED = {
    "aoti_torch_delete_tensor_object": "returns nothing that could be compared",
    "torch_parallel_for": "not needed for right results, and slow to try",
}


def add_threads(result: int) -> int:
    ctypes.c_uint32.from_address(result).value = 1000
    return 0


def test_each_function_has_a_wrong_one(native):
    assert {*WRONG, *NOT_COMPARED} == {*native.native.SYMBOLS}


SYMBOLS = [*WRONG, *NOT_COMPARED]


@pytest.mark.parametrize("symbol", [*SYMBOLS, *DTYPE_FUNCTIONS])
def test_a_missing_function_is_named(patch, falls_back, symbol):
    replace_function(patch, symbol, None)
    falls_back(rf"^it has no function {symbol}\. ")


@pytest.mark.parametrize("symbol", WRONG)
def test_a_function_with_wrong_results_is_noticed(patch, falls_back, symbol):
    make, reason = WRONG[symbol]
    replace_function(patch, symbol, make)
    falls_back(reason)


@pytest.mark.parametrize("symbol", [name for name in WRONG if name.startswith(("aoti", "torch_"))])
def test_a_function_that_reports_an_error_is_named(patch, falls_back, symbol):
    if symbol == "torch_get_num_threads":
        pytest.skip("1 thread is used, which may be right")
    arguments = 6 if "reinterpret" in symbol else 1 if "uninitialized" in symbol else 2
    replace_function(patch, symbol, returning(c_int32, *[c_void_p] * arguments, result=1))
    falls_back(f"^RuntimeError: {symbol} of torch reports an error")


@pytest.mark.parametrize("number", [-1, 127, 128, 1 << 30])
@pytest.mark.parametrize("symbol", DTYPE_FUNCTIONS)
def test_a_wrong_number_of_a_dtype_is_noticed(patch, falls_back, symbol, number):
    replace_function(patch, symbol, returning(c_int32, result=number))
    name = symbol.removeprefix("aoti_torch_dtype_")
    falls_back(rf"torch\.{name} is ({number}, not one of|dtype \d+ of a tensor, {number} by)")


def test_two_dtypes_with_one_number_are_noticed(patch, falls_back):
    library = ctypes.PyDLL(torch._C.__file__)
    replace_function(
        patch,
        "aoti_torch_dtype_int8",
        returning(c_int32, result=library.aoti_torch_dtype_uint8()),
    )
    falls_back(r"torch\.int8 is dtype \d+ of a tensor, \d+ by its name")


@pytest.mark.parametrize("symbol", NOT_COMPARED)
def test_other_errors_of_functions_do_not_change_results(patch, native, symbol):
    """Without torch's threads, the calling thread reads everything."""
    arguments = (
        [c_void_p] if "delete" in symbol else [c_int64, c_int64, c_int64, c_void_p, c_void_p]
    )
    replace_function(patch, symbol, returning(c_int32, *arguments, result=1))
    assert torch_abi.connect(native.native) is None
    x = torch.randn(3_000_000)
    oracle.check(paramstats.summarize({"x": x})["x"], x)


@pytest.mark.skipif(not HAS_OFFICIAL, reason="torch < 2.14 has no such function")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (returning(c_int32, c_void_p, c_void_p, result=1), f"{OFFICIAL} failed"),
        (returning(c_int32, c_void_p, c_void_p, result=0), f"{OFFICIAL} failed"),
        (
            lambda address: (
                lambda original: keep(GETTER(lambda _, out: original(id(OTHER), out)))
            )(GETTER(address)),
            f"{OFFICIAL} returned another C\\+\\+ object",
        ),
    ],
    ids=["error", "no result", "another tensor"],
)
def test_a_wrong_official_conversion_is_noticed(patch, falls_back, make, reason):
    replace_function(patch, OFFICIAL, make)
    falls_back(reason)


def test_the_official_conversion_may_be_missing(patch, native):
    replace_function(patch, OFFICIAL, None)
    assert torch_abi.connect(native.native) is None


# ---- offsets and dispatch keys ------------------------------------------------------------------


def other_pointer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.Tensor, "_cdata", property(lambda self: id(self)), raising=False)


def no_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch_abi, "Tensor", types.SimpleNamespace(__basicsize__=object.__basicsize__))


def same_everywhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.Tensor, "_cdata", property(lambda self: 5), raising=False)
    patch.setattr(torch_abi, "_word", lambda address: 5)


def keys_elsewhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch_abi, "_TENSOR_IMPL_SIZE", 16)


def raw_repr(make: Callable[[int], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    def change(patch: pytest.MonkeyPatch) -> None:
        original = torch._C.DispatchKeySet.raw_repr
        patch.setattr(torch._C.DispatchKeySet, "raw_repr", lambda self: make(original(self)))

    return change


def one_tensors_keys(patch: pytest.MonkeyPatch) -> None:
    keys = torch._C._dispatch_keys(OTHER)
    patch.setattr(torch._C, "_dispatch_keys", lambda tensor: keys)


NOT_FOUND = "the dispatch keys of a tensor were not found in its C"
NO_DIFFERENCE = "keys of a plain tensor do not differ from those of other tensors"
DIFFERENT: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "_cdata is another address": (other_pointer, "C.. object of a tensor was found at 0 offsets"),
    "a Python tensor has another size": (no_memory, "of a tensor was found at 0 offsets"),
    "the pointer is everywhere": (
        same_everywhere,
        r"of a tensor was found at ([2-9]|\d\d) offsets",
    ),
    "the keys are elsewhere": (keys_elsewhere, NOT_FOUND),
    "the keys are those of one tensor": (one_tensors_keys, NO_DIFFERENCE),
    "raw_repr is encoded": (raw_repr(lambda bits: bits * 5 % (1 << 64)), NOT_FOUND),
    "raw_repr is shifted": (raw_repr(lambda bits: bits >> 1), NOT_FOUND),
    "raw_repr is 0": (raw_repr(lambda bits: 0), NO_DIFFERENCE),
    "raw_repr is a constant": (raw_repr(lambda bits: 77), NO_DIFFERENCE),
    "raw_repr is text": (raw_repr(str), r"raw_repr\(\) is '\d+', not an integer of 64 bits"),
    "raw_repr is hexadecimal": (raw_repr(hex), r"is '0x.*', not an integer of 64 bits"),
    "raw_repr is huge": (raw_repr(lambda bits: bits << 70), r"is \d+, not an integer of 64 bits"),
    "raw_repr is negative": (raw_repr(lambda bits: -bits), r"is -\d+, not an integer of 64 bits"),
    "raw_repr is a float": (raw_repr(float), "is .*, not an integer of 64 bits"),
    "raw_repr is None": (raw_repr(lambda bits: None), "is None, not an integer of 64 bits"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_layout_of_tensors_is_noticed(patch, falls_back, name):
    change, reason = DIFFERENT[name]
    change(patch)
    falls_back(reason)


# ---- private names ------------------------------------------------------------------------------

KEYS = ("AutogradFunctionality", "ADInplaceOrView", "Python", "PythonTLSSnapshot", "CPU", "CUDA")
PRIVATE = [
    *("_C.__file__", "_C.DispatchKey", "_C.DispatchKeySet", "_C._dispatch_keys"),
    *("_C.DispatchKeySet.raw_repr", *(f"_C.DispatchKey.{key}" for key in KEYS)),
]


def place_of(name: str) -> tuple[Any, str]:
    place: Any = torch
    *places, last = name.split(".")
    for part in places:
        place = getattr(place, part)
    return place, last


@pytest.mark.parametrize("name", PRIVATE)
def test_a_missing_private_name_is_named(patch, falls_back, name):
    place, last = place_of(name)
    patch.delattr(place, last)
    falls_back(rf"^AttributeError: .*{last}")


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_may_be_anything(patch, falls_back, name):
    place, last = place_of(name)
    patch.setattr(place, last, 3)
    falls_back("^[A-Za-z]+: ")


def test_a_missing_pointer_is_named(patch, falls_back):
    def missing(self: object) -> None:
        raise AttributeError("no attribute '_cdata'")

    patch.setattr(torch.Tensor, "_cdata", property(missing), raising=False)
    falls_back("^AttributeError: .*_cdata")


@pytest.mark.parametrize("key", ["AutocastHPU", "MTIA", "SparseCsr", "ZeroTensor"])
def test_keys_of_other_devices_may_be_missing(patch, native, key):
    patch.delattr(torch._C.DispatchKey, key)
    assert torch_abi.connect(native.native) is None


def test_private_names_are_read_only_within_functions():
    """So `import paramstats` works also if they are missing."""
    tree = ast.parse(Path(torch_abi.__file__).read_text())
    functions = (ast.FunctionDef, ast.Lambda)

    def outside(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            yield child
            if not isinstance(child, functions):
                yield from outside(child)
            else:  # defaults and decorators are evaluated when the function is defined
                yield from ast.walk(child.args)
                for decorator in getattr(child, "decorator_list", ()):
                    yield from ast.walk(decorator)

    for node in outside(tree):
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), f"line {node.lineno}: {node.attr}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            assert node.module == "torch" and {n.name for n in node.names} == {"Tensor", "nn"}


def test_without_any_of_these_names_the_import_works(native):
    code = f"""
import torch
for name in {["_C._dispatch_keys", "_C.DispatchKeySet", "_C.DispatchKey"]}:
    exec(f"del torch.{{name}}")
import paramstats
assert paramstats.summarize({{"x": torch.tensor([3.0, 4.0])}})["x"].norm == 5.0
print(paramstats.backend().missing)
"""
    result = run_python("-W", "ignore", "-c", code)
    assert result.returncode == 0, result.stderr
    assert "AttributeError: module 'torch._C' has no attribute 'DispatchKey'" in result.stdout
    assert result.stderr == ""


# ---- the thread that connects -------------------------------------------------------------------


def test_a_thread_that_does_not_start_is_a_reason(patch, falls_back):
    def start(self: object) -> None:
        raise RuntimeError("can't start new thread")

    patch.setattr(threading.Thread, "start", start)
    falls_back(r"the thread .* could not be started \(can't start new thread\)")


def test_a_thread_that_fails_is_a_reason(patch, falls_back):
    """E.g. the trace function of a debugger raises an exception."""
    patch.setattr(threading, "excepthook", lambda error: None)
    patch.setattr(threading.Thread, "run", lambda self: 1 / 0)
    falls_back("^the thread that compares it with torch has failed")


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError])
def test_any_exception_while_connecting_is_a_reason(patch, falls_back, error):
    def fail(*_: object) -> None:
        raise error("stopped here")

    patch.setattr(torch_abi, "_probes", fail)
    falls_back(rf"^{error.__name__}: stopped here")


def test_an_interrupted_import_can_be_repeated(native):
    """Ctrl-C arrives while the main thread waits for the thread that connects."""
    code = """
import _thread, torch
original = torch._C._dispatch_keys
def interrupting(tensor):
    torch._C._dispatch_keys = original
    _thread.interrupt_main()
    return original(tensor)
torch._C._dispatch_keys = interrupting
try:
    import paramstats
except KeyboardInterrupt:
    print("interrupted")
import paramstats
assert paramstats.summarize({"x": torch.tensor([3.0, 4.0])})["x"].norm == 5.0
print(paramstats.backend().cpu)
"""
    result = run_python("-c", code)
    assert result.stdout.split() == ["interrupted", "native"], result.stderr


def test_a_plugin_of_torch_can_import(native, tmp_path):
    """torch loads it before its own import has ended: another thread cannot import torch then."""
    info = tmp_path / "plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nplugin = plugin:load\n")
    (tmp_path / "plugin.py").write_text(
        "def load():\n    import paramstats\n    print(paramstats.backend().cpu)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = run_python("-c", "import torch", PYTHONPATH=path)
    assert (result.stdout, result.stderr) == ("native\n", "")


def test_the_thread_that_connects_imports_nothing(native):
    """It would wait forever for a module that the importing thread is importing."""
    code = """
import builtins, threading, torch
original, imported = builtins.__import__, []
def record(name, *args, **kwargs):
    if threading.current_thread() is not threading.main_thread():
        imported.append(name)
    return original(name, *args, **kwargs)
builtins.__import__ = record
import paramstats
print(paramstats.backend().cpu, imported)
"""
    result = run_python("-c", code)
    assert result.stdout == "native []\n", result.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_can_import(native):
    """Its parent used torch's threads, and the child has none of them."""
    code = """
import os, torch
torch.ones(1 << 22).sum()
child = os.fork()
import paramstats
assert paramstats.backend().cpu == "native"
assert paramstats.summarize({"x": torch.ones(3)})["x"].count == 3
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    result = run_python("-W", "ignore::DeprecationWarning", "-c", code)
    assert (result.returncode, result.stderr) == (0, "")


# ---- metadata -----------------------------------------------------------------------------------

GRADIENT = torch.ones(3)


def with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    tensor.grad = GRADIENT
    return tensor


PLAIN = {
    "a view": lambda: torch.randn(4, 6)[1:3, ::2],
    "expanded": lambda: torch.randn(4, 1).expand(4, 6),
    "six dimensions": lambda: torch.randn(1, 2, 3, 1, 2, 3).permute(5, 4, 3, 2, 1, 0),
    "empty": lambda: torch.empty(0, 4),
    "a scalar": lambda: torch.tensor(3.0),
    "complex": lambda: torch.randn(3, dtype=torch.cfloat),
    "a parameter": lambda: with_gradient(nn.Parameter(torch.randn(3))),
    "no leaf": lambda: nn.Parameter(torch.randn(3)) * 2,
    "an inference tensor": lambda: torch.inference_mode()(torch.randn)(5),
    "shared": lambda: torch.randn(3).share_memory_(),
    "copy on write": lambda: torch._lazy_clone(torch.randn(4)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_metadata_is_that_of_torch(native, name):
    tensor = PLAIN[name]()
    torch_abi._check_metadata(native.native, tensor)
    is_cow = torch._C._is_cow_tensor(tensor)
    alias = native.native.alias(tensor)
    assert torch._C._is_cow_tensor(tensor) == is_cow
    assert alias is not tensor and not alias.requires_grad
    assert alias.untyped_storage()._cdata == tensor.untyped_storage()._cdata


# ---- tensors of other kinds ---------------------------------------------------------------------


def symbolic() -> torch.Tensor:
    """Return a FakeTensor with symbolic sizes."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    return mode.from_tensor(torch.randn(5, 7))


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


def freed() -> torch.Tensor:
    x = torch.ones(1000)
    x.untyped_storage().resize_(0)
    return x


def too_small() -> torch.Tensor:
    x = torch.ones(1000)
    x.untyped_storage().resize_(16)
    return x


def functional() -> torch.Tensor:
    return torch._to_functional_tensor(torch.ones(3))


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "conj": lambda: torch.randn(3, dtype=torch.cfloat).conj(),
    "negative": lambda: torch.randn(3, dtype=torch.cfloat).conj().imag,
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
    "fake": fake,
    "symbolic sizes": symbolic,
    "functional": functional,
    "freed storage": freed,
    "too small a storage": too_small,
    "meta": lambda: torch.ones(3, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.rand(9), 0.1, 3, torch.qint8),
    "mkldnn": lambda: torch.ones(3).to_mkldnn(),
    "zero tensor": lambda: torch._efficientzerotensor(3),
    "copy on write": lambda: torch._lazy_clone(torch.ones(5)),
    "named": lambda: torch.ones(3, names=("n",)),
    "subclass with dispatch": lambda: WithDispatch(torch.ones(3)),
    "subclass with function": lambda: torch.ones(3).as_subclass(WithFunction),
    "inference": lambda: torch.inference_mode()(torch.ones)(5),
    "lazy": lambda: nn.LazyLinear(3).weight,
    "float4": lambda: torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "complex": lambda: torch.ones(3, dtype=torch.cfloat),
    "quint4x2": lambda: torch.empty(4, dtype=torch.uint8).view(torch.bits8),
}


def use(native: backends.Implementation, tensor: torch.Tensor) -> None:
    """Read a tensor in every way that reaches the native module."""
    module, buffers = nn.Module(), nn.Module()
    module._parameters["x"] = tensor  # type: ignore[assignment]
    buffers.register_buffer("x", tensor)
    for source in ({"x": tensor}, module):
        paramstats.summarize(source)
        paramstats.summarize(source, params=False)
    paramstats.summarize(buffers, buffers=True)
    _, deferred, *_ = native.read([tensor], True, True)
    assert not deferred or deferred[0][1] is tensor


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_torch_prints_no_error_for_any_tensor(native, capfd, name):
    """torch 2.10 and 2.11 print each error of the C interface."""
    try:
        tensor = ODD[name]()
    except (RuntimeError, AttributeError, TypeError) as error:
        pytest.skip(f"this torch has no such tensor: {error}")
    capfd.readouterr()
    use(native, tensor)
    assert capfd.readouterr().err == ""


def in_vmap(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.vmap(function)(torch.ones(2, 3))


def in_grad(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.func.grad(lambda x: function(x).sum())(torch.ones(3))


def in_jvp(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.func.jvp(function, (torch.ones(3),), (torch.ones(3),))


def in_functionalize(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.func.functionalize(function)(torch.ones(3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", [in_vmap, in_grad, in_jvp, in_functionalize])
def test_torch_prints_no_error_for_wrapped_tensors(native, capfd, transform):
    capfd.readouterr()

    def function(x: torch.Tensor) -> torch.Tensor:
        use(native, x)
        return x * 2

    transform(function)
    assert capfd.readouterr().err == ""


def test_torch_prints_nothing_at_import(native):
    result = run_python("-c", "import paramstats; print(paramstats.backend().cpu)")
    assert (result.stdout, result.stderr) == ("native\n", "")


# ---- lifetimes ----------------------------------------------------------------------------------


def deferred_model() -> nn.Module:
    """Return a module whose parameter and gradient are both deferred, and read otherwise."""
    module = nn.Module()
    module.register_parameter("x", nn.Parameter(torch.randn(4, dtype=torch.cfloat)))
    module.x.grad = torch.randn(4, dtype=torch.cfloat)
    return module


def test_deferred_rows_are_the_same_objects(native):
    x = deferred_model().x
    grad = x.grad
    _, deferred, *_ = native.read([x, x], True, True)
    assert [(row, id(tensor)) for row, tensor in deferred] == [
        *((0, id(x)), (2, id(grad)), (1, id(x)), (3, id(grad)))
    ]


def test_a_gradient_without_a_python_object_gets_one(native):
    """Its object, made by the module, is the one that `.grad` returns afterwards."""
    x = nn.Parameter(torch.randn(4, dtype=torch.cfloat))
    (x * x).abs().sum().backward()
    _, deferred, *_ = native.read([x], True, True)
    assert deferred[1][1] is x.grad and deferred[0][1] is x


def counts(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    """Return the references to each Python object and to each storage."""
    count = torch._C._storage_Use_Count  # type: ignore[attr-defined]
    return [(sys.getrefcount(t), count(t.untyped_storage()._cdata)) for t in tensors]


def test_references_do_not_grow(native):
    """The module owns tensors during a call only."""
    module = deferred_model()
    plain = with_gradient(nn.Parameter(torch.randn(3)))
    large = torch.randn(10_000_000)  # the storage is kept while the GIL is released
    inner = plain * 2
    inner.retain_grad()
    inner.sum().backward()
    tensors = [module.x, module.x.grad, plain, plain.grad, large, inner, inner.grad]
    before = counts(tensors)
    for i in range(300):
        native.read(tensors if i % 30 == 0 else [t for t in tensors if t is not large], True, True)
        native.native.metadata(plain)
        native.native.metadata(inner)
        native.native.alias(plain)
        paramstats.summarize(module)
    assert counts(tensors) == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc")
def test_memory_does_not_grow(native):
    module = deferred_model()
    plain = with_gradient(nn.Parameter(torch.randn(3)))

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def call() -> None:
        native.read([module.x, plain], True, True)
        native.native.metadata(plain)
        native.native.alias(plain)

    for _ in range(10_000):
        call()
    before = resident()
    for _ in range(10_000):
        call()
    assert resident() - before < 10_000 * 16, (
        "bytes; the smallest leak is an at::Tensor on the heap"
    )


def test_a_deferred_tensor_is_freed_with_its_last_reference(native):
    x = torch.randn(3, dtype=torch.cfloat)
    alive = weakref.ref(x)
    _, deferred, *_ = native.read([x], True, True)
    del x
    assert alive() is deferred[0][1]
    del deferred
    assert alive() is None


# ---- the GIL ------------------------------------------------------------------------------------

MIB = 1 << 20


def ticks_during(call: Callable[[], object], calls: int) -> int:
    """Return how often another Python thread ran during up to `calls` calls, which it may stop."""
    ticks, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0)  # releases the GIL

    thread = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # threads run until they release the GIL by themselves
    try:
        thread.start()
        before = ticks[0]
        for _ in range(calls):
            call()
            if ticks[0] != before:
                break
        return ticks[0] - before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()


SMALL_READS = {
    "31 MiB": lambda: [torch.ones(31 * MIB // 4)],
    "3,000 tensors of 12 KiB": lambda: list(torch.ones(3000, 3 << 10)),
}
LARGE_READS = {
    "33 MiB": lambda: [torch.ones(33 * MIB // 4)],
    "600 tensors of 64 KiB": lambda: list(torch.ones(600, (64 << 10) // 4 + 1)),
}


@pytest.mark.parametrize("name", SMALL_READS)
def test_a_short_read_keeps_the_gil(native, name):
    """It is faster, because the storages need not be kept alive."""
    tensors = SMALL_READS[name]()
    assert ticks_during(lambda: native.read(tensors, True, True), 3) == 0


@pytest.mark.parametrize("name", LARGE_READS)
def test_a_long_read_lets_other_threads_run(native, name):
    tensors = LARGE_READS[name]()
    assert ticks_during(lambda: native.read(tensors, True, True), 1000) > 0


@pytest.fixture
def during_reads(patch: pytest.MonkeyPatch, native) -> Iterator[Callable[[Any], None]]:
    """Let a function run in the middle of each read that uses threads."""
    threads = torch.get_num_threads()

    def set_function(function: Callable[[], object]) -> None:
        def parallel_for(*_: int) -> int:
            function()
            return 1  # so the calling thread reads everything afterwards

        kind = ctypes.PYFUNCTYPE(c_int32, c_int64, c_int64, c_int64, c_void_p, c_void_p)
        replace_function(patch, "torch_parallel_for", lambda _: keep(kind(parallel_for)))
        assert torch_abi.connect(native.native) is None

    torch.set_num_threads(2)
    yield set_function
    torch.set_num_threads(threads)


def test_a_long_read_survives_changes_by_another_thread(native, during_reads):
    """A dropped gradient and replaced data are freed after the read.

    To resize a storage during the read is an error, as it is during an operator of torch.
    """
    n = 5 * MIB
    parameters = [nn.Parameter(torch.full((n,), 2.0)) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.full((n,), 3.0)
    storages = [weakref.ref(p.grad.untyped_storage()) for p in parameters]
    called = []

    def change() -> None:
        called.append(True)
        for parameter in parameters:
            parameter.grad = None
            parameter.data = torch.full((n,), 5.0)
        parameters.clear()
        gc.collect()

    during_reads(change)
    summary = paramstats.summarize([(f"{i}", p) for i, p in enumerate(parameters)])
    assert called == [True] and len(storages) == 4
    for entry in summary.values():
        assert (entry.min, entry.mean, entry.max) == (2.0, 2.0, 2.0)
        assert (entry.grad.min, entry.grad.mean, entry.grad.max) == (3.0, 3.0, 3.0)
