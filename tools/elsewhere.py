"""Tests a wheel, built once, and the source archive with another Python and torch.

    make test-elsewhere PYTHON=python3.12 TORCH=torch==2.13.0 CXX=clang++    one combination
    make test-everywhere                                                    all of `SUPPORTED`

The wheel for that Python and the source archive are those in dist, which `make wheels` builds. Each
combination has its own environment in build/elsewhere. There, the program

- imports the wheel without a compiler and without any package but torch;
- runs the tests in tests/core.txt, which need no optional library, against the wheel, without a
  compiler and in a folder without paramstats/;
- builds the source archive with CXX and imports the result;
- installs the source archive without a compiler, which must select the reference backend.

It prints a row for the table of docs/platforms.md. With an empty TORCH= it uses PYTHON as it is;
that Python must have torch and `TEST_TOOLS` of tools/wheels.py.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

from tools.commands import ROOT, run
from tools.wheels import BUILD, DIST, environment, install

# Every Python with the pinned torch; the oldest torch, two between and the newest.
SUPPORTED = [
    ("python3.11", "torch==2.10.0", "g++"),
    ("python3.11", "torch==2.11.0", "g++"),
    ("python3.11", "torch==2.13.0", "g++"),
    ("python3.11", "torch==2.13.0", "clang++"),
    ("python3.11", "torch==2.14.1", "g++"),
    ("python3.11", "torch", "g++"),
    ("python3.10", "torch==2.13.0", "g++"),
    ("python3.12", "torch==2.13.0", "g++"),
    ("python3.13", "torch==2.13.0", "g++"),
]

IMPORT_ALONE = """
import sys, torch
before = set(sys.modules)
import paramstats
summary = paramstats.summarize({"w": torch.tensor([3.0, -4.0])})
new = {m.partition(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new - {"torch"} == {"paramstats"}, new
assert summary["w"].norm == 5.0, summary
print(paramstats.backend().cpu, paramstats.__file__)
"""


def without_compiler(python: str) -> dict[str, str]:
    """Returns environment variables with which only the programs of that Python are found."""
    return {"PATH": str(Path(python).parent), "CXX": "", "CC": ""}


def check_import(python: str, path: Path, backend: str, message: str = "") -> None:
    """Imports paramstats from `path` without a compiler, outside of the checkout.

    Ends the program unless that backend is used and `message` (or no warning) is printed.
    """
    code = f"import sys; sys.path.insert(0, {str(path)!r}){IMPORT_ALONE}"
    done = run(python, "-W", "default", "-c", code, cwd="/", **without_compiler(python))
    output = done.stdout + done.stderr
    as_expected = message in output if message else "Warning" not in output
    if f"{backend} {path}" not in output or not as_expected:
        sys.exit(f"expected the {backend} backend and {message or 'no warning'}, got\n{output}")


def test(python: str, path: Path, folder: Path) -> tuple[bool, str]:
    """Tests the package in `path`; returns whether a test failed, and pytest's last line."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for name in ("tests", "tools"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    variables = {"PYTHONPATH": str(path), "PARAMSTATS_STRICT_BUILD": "1"}
    done = subprocess.run(
        [python, "-m", "pytest", "--quiet", "-rf", "-p", "no:cacheprovider", "@tests/core.txt"],
        cwd=tree,
        env=os.environ | variables | without_compiler(python),
        capture_output=True,
        text=True,
    )
    (folder / "tests.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:])
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", done.stdout.splitlines()[-1])
    return done.returncode != 0, ", ".join(counts) or "no tests ran"


def check_combination(python: str, torch: str, cxx: str) -> bool:
    """Runs everything for one combination and prints its row; returns whether a test failed."""
    if torch:
        python = environment(python, torch)
    code = "import sys, torch; print(sys.executable, *sys.version_info[:3], torch.__version__)"
    found = run(python, "-c", code).stdout.splitlines()[-1].rsplit(maxsplit=4)
    python, major, minor, micro, running = found
    wheels = list(DIST.glob(f"*-cp{major}{minor}-*.whl"))
    if not wheels:
        sys.exit(f"dist has no wheel for Python {major}.{minor}; build it with make wheels")
    sdist = next(DIST.glob("*.tar.gz"))
    folder = BUILD / f"python{major}.{minor}-torch{running}-{cxx}"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Python {major}.{minor}.{micro}, torch {running}, {cxx}", flush=True)

    installed = folder / "wheel"
    install(python, wheels[0], installed, **without_compiler(python))
    check_import(python, installed, "native")
    failed, counts = test(python, installed, folder)

    built = folder / "built"
    cc = {"g++": "gcc", "clang++": "clang"}.get(cxx, cxx)
    strict = {"PARAMSTATS_STRICT_BUILD": "1", "PARAMSTATS_CFLAGS": "-Werror"}
    install(python, sdist, built, CXX=cxx, CC=cc, **strict)
    check_import(python, built, "native")
    install(python, sdist, built, **without_compiler(python))
    check_import(python, built, "reference", "it could not be compiled")

    version = re.search(r"\d+\.\d+\.\d+", run(cxx, "--version").stdout.splitlines()[0])
    compiler = f"{cxx} {version[0] if version else ''}"
    cells = (f"{major}.{minor}.{micro}", running, counts, compiler, str(date.today()))
    print(f"| {' | '.join(cells)} |", flush=True)
    return failed


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m tools.elsewhere",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", default="python3", help="the Python to test with")
    parser.add_argument("--torch", default="", help="installed into a new environment, for example "
                        "torch==2.11.0; without it PYTHON is used as it is")  # fmt: skip
    parser.add_argument("--cxx", default="g++", help="the C++ compiler (default g++)")
    parser.add_argument("--everywhere", action="store_true", help="all supported combinations")
    options = parser.parse_args()
    combinations = [(options.python, options.torch, options.cxx)]
    failed = False
    for python, torch, cxx in SUPPORTED if options.everywhere else combinations:
        if shutil.which(python) is None or shutil.which(cxx) is None:
            print(f"{python} or {cxx} is not installed")
            failed = True
        else:
            failed |= check_combination(python, torch, cxx)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
