"""Builds the native backends against the torch that is installed, or does without them.

The backends are accelerators: where the CPU's cannot be built (no compiler, no torch at build time),
the package installs as pure Python; where CUDA's cannot (no nvcc, a torch without CUDA), without
that; `paramstats.backend()` says why. PARAMSTATS_STRICT_BUILD=1 makes
a failure an error; PARAMSTATS_NO_NATIVE=1 does not try.
"""

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def files(*patterns):
    found = {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(found)


CUDA_SOURCES = ["csrc/cuda_binding.cpp", "csrc/cuda/engine.cu"]
SOURCES = [file for file in files("csrc/*.cpp", "csrc/cpu/*.cpp") if file not in CUDA_SOURCES]
HEADERS = files("csrc/*.h", "csrc/cpu/*.h", "csrc/cuda/*.h")
COMPILE_ARGS = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
COMPILE_ARGS += shlex.split(os.environ.get("PARAMSTATS_CFLAGS", ""))
STRICT = os.environ.get("PARAMSTATS_STRICT_BUILD", "0") not in ("", "0")
UNWANTED = os.environ.get("PARAMSTATS_NO_NATIVE", "0") not in ("", "0")


def import_torch():
    """torch, also from under pip's build isolation.

    pip builds in an environment of its own that hides the user's site-packages but runs the user's
    interpreter, so they are still found by their path. Listing torch as a build requirement would
    build against another torch than the one the backend is to run with.
    """
    try:
        import torch
    except ImportError:
        paths = sysconfig.get_paths()
        sys.path += [paths["purelib"], paths["platlib"], site.getusersitepackages()]
        import torch
    return torch


class Outcome:
    """What became of the backends; the installed package reads it to explain itself."""

    def __init__(self):
        self.record = {
            "native": False,
            "reason": "",
            "torch": None,
            "cuda": False,
            "cuda_reason": "",
            "cuda_architectures": None,
            "compiler": os.environ.get("CXX", "c++"),
            "machine": platform.machine(),
        }

    def failed(self, backend, reason):
        """`backend`, "native" or "cuda", could not be built."""
        self.record["reason" if backend == "native" else "cuda_reason"] = reason
        if STRICT:
            sys.exit(f"paramstats: PARAMSTATS_STRICT_BUILD is set and {reason}")
        print(f"paramstats: installing without the {backend} backend: {reason}", file=sys.stderr)

    def save(self, package):
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(self.record, indent=2) + "\n")


def nvcc_of(home):
    return str(Path(home) / "bin/nvcc")


