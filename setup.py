"""Builds the native backends with the tools and headers of the installed torch.

Two extensions are built: `_native` (CPU) and `_cuda` (CUDA). Both are optional. Without a C++
compiler, the package is installed as pure Python. Without nvcc, or with a torch that has no CUDA,
only `_cuda` is left out. The result is written to `paramstats/_build.json`, and
`paramstats.backend()` reports it. Without torch, the build fails, because pip shows nothing of a
build that succeeds. docs/install.md lists the environment variables.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def files(*patterns):
    found = {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(found)


CUDA_SOURCES = ["csrc/cuda_binding.cpp", "csrc/cuda/engine.cu"]
SOURCES = [file for file in files("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/cuda/*.cpp") if file not in CUDA_SOURCES]
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
    """Which backends were built, for which torch, and why a backend is missing."""

    def __init__(self):
        self.values = {
            "native": False,
            "reason": "",
            "cuda": False,
            "cuda_reason": "",
            "cuda_architectures": None,
        }
        self.no_torch = ""  # why torch cannot be imported; "" if it can

    def failed(self, backend, reason):
        """Record why `backend` ("native" or "cuda") was not built; exit if the build is strict."""
        self.values["reason" if backend == "native" else "cuda_reason"] = reason
        if STRICT:
            sys.exit(f"paramstats: PARAMSTATS_STRICT_BUILD is set and {reason}")
        print(f"paramstats: installing without the {backend} backend: {reason}", file=sys.stderr)

    def save(self, package):
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(self.values, indent=2) + "\n")


def nvcc_in(home):
    return str(Path(home) / "bin/nvcc")


def cuda_home():
    """Return the folder of the CUDA toolkit, or None if there is none.

    torch assumes that the nvcc on the PATH is inside the toolkit. This fails if that nvcc is a
    wrapper script. Therefore nvcc itself is asked, with --dryrun.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return os.environ[variable] if shutil.which(nvcc_in(os.environ[variable])) else None
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    dryrun = subprocess.run(  # noqa: S603 - nvcc as found in the environment
        [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    folder = re.search(r"_HERE_=(\S+)", dryrun.stderr)
    return str(Path(folder.group(1) if folder else Path(nvcc).resolve().parent).parent)


def cuda_architectures(home):
    """Return (names of the architectures, flags for nvcc).

    If TORCH_CUDA_ARCH_LIST is set, torch adds the flags, so they are empty here. Otherwise the
    extension contains code for the first architecture of each generation that nvcc knows from
    sm_75 on (it also runs on later ones of that generation), and PTX of the newest for later GPUs.
    """
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if requested:
        return requested, []
    known = subprocess.run(  # noqa: S603 - nvcc as found in the environment
        [nvcc_in(home), "--list-gpu-arch"], capture_output=True, text=True, check=True
    )
    numbers = sorted(int(n) for n in re.findall(r"compute_(\d+)", known.stdout) if int(n) >= 75)
    firsts = [n for n in numbers if n == min(m for m in numbers if m // 10 == n // 10)]
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in firsts]
    flags.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    return " ".join(f"sm_{n}" for n in firsts) + f" compute_{numbers[-1]}", flags


def first_line(error):
    """Return the type and the first line of an exception.

    torch raises some exceptions with a format string and its values as separate arguments.
    """
    text = str(error)
    if len(error.args) > 1 and isinstance(error.args[0], str):
        with contextlib.suppress(TypeError, ValueError):
            text = error.args[0] % error.args[1:]
    return f"{type(error).__name__}: {text}".strip().splitlines()[0]


def cuda_extension(record, torch):
    """Return the extension of the CUDA backend, or None if it cannot be built.

    It is a separate module: if it does not load, the CPU backend still does.
    """
    home = cuda_home()
    if torch.version.cuda is None or home is None:
        record.values["cuda_reason"] = (
            f"it was built with torch {torch.__version__}, which has no CUDA"
            if torch.version.cuda is None
            else "nvcc was not found at build time, neither on the PATH nor through CUDA_HOME"
        )
        return None
    os.environ["CUDA_HOME"] = home  # torch.utils.cpp_extension reads it when it is imported
    try:
        from torch.utils.cpp_extension import CUDAExtension

        record.values["cuda_architectures"], flags = cuda_architectures(home)
        extension = CUDAExtension(
            "paramstats._cuda",
            CUDA_SOURCES,
            include_dirs=pybind11_include(),
            depends=HEADERS,
            extra_compile_args={
                "cxx": COMPILE_ARGS,
                "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden", *flags],
            },
        )
    except Exception as error:
        record.failed("cuda", f"it could not be compiled ({first_line(error)})")
        return None
    extension.libraries = ["cudart"]  # it does not use torch; only _native does
    return extension


def extensions(record):
    """Return (ext_modules, build_ext command); ([], None) if no build can be tried."""
    if NO_NATIVE:
        record.failed("native", "PARAMSTATS_NO_NATIVE was set")
        return [], None
    try:
        torch = import_torch()
        cuda = cuda_extension(record, torch)
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except Exception as error:  # a broken torch may raise anything
        record.no_torch = NO_TORCH.format(python=sys.executable, error=first_line(error))
        return [], None

    class OptionalBuildExtension(BuildExtension):
        """Build each extension separately; if one fails, record the reason and go on.

        torch raises many types of exceptions if a build fails, and setuptools may swallow them.
        Therefore a build counts as successful if the library file exists afterwards.
        """

        def run(self):
            inplace, compiler = self.inplace, self.compiler  # run() changes both
            package = Path(self.get_finalized_command("build_py").get_package_dir("paramstats"))
            if not inplace:
                package = Path(self.build_lib) / "paramstats"
            all_extensions, built = self.extensions, []
            for extension in all_extensions:
                backend = extension.name.rpartition("._")[2]
                self.extensions, self.inplace, self.compiler = [extension], inplace, compiler
                paths = [
                    Path(self.get_ext_fullpath(extension.name)),
                    Path(self.build_lib) / self.get_ext_filename(extension.name),
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
                    record.values[backend] = True
                    built.append(extension)
                else:
                    record.failed(
                        backend, f"it could not be compiled ({error}; pip install -v . shows more)"
                    )
            all_extensions[:] = built  # later commands must not look for the other libraries
            self.extensions = all_extensions
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
    return [native, *([cuda] if cuda else [])], OptionalBuildExtension


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
