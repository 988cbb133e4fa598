"""Builds the package with `python -m build`, installs it elsewhere and tests what was installed.

    make test-elsewhere PYTHON=python3.12 TORCH=torch==2.13.0 CXX=clang++    one combination
    make test-everywhere                                                    all of `SUPPORTED`

Each combination has its own environment in build/elsewhere. There, the program

- builds a source archive and a wheel from it, and checks their contents;
- imports the wheel without a compiler and without any package but torch;
- installs the source archive without a compiler, which must select the reference backend;
- runs the core of the tests against the wheel in a folder without paramstats/;
- imports wheels built for another torch, which must warn and use the reference backend.

It prints a row for the table of docs/platforms.md. With an empty TORCH= it uses PYTHON as it is;
that Python must have torch and `TOOLS`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from datetime import date
from pathlib import Path

from tools.commands import ROOT, run

BUILD = ROOT / "build/elsewhere"
TOOLS = ["setuptools>=77", "ninja", "pybind11", "build", "numpy", "pytest", "hypothesis"]
TOOLS += ["safetensors", "rich", "tqdm", "pandas"]

# Every Python with the pinned torch; the oldest torch, one between and the newest.
SUPPORTED = [
    ("python3.11", "torch==2.13.0", "g++"),
    ("python3.11", "torch==2.13.0", "clang++"),
    ("python3.11", "torch==2.10.0", "g++"),
    ("python3.11", "torch==2.11.0", "g++"),
    ("python3.11", "torch", "g++"),
    ("python3.10", "torch==2.13.0", "g++"),
    ("python3.12", "torch==2.13.0", "g++"),
    ("python3.13", "torch==2.13.0", "g++"),
]

# Tests that depend on Python, torch and the compiler, but on no optional library.
CORE = """
    numerics inputs walk fork signals determinism summary moments untouched compile backend
    reference watch rendering report history/test_history checkpoints/test_formats
    checkpoints/test_pickles checkpoints/test_distributed