def cuda_home():
    """Where CUDA's compiler and headers are; None where they are not.

    torch takes the folder above nvcc's, and is led astray where that is a script which calls the
    real one: nvcc itself knows better.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return os.environ[variable] if shutil.which(nvcc_of(os.environ[variable])) else None
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    told = subprocess.run(  # noqa: S603 - the nvcc that the environment names
        [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    here = re.search(r"_HERE_=(\S+)", told.stderr)
    return str(Path(here.group(1) if here else Path(nvcc).resolve().parent).parent)


def cuda_architectures(home):
    """The names of what to compile for, and nvcc's flags for it.

    The first architecture of each generation that this nvcc knows, whose code runs on the later
    ones, too, and the newest as PTX for those to come; or what TORCH_CUDA_ARCH_LIST says, for which
    torch makes the flags.
    """
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wanted:
        return wanted, []
    known = subprocess.run(  # noqa: S603 - the same
        [nvcc_of(home), "--list-gpu-arch"], capture_output=True, text=True, check=True
    )
    numbers = sorted(int(n) for n in re.findall(r"compute_(\d+)", known.stdout) if int(n) >= 75)
    firsts = [n for n in numbers if n == min(m for m in numbers if m // 10 == n // 10)]
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in firsts]
    flags.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    return " ".join(f"sm_{n}" for n in firsts) + f" compute_{numbers[-1]}", flags


def told(error):
    """The first line of an exception; torch raises some whose text is not formatted yet."""
    text = str(error)
    if len(error.args) > 1 and isinstance(error.args[0], str):
        with contextlib.suppress(TypeError, ValueError):
            text = error.args[0] % error.args[1:]
    return f"{type(error).__name__}: {text}".strip().splitlines()[0]


def cuda_extension(outcome, torch):
    """The CUDA backend as a module of its own, or None where there is nothing to build it with."""
    home = cuda_home()
    if torch.version.cuda is None or home is None:
        outcome.record["cuda_reason"] = (
            f"torch {torch.__version__} has no CUDA"
            if torch.version.cuda is None
            else "nvcc was not found when it was built: not on the PATH, nor where CUDA_HOME says"
        )
        return None
    os.environ["CUDA_HOME"] = home  # torch.utils.cpp_extension looks once, when it is imported
    try:
        from torch.utils.cpp_extension import CUDAExtension

        outcome.record["cuda_architectures"], flags = cuda_architectures(home)
        extension = CUDAExtension(
            "paramstats._cuda",
            CUDA_SOURCES,
            depends=HEADERS,
            extra_compile_args={
                "cxx": COMPILE_ARGS,
                "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden", *flags],
            },
        )
    except Exception as error:
        outcome.failed("cuda", f"it could not be compiled ({told(error)})")
        return None
    extension.libraries = ["cudart"]  # nothing of torch: the other module has all of that
    return extension


def extensions(outcome):
    """(ext_modules, build_ext command) for the backends; ([], None) where none can be tried."""
    if UNWANTED:
        outcome.failed("native", "PARAMSTATS_NO_NATIVE was set")
        return [], None
    try:
        torch = import_torch()
        cuda = cuda_extension(outcome, torch)
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except Exception as error:  # a broken torch fails in many ways, and must not fail pip
        outcome.failed("native", f"torch could not be imported when it was built ({error})")
        return [], None
    outcome.record["torch"] = torch.__version__

    class OptionalBuildExtension(BuildExtension):
        """Builds each extension by itself, so that one that fails takes no other along, and ends
        quietly when it does: torch raises everything from OSError to RuntimeError then, and
        setuptools' optional=True swallows it, so the file decides."""

        def run(self):
            inplace, compiler = self.inplace, self.compiler  # which run() changes
            package = Path(self.get_finalized_command("build_py").get_package_dir("paramstats"))
            if not inplace:
                package = Path(self.build_lib) / "paramstats"
            wanted, built = self.extensions, []
            for extension in wanted:
                backend = extension.name.rpartition("._")[2]
                self.extensions, self.inplace, self.compiler = [extension], inplace, compiler
                places = [
                    Path(self.get_ext_fullpath(extension.name)),
                    Path(self.build_lib) / self.get_ext_filename(extension.name),
                ]
                for place in places:  # an earlier build's, for another torch perhaps
                    place.unlink(missing_ok=True)
                error = "the compiler made no library"
                try:
                    super().run()
                except (Exception, SystemExit) as e:
                    error = told(e)
                if any(place.exists() for place in places):
                    outcome.record[backend] = True
                    built.append(extension)
                else:
                    outcome.failed(
                        backend, f"it could not be compiled ({error}; pip install -v . shows more)"
                    )
            wanted[:] = built  # so that nothing later looks for the other files
            self.extensions = wanted
            outcome.save(package)

    native = CppExtension(
        "paramstats._native",
        SOURCES,
        depends=HEADERS,
        extra_compile_args=COMPILE_ARGS,
        # Symbols are looked up in the torch that is running, wherever it is installed.
        extra_link_args=[] if sys.platform == "darwin" else ["-Wl,--as-needed"],
    )
    return [native, *([cuda] if cuda else [])], OptionalBuildExtension


outcome = Outcome()
ext_modules, build_ext = extensions(outcome)


class RecordedBuildPy(build_py):
    """Leaves the outcome in the package where no build_ext will run to do so."""

    def run(self):
        super().run()
        if not ext_modules:
            package = Path(self.build_lib) / "paramstats"
            if self.editable_mode:
                package = ROOT / "paramstats"
            outcome.save(package)


setup(
    ext_modules=ext_modules,
    cmdclass={"build_py": RecordedBuildPy, **({"build_ext": build_ext} if build_ext else {})},
)
