"""The tests under sanitizers: of addresses and undefined behaviour, and of threads.

    make sanitize          everything, some 15 minutes; writes its table into docs/robustness.md
    make sanitize-quick    what every change has to pass

The C++ tests are compiled whole. For the Python tests a copy of the tree in build/sanitized gets an
extension of its own, so that the normal one stays what it is; the sanitizer is preloaded, because
neither Python nor torch was built with one. Needs g++ and what `make test` needs.

The thread sanitizer cannot see what OpenMP's barriers put in order and takes torch's threads for
racing ones. So its extension reads on std::threads (csrc/thread_pool.cpp), and OpenMP gets one
thread. It does not apply to the CUDA source on the CPU: that runs on fibers of one thread.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from docs import blocks
from tools.commands import ROOT, run

BUILD = ROOT / "build/sanitized"
CXX = os.environ.get("CXX", "g++")
CPUS = os.cpu_count() or 1

ENGINE = [
    "csrc/cpu/engine.cpp",
    *(f"csrc/cpu/kernels_{n}.cpp" for n in ("plain", "avx2", "avx512")),
]
SHIM = ["tests/cpp/cuda_shim/shim.cpp", "csrc/cuda/engine.cu"]


@dataclass(frozen=True)
class Sanitizer:
    name: str
    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    """To be preloaded, where the program itself has none."""
    environment: dict[str, str]
    build: tuple[str, ...]
    """More flags for the extension."""


ADDRESS = Sanitizer(
    "address and undefined behaviour",
    ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    ("libasan.so", "libubsan.so", "libstdc++.so"),
    # Python frees little at its end. Its own small objects are to be seen, too.
    {"ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"},
    (),
)
THREAD = Sanitizer(
    "threads",
    ("-fsanitize=thread",),
    ("libtsan.so", "libstdc++.so"),
    {
        "TSAN_OPTIONS": f"exitcode=66 suppressions={BUILD}/suppressions",
        "OMP_THREAD_LIMIT": "1",  # torch's own loops; it still says that it has OMP_NUM_THREADS
        "OMP_NUM_THREADS": "4",
    },
    ("-DPARAMSTATS_STD_THREADS",),
)
# glibc hands the memory of a thread that has ended to the next one, under a lock of its own.
SUPPRESSIONS = "race:_dl_deallocate_tls\n"

SOURCES = {
    "moments": ["tests/cpp/test_moments.cpp"],
    "kernels": ["tests/cpp/test_kernels.cpp", *ENGINE],
    "threads": ["tests/cpp/test_threads.cpp", *ENGINE],
    "cuda_kernels": ["tests/cpp/test_cuda_kernels.cpp", *ENGINE, *SHIM],
}

# The Python tests that are mostly about native code, in half a minute.
QUICK = [
    "tests/test_compile.py",
    "tests/test_determinism.py",
    "tests/test_inputs.py",
    "tests/test_moments.py",
    "tests/test_numerics.py",
    "tests/test_summary.py",
    "tests/test_untouched.py",
    "tests/test_walk.py",
]
# Those in which several threads meet in it, and what they call.
THREADED = [
    "tests/test_determinism.py",
    "tests/test_inputs.py",
    "tests/test_numerics.py",
    "tests/test_summary.py",
    "tests/test_walk.py",
    "tests/test_watch.py",
]
# What cannot work where a sanitizer is preloaded, and why.
LEFT_OUT = {
    "tests/test_build.py": "compilers get the sanitizer, too: minutes, and nothing of ours runs",
    "tests/test_fuzz.py::test_nothing_grows": "a sanitizer keeps memory that was freed",
    "tests/test_fuzz.py::test_a_leak_is_noticed": "the same",
}


@dataclass(frozen=True)
class Result:
    what: str
    sanitizer: str
    failed: bool
    said: str
    seconds: float

    def __str__(self) -> str:
        outcome = f"FAILED, {self.said}" if self.failed else self.said
        return f"{self.what}, sanitizer of {self.sanitizer}: {outcome} ({self.seconds:.0f} s)"


def programs(sanitizer: Sanitizer, names: tuple[str, ...]) -> list[Result]:
    """C++ tests. Every file is compiled once, as many at a time as there are processors."""
    folder = BUILD / sanitizer.libraries[0] / "cpp"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += ["-D_GLIBCXX_ASSERTIONS", *sanitizer.flags]

    def compiled(source: str) -> str:
        to = str(folder / f"{Path(source).name}.o")
        run(CXX, *flags, "-Itests/cpp/cuda_shim", "-c", "-x", "c++", source, "-o", to)
        return to

    begin = time.monotonic()
    sources = sorted({s for name in names for s in SOURCES[name]})
    with ThreadPoolExecutor(CPUS) as pool:
        objects = dict(zip(sources, pool.map(compiled, sources), strict=True))
    results = []
    for name in names:
        program = str(folder / name)
        run(CXX, *flags, *(objects[s] for s in SOURCES[name]), "-o", program)
        done = subprocess.run([program], cwd=ROOT, capture_output=True, text=True)
        said = re.findall(r"\d+ passed, \d+ failed", done.stdout)
        bad = done.returncode != 0
        if bad:
            print(done.stdout, done.stderr, sep="")
        now = time.monotonic()
        results.append(
            Result(f"C++ tests: {name}", sanitizer.name, bad, " ".join(said), now - begin)
        )
        begin = now
        print(results[-1], flush=True)
    return results


def copy_changed(root: Path, names: list[str], tree: Path) -> None:
    """Makes `tree` a copy of these files; what was built there stays."""
    wanted = {name for name in names if (root / name).is_file()}
    for path in [p for p in tree.rglob("*") if p.is_file()]:
        name = path.relative_to(tree).as_posix()
        built = name.startswith("build/") or path.name == "_build.json" or path.suffix == ".so"
        if not built and name not in wanted:
            path.unlink()
    for name in wanted:
        source, to = root / name, tree / name
        if not to.exists() or to.stat().st_mtime < source.stat().st_mtime:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to)


def python_tests(sanitizer: Sanitizer, what: str, arguments: list[str]) -> Result:
    begin = time.monotonic()
    tree = BUILD / sanitizer.libraries[0] / "tree"
    tree.mkdir(parents=True, exist_ok=True)
    files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    copy_changed(ROOT, [name for name in files.split("\0") if name], tree)
    flags = [*sanitizer.flags, *sanitizer.build, "-O1", "-g", "-D_GLIBCXX_ASSERTIONS"]
    run(
        *(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"),
        cwd=tree,
        CXX=CXX,
        PARAMSTATS_STRICT_BUILD="1",
        PARAMSTATS_CFLAGS=" ".join(flags),
        LDFLAGS=" ".join(sanitizer.flags),
    )
    (BUILD / "suppressions").write_text(SUPPRESSIONS)
    libraries = [run(CXX, f"-print-file-name={n}").stdout.strip() for n in sanitizer.libraries]
    if not all(os.path.isabs(library) for library in libraries):
        sys.exit(f"expected g++ and its sanitizers, got {CXX}, which has not all of {libraries}")
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "-rf", *arguments],
        cwd=tree,
        env=os.environ
        | sanitizer.environment
        | {"LD_PRELOAD": " ".join(libraries), "PARAMSTATS_STRICT_BUILD": "1"}
        | {"PYTHONPATH": str(tree), "UBSAN_OPTIONS": "print_stacktrace=1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if tests.returncode:
        print(tests.stdout)
    said = re.sub(r" in .*|\d+ warnings?|\d+ deselected|=", "", tests.stdout.splitlines()[-1])
    result = Result(
        f"Python tests: {what}",
        sanitizer.name,
        tests.returncode != 0,
        ", ".join(filter(None, (part.strip() for part in said.split(",")))),
        time.monotonic() - begin,
    )
    print(result, flush=True)
    return result


def table(results: list[Result]) -> str:
    import torch

    rows = [
        (r.what, r.sanitizer, f"**failed**, {r.said}" if r.failed else r.said,
         f"{r.seconds / 60:.1f}")
        for r in results
    ]  # fmt: skip
    outcomes = blocks.table(("what", "under the sanitizer of", "outcome", "minutes"), rows, [3])
    compiler = run(CXX, "--version").stdout.splitlines()[0]
    return (
        f"{outcomes}\n\n"
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}; torch {torch.__version__}, "
        f"Python {platform.python_version()}, {compiler}, {platform.machine()}, {CPUS} cores."
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.sanitize", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help="what checks every change; leaves the page as it is"
    )
    quick = parser.parse_args().quick

    def all_programs() -> list[Result]:
        found = programs(ADDRESS, ("moments", "kernels", "threads", "cuda_kernels"))
        return found + programs(THREAD, ("threads",) if quick else ("kernels", "threads"))

    if quick:
        with ThreadPoolExecutor(2) as pool:  # one of the programs is a minute of one thread
            under_way = [
                pool.submit(all_programs),
                pool.submit(lambda: [python_tests(ADDRESS, "native code", QUICK)]),
            ]
        if failures := [str(error) for part in under_way if (error := part.exception())]:
            sys.exit("\n".join(failures))
        results = [result for part in under_way for result in part.result()]
    else:
        results = all_programs()
        left_out = [f"--deselect={test}" for test in LEFT_OUT]
        results.append(python_tests(ADDRESS, "all", left_out))
        results.append(python_tests(THREAD, "several threads", THREADED))
        blocks.write(ROOT / "docs/robustness.md", "sanitize", table(results))
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
