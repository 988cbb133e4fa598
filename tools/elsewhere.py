"""The package as others get it: built by the standard tool, installed, and tested away from here.

    make test-elsewhere PYTHON=python3.12 TORCH=torch==2.13.0 CXX=clang++    one combination
    make test-everywhere                                                    a list of them

Each combination gets an environment of its own in build/elsewhere. `python -m build` makes a source
archive of the checkout, and a wheel of that archive alone; both must contain all they have to.
The wheel is imported with torch and nothing else at hand, no compiler above all; then the core of
the tests runs against it in a folder that has no paramstats/ of its own.
A wheel for this Python and another minor version of torch, from an earlier combination or from
`make wheel`, has to say so there and to run on torch operators.

What came out goes into a row of docs/platforms.md; with --dry-run (DRY_RUN=1 for make) it is only
printed. TORCH= (empty) takes PYTHON as it is, with its own torch and tools (TOOLS, below), and
installs nothing into it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from docs import blocks
from tools.commands import ROOT, run

BUILD = ROOT / "build/elsewhere"
PAGE = ROOT / "docs/platforms.md"
TOOLS = ["setuptools>=77", "ninja", "pybind11", "build", "numpy", "pytest", "hypothesis"]
TOOLS += ["safetensors", "rich", "tqdm", "pandas"]

# Prints what an environment lacks of the names that it is given, `name>=version` among them.
LACKING = """
import importlib.metadata, sys
for wanted in sys.argv[1:]:
    name, _, least = wanted.partition(">=")
    try:
        version = importlib.metadata.version(name)
        if least and int(version.split(".")[0]) < int(least):
            print(wanted)
    except importlib.metadata.PackageNotFoundError:
        print(wanted)