"""

IMPORT_ALONE = """
import sys, torch
before = set(sys.modules)
import paramstats
summary = paramstats.summarize({"w": torch.tensor([3.0, -4.0])})
new = {m.partition(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new == {"paramstats"}, new
assert summary["w"].norm == 5.0, summary
print(paramstats.backend().cpu, paramstats.__file__)
"""
IN_SDIST = (
    "csrc/binding.cpp csrc/cpu/kernels_body.h csrc/cuda/kernels.h csrc/moments.h csrc/portable.h "
    "setup.py pyproject.toml LICENSE README.md paramstats/py.typed tests/oracle.py"
)
IN_WHEEL = (
    "paramstats/py.typed paramstats/_build.json paramstats/checkpoints/__init__.py "
    "paramstats/_core/__init__.py paramstats/_sharded/__init__.py"
)


def environment(python: str, torch: str) -> str:
    """The Python of an environment with that torch and `TOOLS`; created on first use."""
    folder = BUILD / re.sub(r"[^\w.]+", "-", f"{Path(python).name} {torch}")
    path = str(folder / "bin/python")
    installed = folder / "installed"
    if not installed.exists():
        run(python, "-m", "venv", "--clear", str(folder))
        run(path, "-m", "pip", "install", "--quiet", torch, *TOOLS)
        installed.touch()
    return path


def build(python: str, cxx: str, folder: Path) -> tuple[Path, Path]:
    """Builds a source archive and a wheel from it, and checks what they contain."""
    dist = folder / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    run(
        *(python, "-m", "build", "--no-isolation", "--outdir", str(dist)),
        CXX=cxx,
        CC={"g++": "gcc", "clang++": "clang"}.get(cxx, cxx),
        CUDA_HOME=os.devnull,  # an nvcc of another version than torch's is an error
        PARAMSTATS_STRICT_BUILD="1",
        PARAMSTATS_CFLAGS="-Werror",
    )
    sdist, wheel = next(dist.glob("*.tar.gz")), next(dist.glob("*.whl"))
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    missing = (set(IN_SDIST.split()) - in_sdist) | (set(IN_WHEEL.split()) - in_wheel)
    for pattern in (r"paramstats/_native\..*\.so", r".*\.dist-info/.*LICENSE"):
        if not any(re.fullmatch(pattern, name) for name in in_wheel):
            missing.add(pattern)
    extra = [n for n in in_wheel if not re.match(r"paramstats/|paramstats-[^/]*\.dist-info/", n)]
    if missing or extra:
        sys.exit(f"{sdist.name}, {wheel.name}: missing {sorted(missing)}, extra {extra}")
    return sdist, wheel


def install(python: str, archive: Path, folder: Path, **environment: str) -> Path:
    """Installs a source archive or a wheel into a folder for PYTHONPATH."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*command, "--target", str(folder), str(archive), **environment)
    return folder


def check_import(python: str, path: Path, backend: str, message: str = "") -> None:
    """Imports paramstats from `path` without a compiler, outside of the checkout.

    Ends the program unless that backend is used and `message` (or no warning) is printed.
    """
    code = f"import sys; sys.path.insert(0, {str(path)!r}){IMPORT_ALONE}"
    done = run(python, "-W", "default", "-c", code, cwd="/", PATH="/nowhere")
    output = done.stdout + done.stderr
    as_expected = message in output if message else "Warning" not in output
    if f"{backend} {path}" not in output or not as_expected:
        sys.exit(f"expected the {backend} backend and {message or 'no warning'}, got\n{output}")


def test(python: str, path: Path, folder: Path) -> tuple[bool, str]:
    """Tests the package in `path`; returns whether a test failed, and pytest's last line."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    names = (".*", "build", "dist", "paramstats", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*names))
    files = [f"tests/{'' if '/' in name else 'test_'}{name}.py" for name in CORE.split()]
    done = subprocess.run(
        [python, "-m", "pytest", "--quiet", "-rf", "-p", "no:cacheprovider", *files],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(path), "PARAMSTATS_STRICT_BUILD": "1"},
        capture_output=True,
        text=True,
    )
    (folder / "tests.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:])
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", done.stdout.splitlines()[-1])
    return done.returncode != 0, ", ".join(counts) or "no tests ran"


def check_other_torch(python: str, folder: Path, torch: str, tag: str) -> str:
    """Imports a wheel that was built for another torch; returns a cell of the table."""
    wheels = [*BUILD.glob("*/dist/*.whl"), *ROOT.glob("dist/*.whl")]
    for wheel in sorted(wheel for wheel in wheels if f"-{tag}-" in wheel.name):
        with zipfile.ZipFile(wheel) as archive:
            built = json.loads(archive.read("paramstats/_build.json"))["torch"]
        if built.split(".")[:2] != torch.split(".")[:2]:
            break
    else:
        return "-"
    path = install(python, wheel, folder / "other-torch")
    message = f"the native backend was built for torch {built} and this is torch {torch}"
    check_import(python, path, "reference", message)
    forced = subprocess.run(
        [python, "-c", "import paramstats; paramstats.summarize({})"],
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(path), "PARAMSTATS_BACKEND": "native"},
        capture_output=True,
        text=True,
    )
    if forced.returncode != 1 or "RuntimeError: paramstats: expected the" not in forced.stderr:
        sys.exit(f"expected an error with PARAMSTATS_BACKEND=native, got\n{forced.stderr}")
    return f"built for {built}: warns and uses torch operators"


def check_combination(python: str, torch: str, cxx: str) -> bool:
    """Runs everything for one combination and prints its row; returns whether a test failed."""
    if torch:
        python = environment(python, torch)
    code = "import sys, torch; print(*sys.version_info[:3], torch.__version__)"
    major, minor, micro, running = run(python, "-c", code).stdout.splitlines()[-1].split()
    folder = BUILD / f"python{major}.{minor}-torch{running}-{cxx}"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Python {major}.{minor}.{micro}, torch {running}, {cxx}", flush=True)
    sdist, wheel = build(python, cxx, folder)
    installed = install(python, wheel, folder / "installed-wheel")
    check_import(python, installed, "native")
    no_compiler = {"PATH": str(Path(python).parent), "CXX": "", "CC": ""}
    path = install(python, sdist, folder / "no-compiler", **no_compiler)
    check_import(python, path, "reference", "it could not be compiled")
    failed, counts = test(python, installed, folder)
    version = re.search(r"\d+\.\d+\.\d+", run(cxx, "--version").stdout.splitlines()[0])
    compiler = f"{cxx} {version[0] if version else ''}"
    other = check_other_torch(python, folder, running, f"cp{major}{minor}")
    cells = (f"{major}.{minor}.{micro}", running, compiler, counts, other, str(date.today()))
    print(f"| {' | '.join(cells)} |", flush=True)
    return failed


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m tools.elsewhere",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", default="python3", help="the Python to build and test with")
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
