"""Compile CUDA source to cubins (machine code of GPUs) with NVRTC, NVIDIA's compiler library.

Standard library only: tools/cubins.py, and so setup.py, load this file by its path, without torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import sys
from collections.abc import Iterator

VARIABLE = "PARAMSTATS_NVRTC"
OPTIONS = ("--std=c++17",)
"""With these and `--gpu-architecture`, the same source and NVRTC give the same bytes."""
_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")


class CompileError(Exception):
    """NVRTC reported an error. The message contains its log."""


def find() -> Nvrtc:
    """Load the NVRTC library of the variable PARAMSTATS_NVRTC or, if it is not set, the first of:

    1. the library that is loaded in this process, as by `import torch` where torch has CUDA;
    2. those of NVIDIA's packages on `sys.path`, the newest first;
    3. those that the dynamic linker finds.

    Raises OSError if there is none; the message says why.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        try:
            return Nvrtc(chosen)
        except OSError as error:
            raise OSError(f"the NVRTC library of {VARIABLE} cannot be used: {error}") from None
    for path, mode in _candidates():
        with contextlib.suppress(OSError):
            return Nvrtc(path, mode)
    names = " or ".join(_NAMES)
    raise OSError(f"NVRTC was not found; set {VARIABLE} to the path of {names}, which CUDA has")


def _candidates() -> Iterator[tuple[str, int]]:
    for name in _NAMES:
        yield name, ctypes.DEFAULT_MODE | os.RTLD_NOLOAD
    for name in _NAMES:
        for folder in sys.path:
            for path in glob.glob(os.path.join(glob.escape(folder), "nvidia/*/lib", name)):
                yield path, ctypes.DEFAULT_MODE
    for name in _NAMES:
        yield name, ctypes.DEFAULT_MODE


class Nvrtc:
    """A loaded NVRTC library.

    Args:
        path: path or name of the library, as dlopen accepts it.
        mode: flags of dlopen, for example `os.RTLD_NOLOAD`.

    Raises OSError if the library does not load, is not NVRTC, or is older than 11.2.
    """

    def __init__(self, path: str, mode: int = ctypes.DEFAULT_MODE) -> None:
        self._library = ctypes.CDLL(path, mode)
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        try:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
            self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
            numbers = (ctypes.c_int * count.value)()
            self._call("nvrtcGetSupportedArchs", numbers)
        except (AttributeError, CompileError) as error:
            raise OSError(f"{path} is no usable NVRTC: {error}") from None
        self.version = f"{major.value}.{minor.value}"
        if os.sep in path:
            # Some versions look for their second library in the system's folders only. A library
            # that is loaded is found by its name.
            builtins = f"{os.path.dirname(path)}/libnvrtc-builtins.so.{self.version}"
            with contextlib.suppress(OSError):
                ctypes.CDLL(builtins)
        self.architectures = tuple(sorted(numbers))
        """What it compiles for, as `10 * major + minor` of the compute capability."""

    def __str__(self) -> str:
        return f"NVRTC {self.version}"

    def compile(self, source: str, architecture: int) -> bytes:
        """Return the cubin of a self-contained CUDA source.

        Other threads run meanwhile. Several threads may compile at once.

        Args:
            source: CUDA C++ without includes of files.
            architecture: one of `architectures`, for example 90.

        Raises CompileError, with NVRTC's log.
        """
        options = [f"--gpu-architecture=sm_{architecture}".encode()]
        options += [option.encode() for option in OPTIONS]
        arguments = (ctypes.c_char_p * len(options))(*options)
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram",
            *(ctypes.byref(program), source.encode(), b"kernels.cu", ctypes.c_int(0), None, None),
        )
        try:
            try:
                self._call("nvrtcCompileProgram", program, ctypes.c_int(len(options)), arguments)
            except CompileError as error:
                log = self._read("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
                raise CompileError(f"{error}\n{log}".strip()) from None
            return self._read("CUBIN", program)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _read(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = self._library.nvrtcGetErrorString(ctypes.c_int(status)) or b"unknown error"
            raise CompileError(f"{name}: {text.decode(errors='replace')} ({status})")
