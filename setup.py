"""Builds the native engine against the torch that is installed, or does without it.

The engine is an accelerator: where it cannot be built (no compiler, no torch at build time), the
package installs as pure Python and `paramstats.backend()` says why. PARAMSTATS_STRICT_BUILD=1 makes
a failure an error; PARAMSTATS_NO_NATIVE=1 does not try.
"""

import json
import os
import platform
import shlex
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SOURCES = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
)
HEADERS = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cpu/*.h")]
)
COMPILE_ARGS = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
COMPILE_ARGS += shlex.split(os.environ.get("PARAMSTATS_CFLAGS", ""))
STRICT = os.environ.get("PARAMSTATS_STRICT_BUILD", "0") not in ("", "0")
UNWANTED = os.environ.get("PARAMSTATS_NO_NATIVE", "0") not in ("", "0")


def import_torch():
    """torch, also from under pip's build isolation.

    pip builds in an environment of its own that hides the user's site-packages but runs the user's
    interpreter, so they are still found by their path. Listing torch as a build requirement would
    build against another torch than the one the engine is to run with.
    """
    try:
        import torch
    except ImportError:
        paths = sysconfig.get_paths()
        sys.path += [paths["purelib"], paths["platlib"], site.getusersitepackages()]
        import torch
    return torch


class Outcome:
    """What became of the native engine; the installed package reads it to explain itself."""

    def __init__(self):
        self.native = False
        self.reason = ""
        self.torch = None

    def failed(self, reason):
        self.native = False
        self.reason = reason
        if STRICT:
            sys.exit(f"paramstats: PARAMSTATS_STRICT_BUILD is set and {reason}")
        print(f"paramstats: installing without the native engine: {reason}", file=sys.stderr)

    def save(self, package):
        record = {
            "native": self.native,
            "reason": self.reason,
            "torch": self.torch,
            "compiler": os.environ.get("CXX", "c++"),
            "machine": platform.machine(),
        }
        (Path(package) / "_build.json").write_text(json.dumps(record, indent=2) + "\n")


def native_extension(outcome):
    """(ext_modules, build_ext command) for the engine; ([], None) where it cannot be tried."""
    if UNWANTED:
        outcome.failed("PARAMSTATS_NO_NATIVE was set")
        return [], None
    try:
        torch = import_torch()
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except Exception as error:  # a broken torch fails in many ways, and must not fail pip
        outcome.failed(f"torch could not be imported when it was built ({error})")
        return [], None
    outcome.torch = torch.__version__

    class OptionalBuildExtension(BuildExtension):
        """Ends quietly when the compiler does not work: torch raises everything from OSError to
        RuntimeError then, and setuptools' optional=True swallows it, so the file decides."""

        def run(self):
            error = "the compiler made no library"
            inplace = self.inplace  # which run() changes, and not back where it fails
            built = [Path(self.get_ext_fullpath(e.name)) for e in self.extensions]
            built += [Path(self.build_lib) / self.get_ext_filename(e.name) for e in self.extensions]
            for path in built:  # an earlier build's, for another torch perhaps
                path.unlink(missing_ok=True)
            try:
                super().run()
            except (Exception, SystemExit) as e:
                error = f"{type(e).__name__}: {e}".strip().splitlines()[0]
            package = Path(self.get_finalized_command("build_py").get_package_dir("paramstats"))
            if not inplace:
                package = Path(self.build_lib) / "paramstats"
            if any(path.exists() for path in built):
                outcome.native = True
            else:
                outcome.failed(f"it could not be compiled ({error})")
                self.extensions.clear()  # so that nothing later looks for the files
            package.mkdir(parents=True, exist_ok=True)
            outcome.save(package)

    extension = CppExtension(
        "paramstats._native",
        SOURCES,
        depends=HEADERS,
        extra_compile_args=COMPILE_ARGS,
        # Symbols are looked up in the torch that is running, wherever it is installed.
        extra_link_args=[] if sys.platform == "darwin" else ["-Wl,--as-needed"],
    )
    return [extension], OptionalBuildExtension


outcome = Outcome()
ext_modules, build_ext = native_extension(outcome)


class RecordedBuildPy(build_py):
    """Leaves the outcome in the package where no build_ext will run to do so."""

    def run(self):
        super().run()
        if not ext_modules:
            package = Path(self.build_lib) / "paramstats"
            if self.editable_mode:
                package = ROOT / "paramstats"
            package.mkdir(parents=True, exist_ok=True)
            outcome.save(package)


setup(
    ext_modules=ext_modules,
    cmdclass={"build_py": RecordedBuildPy, **({"build_ext": build_ext} if build_ext else {})},
)
