"""Find the machine code (cubin) of the CUDA kernels for a GPU.

The sources, in this order:

1. a cubin of the package: paramstats/kernels/sm_*.cubin, which the build made;
2. the disk cache (`_core.cubin_cache`);
3. NVRTC, which comes with torch, compiles paramstats/kernels/kernels.cu. This takes some seconds.

NVRTC runs in a background thread, in which ctypes releases the GIL. The thread is not a daemon:
Python waits for it when the process exits, because a thread that still runs NVRTC while the process
frees its libraries can crash. A child of fork() has no such thread, and NVRTC may hold locks there.
So a child that was forked meanwhile does not compile. A separate process would avoid both, but it
needs a Python executable, which embedded interpreters lack, and fork(), which MPI forbids.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from paramstats._core import cubin_cache, nvrtc

FOLDER = Path(__file__).parent.parent / "kernels"
OLDEST = (7, 5)
_TEGRA = 87  # this GPU (Jetson Orin) runs only its own code, and others of its major version do not
_STACK_BYTES = 16 << 20  # NVRTC crashes in a thread with a stack of 64 KiB


class Image(NamedTuple):
    """The kernels for a GPU."""

    data: bytes
    """A cubin."""
    origin: str
    """Where it comes from, for example "cubin sm_90" or "compiled by NVRTC 13.0 for sm_103"."""


class NotYet(str):
    """The reason while the kernels are being compiled: ask again later."""

    __slots__ = ()


def available() -> tuple[str, ...]:
    """Return the architectures of the package's cubins, for example `("sm_75", "sm_80")`."""
    return tuple(f"sm_{number}" for number in _shipped())


def find(capability: tuple[int, int], wait: bool = False, shipped: bool = True) -> Image | str:
    """Return the kernels for a GPU, or the reason why there are none.

    The first call that needs NVRTC starts the compilation and returns `NotYet`, as do the following
    calls until it is done. Later calls return what it made, or why it failed: nothing is tried
    twice. No call raises an exception.

    Args:
        capability: the compute capability of the GPU, for example (9, 0).
        wait: return once the compilation is done.
        shipped: whether a cubin of the package may be returned.
    """
    compilation = _compilations.get(capability)
    if compilation is None:
        if capability < OLDEST:
            return "its compute capability {}.{} is below {}.{}".format(*capability, *OLDEST)
        best = _best(_shipped(), capability) if shipped else None
        if best is not None:
            with contextlib.suppress(OSError):
                return Image((FOLDER / f"sm_{best}.cubin").read_bytes(), f"cubin sm_{best}")
        # Without a lock, which a signal handler that interrupts this function could not take. If
        # several threads get here at once, setdefault returns the same object to all of them.
        compilation = _compilations.setdefault(capability, _Compilation(capability))
    return compilation.result(wait)


def _shipped() -> list[int]:
    return sorted(
        int(path.stem[3:]) for path in FOLDER.glob("sm_*.cubin") if path.stem[3:].isdigit()
    )


def _best(architectures: Iterable[int], capability: tuple[int, int]) -> int | None:
    """Return the highest architecture whose code runs on a GPU; None if there is none.

    Code runs on GPUs of the same major version and the same or a later minor version.
    """
    major, minor = capability
    own = 10 * major + minor
    fitting = [
        n for n in architectures if 10 * major <= n <= own and (n == _TEGRA) == (own == _TEGRA)
    ]
    return max(fitting, default=None)


class _Compilation:
    """The kernels for one compute capability: read from the cache or compiled by NVRTC."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._capability = capability
        self._result: Image | str | None = None
        self._thread: threading.Thread | None = None
        self._process = 0

    def result(self, wait: bool) -> Image | str:
        """Return the kernels or the reason. `find` describes it."""
        if self._result is None and self._thread is None:
            try:
                self._start()
            except Exception as error:
                self._fail(error)
        if self._thread is not None and self._process != os.getpid() and self._result is None:
            self._result = "this process was forked while its parent compiled the kernels"
        if self._thread is not None and self._result is None and wait:
            self._thread.join()
        return self._result or NotYet(f"{self._name()} are being compiled")

    def _start(self) -> None:
        """Read the cache; if it has nothing, start the thread."""
        compiler = nvrtc.find()
        architecture = _best(compiler.architectures, self._capability)
        if architecture is None:
            raise nvrtc.CompileError(
                f"{compiler} does not know this compute capability; install a newer torch, or set "
                f"{nvrtc.VARIABLE} to the path of a newer NVRTC"
            )
        source = (FOLDER / "kernels.cu").read_text()
        key = cubin_cache.key(source, nvrtc.OPTIONS, architecture, compiler.version)
        origin = f"compiled by {compiler} for sm_{architecture}"
        data = cubin_cache.load(key)
        if data is not None:
            self._result = Image(data, origin)
            return

        def compile_source() -> None:
            try:
                data = compiler.compile(source, architecture)
                cubin_cache.store(key, data)
                self._result = Image(data, origin)
            except Exception as error:
                self._fail(error)

        thread = threading.Thread(target=compile_source, name="paramstats-nvrtc", daemon=False)
        self._process = os.getpid()
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
        self._thread = thread

    def _fail(self, error: Exception) -> None:
        """Make the first line of an error and the first error in NVRTC's log the result."""
        first, *log = [line.strip() for line in str(error).splitlines()] or [repr(error)]
        errors = [line for line in log if "error" in line]
        reason = f"{self._name()} cannot be compiled: {': '.join([first, *errors[:1]])}"
        self._result = self._result or reason

    def _name(self) -> str:
        return "the kernels for its compute capability {}.{}".format(*self._capability)


_compilations: dict[tuple[int, int], _Compilation] = {}
