"""Runs the tests under sanitizers: of addresses and undefined behaviour, and of threads.

    make sanitize          everything, 15 minutes
    make sanitize-quick    the part that checks every change, 2 minutes

Needs g++. The Python tests run in a copy of the tree in build/sanitized with an extension of its
own. The sanitizer is preloaded, because Python and torch were built without one.

The thread sanitizer does not understand OpenMP's barriers and reports torch's threads as races. Its
extension therefore uses std::threads (csrc/thread_pool.cpp), and OpenMP gets one thread. It is not
used for the CUDA source on the CPU, which runs on fibers of one thread.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools.commands import ROOT, run

BUILD = ROOT / "build/sanitized"
CXX = os.environ.get("CXX", "g++")


def sources(folder: str) -> list[str]:
    """The paths of the C++ sources in a folder of the checkout."""
    return [str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.cpp")]


CPU = sources("csrc/cpu")
SOURCES = {
    "crc32": ["tests/cpp/test_crc32.cpp", "csrc/cpu/crc32.cpp"],
    "moments": ["tests/cpp/test_moments.cpp"],
    "kernels": ["tests/cpp/test_kernels.cpp", *CPU],
    "threads": ["tests/cpp/test_threads.cpp", *CPU],
    "updates": ["tests/cpp/test_updates.cpp", *CPU],
    "details": ["tests/cpp/test_details.cpp", *CPU],
    "distribution": ["tests/cpp/test_distribution.cpp", *CPU],
    "cuda_kernels": [
        "tests/cpp/test_cuda_kernels.cpp",
        "tests/cpp/test_cuda_elements.cpp",
        "tests/cpp/test_cuda_merge.cpp",
        "tests/cpp/test_cuda_engine.cpp",
        "tests/cpp/test_cuda_updates.cpp",
        "tests/cpp/test_cuda_details.cpp",
        *sources("tests/cpp/cuda_shim"),
        *sources("csrc/cuda"),
    ],
}


@dataclass(frozen=True)
class Sanitizer:
    """Compiler flags, libraries to preload, and the environment of the tests."""

    name: str
    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    environment: dict[str, str]
    extension_flags: tuple[str, ...] = ()


ADDRESS = Sanitizer(
    "address",
    ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    ("libasan.so", "libubsan.so", "libstdc++.so"),
    # Python frees little at its end. With malloc, small Python objects are checked, too.
    {"ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"},
)
THREAD = Sanitizer(
    "thread",
    ("-fsanitize=thread",),
    ("libtsan.so", "libstdc++.so"),
    {
        "TSAN_OPTIONS": f"exitcode=66 suppressions={BUILD}/suppressions",
        "OMP_THREAD_LIMIT": "1",  # for torch's own loops
        "OMP_NUM_THREADS": "4",  # the number of threads that torch reports and we use
    },
    ("-DPARAMSTATS_STD_THREADS",),
)
# glibc gives the memory of an ended thread to the next one, under a lock of its own.
SUPPRESSIONS = "race:_dl_deallocate_tls\n"

# Python tests that mostly run native code.
QUICK = "compile determinism inputs moments numerics summary untouched walk"
# Python tests that call native code from several threads.
THREADED = "determinism inputs numerics summary walk watch"
# Tests that cannot work under a preloaded sanitizer.
LEFT_OUT = [
    "tests/test_build.py",  # the compilers would run under the sanitizer, too
    "tests/test_fuzz.py::test_no_path_of_a_call_leaks_memory",  # a sanitizer keeps freed memory
    "tests/test_fuzz.py::test_a_leak_is_noticed",
    "tests/test_torch_abi.py::test_memory_does_not_grow",
]


def files(names: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in names.split()]


def cpp_tests(sanitizer: Sanitizer, *names: str) -> bool:
    """Compiles and runs C++ tests; prints their results and returns whether one failed."""
    folder = BUILD / sanitizer.name / "cpp"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += ["-D_GLIBCXX_ASSERTIONS", *sanitizer.flags]

    def compile_source(source: str) -> str:
        to = str(folder / f"{source.replace('/', '-')}.o")
        run(CXX, *flags, "-Itests/cpp/cuda_shim", "-c", "-x", "c++", source, "-o", to)
        return to

    needed = sorted({source for name in names for source in SOURCES[name]})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = dict(zip(needed, pool.map(compile_source, needed), strict=True))
    failed = False
    for name in names:
        program = str(folder / name)
        run(CXX, *flags, "-rdynamic", *(objects[file] for file in SOURCES[name]), "-o", program)
        failed |= run_tests([program], sanitizer, f"C++ {name}", cwd=ROOT)
    return failed


def copy_tree(tree: Path) -> None:
    """Makes `tree` a copy of the checkout's files; keeps what was built in `tree`."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    names = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    for path in [p for p in tree.rglob("*") if p.is_file()]:
        name = path.relative_to(tree).as_posix()
        is_built = name.startswith("build/") or path.name == "_build.json" or path.suffix == ".so"
        if not is_built and name not in names:
            path.unlink()
    for name in names:
        to = tree / name
        if not to.exists() or to.stat().st_mtime < (ROOT / name).stat().st_mtime:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to)


