"""Builds the native backend with the tools and headers of the installed torch.

It consists of the extension `_native` and, if torch has CUDA, of the CUDA kernels, which nvcc or
NVRTC compiles to cubins. Without a C++ compiler, the package is installed as pure Python. Without
cubins, the kernels are compiled at run time. `paramstats/_build.json` says what was built and why
something is missing; `paramstats.backend()` reports why the extension is. Without torch, the build
fails, because pip shows nothing of a build that succeeds. docs/install.md lists the environment
variables.
"""

import contextlib
import json
import os
import shlex
import shutil
import site
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # pip does not add it
from tools import cubins  # noqa: E402


def files(*patterns):
    found = {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(found)


SOURCES = files("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/cuda/*.cpp")
HEADERS = files("csrc/*.h", "csrc/cpu/*.h", "csrc/cuda/*.h")
COMPILE_ARGS = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
COMPILE_ARGS += shlex.split(os.environ.get("PARAMSTATS_CFLAGS", ""))
STRICT = os.environ.get("PARAMSTATS_STRICT_BUILD", "0") not in ("", "0")
OLDEST_TORCH = (2, 10)
NO_TORCH = """
paramstats: compiling needs torch >= 2.10, and {python} imports none: {error}
  - Without torch: run pip install "torch>=2.10", then this command again.
  - With torch that this build does not see, as with uv or PYTHONPATH: install "setuptools>=77",
    ninja and pybind11, then run this command again with --no-build-isolation.
  - Without the native backend: set PARAMSTATS_NO_NATIVE=1. Everything works, but slower.
"""
NO_NATIVE = os.environ.get("PARAMSTATS_NO_NATIVE", "0") not in ("", "0")


def import_torch():
    """Import the user's torch, also under pip's build isolation.

    pip hides the user's packages during a build, but runs the user's interpreter, whose folders of
    packages are still known. addsitedir also adds the folders that .pth files in them name. If
    torch were a build requirement, pip would download another one.
    """
    try:
        import torch
    except ImportError:
        for folder in [*site.getsitepackages(), site.getusersitepackages()]:
            site.addsitedir(folder)
        import torch
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise ImportError(f"torch {torch.__version__} is too old")
    return torch


def pybind11_include():
    """Return the include path of pybind11; [] if it is missing, since torch bundles a copy."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


class BuildRecord:
    """What was built, and why something is missing."""

    def __init__(self):
        self.values = {"native": False, "reason": "", "cuda_compiler": "", "cuda_reason": ""}
        self.no_torch = ""  # why torch cannot be imported; "" if it can

    def failed(self, what, key, reason):
        """Record under `key` why `what` was not built; exit if the build is strict."""
        self.values[key] = reason
        if STRICT:
            sys.exit(f"paramstats: PARAMSTATS_STRICT_BUILD is set and {reason}")
        print(f"paramstats: installing without {what}: {reason}", file=sys.stderr)

    def write_kernels(self, package, torch):
        """Write the CUDA kernels into the package: the source, and cubins if torch has CUDA."""
        from torch.utils.cpp_extension import CUDA_HOME

        try:
            built = cubins.build(package / "kernels", CUDA_HOME, torch.version.cuda)
            self.values["cuda_compiler"], self.values["cuda_reason"] = built
        except (OSError, cubins.nvrtc.CompileError) as error:
            reason = f"the CUDA kernels could not be compiled ({first_line(error)})"
            self.failed("compiled CUDA kernels", "cuda_reason", reason)

    def save(self, package):
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(self.values, indent=2) + "\n")


def first_line(error):
    """Return the type and the first line of an exception.

    torch raises some exceptions with a format string and its values as separate arguments.
    """
    text = str(error)
    if len(error.args) > 1 and isinstance(error.args[0], str):
        with contextlib.suppress(TypeError, ValueError):
            text = error.args[0] % error.args[1:]
    return f"{type(error).__name__}: {text}".strip().splitlines()[0]


def extensions(record):
    """Return (ext_modules, build_ext command); ([], None) if no build can be tried."""
    if NO_NATIVE:
        record.failed("the native backend", "reason", "PARAMSTATS_NO_NATIVE was set")
        return [], None
    try:
        torch = import_torch()
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except Exception as error:  # a broken torch may raise anything
        record.no_torch = NO_TORCH.format(python=sys.executable, error=first_line(error))
        return [], None

    class OptionalBuildExtension(BuildExtension):
        """Build the extension and the kernels; if one fails, record the reason and go on.

        torch raises many types of exceptions if a build fails, and setuptools may swallow them.
        Therefore a build counts as successful if the library file exists afterwards.
        """

        def run(self):
            package = Path(self.get_finalized_command("build_py").get_package_dir("paramstats"))
            if not self.inplace:
                package = Path(self.build_lib) / "paramstats"
            paths = [
                Path(self.get_ext_fullpath(native.name)),
                Path(self.build_lib) / self.get_ext_filename(native.name),
            ]
            for path in paths:  # remove an earlier build, perhaps for another torch
                path.unlink(missing_ok=True)
            error = "the compiler made no library"
            compiler_path, *_ = shlex.split(os.environ.get("CXX", "c++")) or [""]
            try:
                super().run()
            except (Exception, SystemExit) as e:
                error = first_line(e)
            if shutil.which(compiler_path) is None:
                error = f"no C++ compiler {compiler_path!r}: install g++ or clang, or set CXX"
            if any(path.exists() for path in paths):
                record.values["native"] = True
                record.write_kernels(package, torch)
            else:
                reason = f"it could not be compiled ({error}; pip install -v . shows more)"
                record.failed("the native backend", "reason", reason)
                self.extensions.clear()  # later commands must not look for the library
            record.save(package)

    native = CppExtension(
        "paramstats._native",
        SOURCES,
        include_dirs=pybind11_include(),
        depends=HEADERS,
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=[] if sys.platform == "darwin" else ["-Wl,--as-needed"],
    )
    native.libraries = []  # torch's functions are found at run time (csrc/torch_abi.h)
    return [native], OptionalBuildExtension


record = BuildRecord()
ext_modules, build_ext = extensions(record)


class RecordedBuildPy(build_py):
    """Write the build record also if there is no extension, hence no build_ext, to do it.

    Every build runs this command, and a source archive, which needs no torch, does not.
    """

    def run(self):
        if record.no_torch:
            sys.exit(record.no_torch)
        super().run()
        if not ext_modules:
            package = Path(self.build_lib) / "paramstats"
            if self.editable_mode:
                package = ROOT / "paramstats"
            record.save(package)


setup(
    ext_modules=ext_modules,
    cmdclass={"build_py": RecordedBuildPy, **({"build_ext": build_ext} if build_ext else {})},
)
