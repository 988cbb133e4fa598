"""NVRTC: finding the library, errors, and the kernels compiled by a real one where there is one.

A real NVRTC is that of the variable PARAMSTATS_NVRTC, or that of torch or the system.
"""

from __future__ import annotations

import ctypes.util
import shutil
from pathlib import Path

import pytest

from paramstats._core import images, nvrtc
from tests import fake_nvrtc
from tests.conftest import run_python
from tools import cubins

ROOT = Path(__file__).parent.parent
KERNELS = (b"paramstats_summarize_chunks", b"paramstats_merge_chunks")


def test_the_fake_library_compiles():
    library = nvrtc.Nvrtc(fake_nvrtc.library())
    assert str(library) == "NVRTC 12.9"
    assert library.architectures == fake_nvrtc.ARCHITECTURES
    assert library.compile("text", 90) == fake_nvrtc.cubin(90, "text")


def test_an_error_contains_the_log():
    library = nvrtc.Nvrtc(fake_nvrtc.library())
    with pytest.raises(nvrtc.CompileError) as caught:
        library.compile("FAIL", 90)
    first, *log = str(caught.value).splitlines()
    assert first == "nvrtcCompileProgram: NVRTC_ERROR_COMPILATION (6)"
    assert log[1] == "kernels.cu(7): error: expected a ';'"


def test_another_library_is_refused():
    name = ctypes.util.find_library("m")
    if name is None:
        pytest.skip("the mathematical library of C was not found")
    with pytest.raises(OSError, match="is no usable NVRTC"):
        nvrtc.Nvrtc(name)


def place(folder: Path, library: str, package: str = "cuda_nvrtc") -> None:
    """Copy a library to where NVIDIA's packages have it."""
    target = folder / "nvidia" / package / "lib"
    target.mkdir(parents=True)
    shutil.copy(library, target)


def found(tmp_path: Path, before: str = "", **environment: str) -> str:
    """Return what `find` returns or raises in a process without torch, whose path is `tmp_path`."""
    code = f"""
import ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location("nvrtc", {nvrtc.__file__!r})
nvrtc = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nvrtc)
sys.path = [{str(tmp_path)!r}]
{before}
try:
    print(nvrtc.find())
except OSError as error:
    print(error)
"""
    result = run_python("-I", "-c", code, **environment)
    assert result.stderr == ""
    return result.stdout.strip()


def test_the_variable_alone_counts_if_it_is_set(tmp_path):
    library = fake_nvrtc.library(minor=8)
    place(tmp_path, fake_nvrtc.library(9, "libnvrtc.so.12"))
    assert found(tmp_path, PARAMSTATS_NVRTC=library) == "NVRTC 12.8"
    message = found(tmp_path, PARAMSTATS_NVRTC="/missing.so")
    assert message.startswith("the NVRTC library of PARAMSTATS_NVRTC cannot be used: /missing.so")


def test_the_packages_of_nvidia_are_found_the_newest_first(tmp_path):
    place(tmp_path, fake_nvrtc.library(9, "libnvrtc.so.12"))
    assert found(tmp_path) == "NVRTC 12.9"
    place(tmp_path, fake_nvrtc.library(10, "libnvrtc.so.13"), "cu13")
    assert found(tmp_path) == "NVRTC 12.10"


def test_the_working_directory_is_searched_as_python_does(tmp_path):
    """It is an empty string in `sys.path` of an interactive session."""
    place(tmp_path / "work", fake_nvrtc.library(9, "libnvrtc.so.12"))
    change = f"import os; os.chdir({str(tmp_path / 'work')!r}); sys.path = ['']"
    assert found(tmp_path, change) == "NVRTC 12.9"


def test_the_library_that_is_loaded_comes_first(tmp_path):
    """So NVRTC is that of torch, which a driver for this torch can use."""
    place(tmp_path, fake_nvrtc.library(10, "libnvrtc.so.13"), "cu13")
    loaded = f"library = ctypes.CDLL({fake_nvrtc.library(9, 'libnvrtc.so.12')!r})"
    assert found(tmp_path, loaded) == "NVRTC 12.9"


def test_what_the_linker_finds_comes_last(tmp_path):
    linker = str(Path(fake_nvrtc.library(10, "libnvrtc.so.13")).parent)
    assert found(tmp_path, LD_LIBRARY_PATH=linker) == "NVRTC 12.10"
    place(tmp_path, fake_nvrtc.library(9, "libnvrtc.so.12"))
    assert found(tmp_path, LD_LIBRARY_PATH=linker) == "NVRTC 12.9"


def test_without_any_the_error_names_what_was_looked_for(tmp_path):
    message = found(tmp_path)
    if message.startswith("NVRTC 1"):
        pytest.skip(f"the dynamic linker finds {message}")
    assert message.startswith("NVRTC was not found; set PARAMSTATS_NVRTC to the path of libnvrtc")


@pytest.fixture(scope="module")
def real():
    try:
        return nvrtc.find()
    except OSError as error:
        pytest.skip(f"{error}; set {nvrtc.VARIABLE} to the path of a library")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", cubins.ARCHITECTURES)
def test_a_real_one_compiles_the_kernels(real, architecture):
    if architecture not in real.architectures:
        pytest.skip(f"{real} does not know sm_{architecture}")
    source = cubins.flatten(ROOT / "csrc/cuda/kernels.h")
    cubin = real.compile(source, architecture)
    assert cubin.startswith(b"\x7fELF") and all(name in cubin for name in KERNELS)
    if architecture == 90:
        assert real.compile(source, architecture) == cubin  # every time the same bytes


def test_a_real_one_reports_errors_of_the_source(real, tmp_path, monkeypatch):
    (tmp_path / "kernels.cu").write_text("__global__ void kernel() { missing(); }")
    monkeypatch.setattr(images, "FOLDER", tmp_path)
    monkeypatch.setattr(images, "_compilations", {})
    monkeypatch.setenv("PARAMSTATS_CACHE", "")
    reason = images.find((9, 0), wait=True)
    assert "NVRTC_ERROR_COMPILATION" in reason and '"missing" is undefined' in reason