def python_tests(sanitizer: Sanitizer, title: str, *arguments: str) -> bool:
    """Builds the extension in a copy of the tree and runs pytest; returns whether a test failed."""
    tree = BUILD / sanitizer.name / "tree"
    tree.mkdir(parents=True, exist_ok=True)
    copy_tree(tree)
    flags = [*sanitizer.flags, *sanitizer.extension_flags, "-O1", "-g", "-D_GLIBCXX_ASSERTIONS"]
    run(
        *(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"),
        cwd=tree,
        CXX=CXX,
        PARAMSTATS_STRICT_BUILD="1",
        PARAMSTATS_CFLAGS=" ".join(flags),
        LDFLAGS=" ".join(sanitizer.flags),
    )
    libraries = [run(CXX, f"-print-file-name={n}").stdout.strip() for n in sanitizer.libraries]
    if not all(os.path.isabs(library) for library in libraries):
        sys.exit(f"expected g++ with sanitizers, got {CXX}, which lacks one of {libraries}")
    command = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "-rf"]
    environment = {"LD_PRELOAD": " ".join(libraries), "PARAMSTATS_STRICT_BUILD": "1"}
    environment |= {"PYTHONPATH": str(tree), "UBSAN_OPTIONS": "print_stacktrace=1"}
    title = f"Python {title}"
    return run_tests([*command, *arguments], sanitizer, title, tree, **environment)


def run_tests(
    command: list[str], sanitizer: Sanitizer, title: str, cwd: Path, **environment: str
) -> bool:
    """Runs tests and prints their result; returns whether one failed."""
    begin = time.monotonic()
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | sanitizer.environment | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        print(done.stdout)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout[-300:])
    outcome = "FAILED" if done.returncode else "ok"
    seconds = time.monotonic() - begin
    print(
        f"{title}, {sanitizer.name} sanitizer: {outcome}, {', '.join(counts)} ({seconds:.0f} s)",
        flush=True,
    )
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.sanitize")
    parser.add_argument(
        "--quick",
        nargs="?",
        const="all",
        choices=["all", "cpp", "python"],
        help="the part that checks every change, or one half of it; cpp needs no torch",
    )
    part = parser.parse_args().quick
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "suppressions").write_text(SUPPRESSIONS)
    if part:
        with ThreadPoolExecutor(2) as pool:  # one of the C++ tests is a minute of one thread
            python = part != "cpp" and pool.submit(
                python_tests, ADDRESS, "native code", *files(QUICK)
            )
            failed = part != "python" and (
                cpp_tests(ADDRESS, *SOURCES) | cpp_tests(THREAD, "threads")
            )
            return int(failed or (python and python.result()))
    failed = cpp_tests(ADDRESS, *SOURCES) | cpp_tests(THREAD, "kernels", "threads", "details")
    failed |= python_tests(ADDRESS, "all", *(f"--deselect={test}" for test in LEFT_OUT))
    return int(failed | python_tests(THREAD, "several threads", *files(THREADED)))


if __name__ == "__main__":
    sys.exit(main())