"""

# The oldest torch, the pinned one, others up to the newest; every Python with the pinned one.
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

# What depends on Python, torch and the compiler, and on no optional library.
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
WANTED = {
    "sdist": "csrc/binding.cpp csrc/cpu/engine.h csrc/cpu/kernels_body.h csrc/cuda/engine.cu "
    "csrc/moments.h csrc/portable.h setup.py pyproject.toml LICENSE README.md paramstats/py.typed "
    "tests/oracle.py",
    "wheel": "paramstats/py.typed paramstats/_build.json paramstats/checkpoints/__init__.py "
    "paramstats/sharded/__init__.py",
}


@dataclass(frozen=True)
class Outcome:
    python: str
    torch: str
    compiler: str
    tests: str
    other_torch: str
    failed: bool

    def row(self) -> str:
        cells = [self.python, self.torch, self.compiler, self.tests, self.other_torch or "-"]
        return f"| {' | '.join(cells)} | {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d} |"


def recorded(table: str, row: str) -> str:
    """The table with that row, in the place of the one of the same combination."""
    head, rows = table.splitlines()[:2], table.splitlines()[2:]

    def combination(row: str) -> list[str]:
        return row.split(" | ")[:3]

    others = [r for r in rows if combination(r) != combination(row)]
    return "\n".join([*head, *sorted([*others, row])])


def check_tools(python: str) -> None:
    """Ends the program where PYTHON, which is taken as it is, lacks what this needs."""
    lacking = run(python, "-c", LACKING, "torch", *TOOLS, cwd="/").stdout.split()
    if lacking:
        sys.exit(
            f"TORCH= takes {python} as it is; it lacks {', '.join(lacking)}. To install that:\n"
            f"    {python} -m pip install {' '.join(repr(name) for name in lacking)}\n"
            "or give TORCH=torch==2.13.0, for an environment of its own."
        )


def environment(python: str, torch: str) -> str:
    """The Python of an environment with that torch and the tools; made where it is not there."""
    folder = BUILD / re.sub(r"[^\w.]+", "-", f"{Path(python).name} {torch}")
    path = folder / "bin/python"
    done = folder / "installed"
    if not done.exists():
        run(python, "-m", "venv", "--clear", str(folder))
        run(str(path), "-m", "pip", "install", "--quiet", torch, *TOOLS)
        done.touch()
    return str(path)


def build(python: str, cxx: str, folder: Path) -> tuple[Path, Path]:
    """(source archive, wheel), the second made of the first; both hold what they have to."""
    dist = folder / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    cc = {"g++": "gcc", "clang++": "clang"}.get(cxx, cxx)
    run(
        *(python, "-m", "build", "--no-isolation", "--outdir", str(dist)),
        CXX=cxx,
        CC=cc,
        CUDA_HOME=os.devnull,  # an nvcc of another version than torch's would be an error
        PARAMSTATS_STRICT_BUILD="1",
        PARAMSTATS_CFLAGS="-Werror",
    )
    sdist, wheel = next(dist.glob("*.tar.gz")), next(dist.glob("*.whl"))
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = set(WANTED["sdist"].split()) - names
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    missing |= set(WANTED["wheel"].split()) - set(inside)
    for wanted in (r"paramstats/_native\..*\.so", r".*\.dist-info/.*LICENSE"):
        missing |= set() if any(re.fullmatch(wanted, name) for name in inside) else {wanted}
    extra = [n for n in inside if not re.match(r"paramstats/|paramstats-[^/]*\.dist-info/", n)]
    if missing or extra:
        sys.exit(f"{sdist.name}, {wheel.name}: missing {sorted(missing)}, extra {extra}")
    return sdist, wheel


def installed(python: str, what: Path, to: Path, **environment: str) -> Path:
    """A folder for PYTHONPATH."""
    shutil.rmtree(to, ignore_errors=True)
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*command, "--target", str(to), str(what), cwd=ROOT, **environment)
    return to


def bare(python: str, path: Path) -> tuple[str, str]:
    """(backend, what is said): with no compiler in sight, in no folder of ours."""
    code = f"import sys; sys.path.insert(0, {str(path)!r}){IMPORT_ALONE}"
    done = run(python, "-W", "default", "-c", code, cwd="/", PATH="/nowhere")
    out = done.stdout + done.stderr
    if str(path) not in out:
        sys.exit(f"expected paramstats from {path}, got\n{out}")
    backend = re.search(r"^(native|reference) ", out, re.M)
    assert backend is not None, out
    return backend[1], out


def test(python: str, path: Path, folder: Path) -> tuple[bool, str]:
    """(failed, pytest's last line), in a tree without paramstats/."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    away = shutil.ignore_patterns(".*", "build", "dist", "paramstats", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=away)
    command = [python, "-m", "pytest", "--quiet", "-rf", "-p", "no:cacheprovider"]
    files = [f"tests/{'' if '/' in name else 'test_'}{name}.py" for name in CORE.split()]
    done = subprocess.run(
        [*command, *files],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(path), "PARAMSTATS_STRICT_BUILD": "1"},
        capture_output=True,
        text=True,
    )
    (folder / "tests.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:])
    said = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", done.stdout.splitlines()[-1])
    return done.returncode != 0, ", ".join(said) or "no tests ran"


def built_for(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return str(json.loads(archive.read("paramstats/_build.json"))["torch"])


def other_torch(python: str, folder: Path, running: str, tag: str) -> str:
    """How a wheel that was built for another torch does here; empty where there is none."""
    wheels = [*BUILD.glob("*/dist/*.whl"), *ROOT.glob("dist/*.whl")]
    for wheel in sorted(wheel for wheel in wheels if f"-{tag}-" in wheel.name):
        built = built_for(wheel)
        if built.split(".")[:2] != running.split(".")[:2]:
            break
    else:
        return ""
    path = installed(python, wheel, folder / "other-torch")
    backend, said = bare(python, path)
    expected = f"the native backend was built for torch {built} and this is torch {running}"
    if backend != "reference" or expected not in said or "To rebuild it: pip" not in said:
        sys.exit(f"expected '{expected}', got\n{said}")
    forced = subprocess.run(
        [python, "-c", "import paramstats; paramstats.summarize({})"],
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(path), "PARAMSTATS_BACKEND": "native"},
        capture_output=True,
        text=True,
    )
    if forced.returncode != 1 or "RuntimeError: paramstats: expected the" not in forced.stderr:
        sys.exit(f"expected an error where the native backend is forced, got\n{forced.stderr}")
    return f"of {built}: torch operators, and says how to rebuild"


def combination(python: str, torch: str, cxx: str) -> Outcome:
    if not torch:
        check_tools(python)
    path = environment(python, torch) if torch else python
    told = run(path, "-c", "import sys, torch; print(*sys.version_info[:3], torch.__version__)")
    major, minor, micro, running = told.stdout.splitlines()[-1].split()
    folder = BUILD / f"python{major}.{minor}-torch{running}-{cxx}"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Python {major}.{minor}.{micro}, torch {running}, {cxx}", flush=True)
    sdist, wheel = build(path, cxx, folder)
    target = installed(path, wheel, folder / "installed-wheel")
    backend, said = bare(path, target)
    if backend != "native" or "Warning" in said:
        sys.exit(f"expected the native backend and no warning, got\n{said}")
    without = installed(
        path, sdist, folder / "no-compiler", PATH=str(Path(path).parent), CXX="", CC=""
    )
    backend, said = bare(path, without)
    if backend != "reference" or "it could not be compiled" not in said:
        sys.exit(f"expected to install without a compiler and to say so, got\n{said}")
    failed, said = test(path, target, folder)
    compiler = re.search(r"\d+\.\d+\.\d+", run(cxx, "--version").stdout.splitlines()[0])
    return Outcome(
        f"{major}.{minor}.{micro}",
        running,
        f"{cxx} {compiler[0] if compiler else ''}",
        said,
        other_torch(path, folder, running, f"cp{major}{minor}"),
        failed,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.elsewhere",
        description=__doc__.splitlines()[0],
        epilog=f"Without --torch, PYTHON must have torch and {', '.join(TOOLS)}.",
    )
    parser.add_argument(
        "--python", default="python3", help="the Python to build and test with (default python3)"
    )
    parser.add_argument(
        "--torch",
        default="",
        help="what pip installs into a new environment, torch==2.11.0 say; "
        "left out: PYTHON is taken as it is",
    )
    parser.add_argument(
        "--cxx", default="g++", help="the C++ compiler, g++ (the default) or clang++"
    )
    parser.add_argument(
        "--everywhere", action="store_true", help="a list of combinations in place of one"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="leave docs/platforms.md as it is; the row is printed",
    )
    options = parser.parse_args()
    combinations = [(options.python, options.torch, options.cxx)]
    failed = False
    for python, torch, cxx in SUPPORTED if options.everywhere else combinations:
        if shutil.which(python) is None or shutil.which(cxx) is None:
            print(f"no {python} or no {cxx} here: left out")
            failed = True
            continue
        outcome = combination(python, torch, cxx)
        failed = failed or outcome.failed
        print(outcome.row(), flush=True)
        if options.dry_run:
            continue
        text = PAGE.read_text()
        blocks.write(PAGE, "platforms", recorded(blocks.content(text, "platforms"), outcome.row()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
