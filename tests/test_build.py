"""Building the native backend, or installing without it: what setup.py leaves and reports.

The builds use a tiny source in place of csrc/, and a fake NVRTC, because they test setup.py and
tools/cubins.py alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paramstats._core import nvrtc
from tests import fake_nvrtc
from tests.conftest import run_python
from tools import cubins, wheels

ROOT = Path(__file__).parent.parent
STUB = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native"};
PyMODINIT_FUNC PyInit__native() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", 42);
  return module;
}
"""
KERNELS = '#pragma once\n#include "block.h"\nkernels\n'
FLAT = "block\nkernels\n"


@pytest.fixture
def checkout(tmp_path):
    """A copy of the checkout with the stub, and with the record of an earlier build."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "kernels")
    for name in ("paramstats", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "csrc/binding.cpp").write_text(STUB)
    (tmp_path / "csrc/cuda/kernels.h").write_text(KERNELS)
    (tmp_path / "csrc/cuda/block.h").write_text('#pragma once\n#include "kernels.h"\nblock\n')
    (tmp_path / "paramstats/_build.json").write_text('{"native": true}')
    return tmp_path


def run_setup(checkout: Path, *arguments: str, **environment: str) -> Any:
    environment["CUDA_HOME"] = os.devnull
    return run_python("setup.py", *arguments, cwd=checkout, **environment)


def build(checkout: Path, **environment: str) -> dict[str, object]:
    """Return the record of a build into build/lib."""
    result = run_setup(checkout, "build", "--build-lib", "build/lib", **environment)
    assert result.returncode == 0, result.stderr
    assert (checkout / "build/lib/paramstats/py.typed").exists()
    return record_of(checkout)


def record_of(checkout: Path) -> dict[str, object]:
    return json.loads((checkout / "build/lib/paramstats/_build.json").read_text())


def test_a_working_compiler_builds_a_library_that_loads(checkout):
    record = build(checkout)
    assert record["native"] is True, record
    (library,) = (checkout / "build/lib/paramstats").glob("_native*.so")
    spec = importlib.util.spec_from_file_location("_native", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.answer == 42


def test_after_a_failed_build_in_place_the_package_runs_and_says_why(checkout):
    """The record of the earlier build must be replaced, and torch operators are used."""
    result = run_setup(checkout, "build_ext", "--inplace", CC="false", CXX="false")
    assert result.returncode == 0, result.stderr
    record = json.loads((checkout / "paramstats/_build.json").read_text())
    assert record["native"] is False and "it could not be compiled" in record["reason"]
    code = """
import torch, paramstats
for _ in range(2):
    print(paramstats.summarize({"w": torch.tensor([3.0, -4.0])})["w"].norm)
print(paramstats.backend().cpu)
"""
    result = run_python("-c", code, cwd=checkout)
    assert result.stdout.split() == ["5.0", "5.0", "reference"], result.stderr
    assert result.stderr.count("RuntimeWarning") == 1 and record["reason"] in result.stderr


def fake_torch(checkout: Path, text: str) -> str:
    """Return a folder for PYTHONPATH that has another torch."""
    (checkout / "fake/torch").mkdir(parents=True)
    (checkout / "fake/torch/__init__.py").write_text(text)
    return str(checkout / "fake")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ImportError('none here')", "ImportError: none here"),
        ("__version__ = '2.9.1+cpu'", "ImportError: torch 2.9.1+cpu is too old"),
    ],
)
def test_without_torch_the_build_fails_and_says_what_to_do(checkout, text, reason):
    path = fake_torch(checkout, text)
    result = run_setup(checkout, "build", PYTHONPATH=path)
    assert result.returncode != 0
    assert f"compiling needs torch >= 2.10, and {sys.executable} imports none" in result.stderr
    assert reason in result.stderr and "--no-build-isolation" in result.stderr

    record = build(checkout, PYTHONPATH=path, PARAMSTATS_NO_NATIVE="1")
    assert record["native"] is False


def test_a_source_archive_needs_no_torch(checkout):
    path = fake_torch(checkout, "raise ImportError('none here')")
    result = run_setup(checkout, "sdist", PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    assert len(list((checkout / "dist").glob("*.tar.gz"))) == 1


def test_the_build_finds_the_torch_that_pip_hides(checkout):
    """The environment has torch through a .pth file. pip leaves only the build's requirements."""
    environment, overlay = checkout / "environment", checkout / "overlay"
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/*/site-packages")
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    overlay.mkdir()
    for name in ("setuptools", "_distutils_hack", "pybind11"):
        folder = Path(importlib.util.find_spec(name).origin).parent
        (overlay / name).symlink_to(folder)
    hide = "import sys; sys.path = [path for path in sys.path if 'site-packages' not in path]"
    (overlay / "sitecustomize.py").write_text(hide)

    python = str(environment / "bin/python")
    variables = os.environ | {"PYTHONPATH": str(overlay), "CUDA_HOME": os.devnull}
    hidden = subprocess.run([python, "-c", "import torch"], env=variables, capture_output=True)
    assert b"No module named 'torch'" in hidden.stderr
    command = [python, "setup.py", "build", "--build-lib", "build/lib"]
    result = subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert record_of(checkout)["native"] is True


def kernels_in(package: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in (package / "kernels").iterdir()}


def compiled(*architectures: int) -> dict[str, str]:
    """What a build with the fake NVRTC leaves."""
    made = {f"sm_{n}.cubin": fake_nvrtc.cubin(n, FLAT).decode() for n in architectures}
    return {"kernels.cu": FLAT, **made}


def test_a_torch_without_cuda_needs_no_cubins(checkout):
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    (checkout / "build/lib/paramstats/kernels").mkdir(parents=True)
    (checkout / "build/lib/paramstats/kernels/sm_90.cubin").write_text("of an earlier build")
    record = build(checkout, PARAMSTATS_STRICT_BUILD="1")
    assert record["cuda_compiler"] == "" and record["cuda_reason"] == "torch has no CUDA"
    assert kernels_in(checkout / "build/lib/paramstats") == compiled()


def test_the_nvrtc_of_the_variable_compiles_the_cubins(checkout):
    variables = {nvrtc.VARIABLE: fake_nvrtc.library()}
    record = build(checkout, **variables)
    assert record["cuda_compiler"] == "NVRTC 12.9" and record["cuda_reason"] == ""
    assert kernels_in(checkout / "build/lib/paramstats") == compiled(*cubins.ARCHITECTURES)

    variables["TORCH_CUDA_ARCH_LIST"] = "7.0;9.0 10.1+PTX"
    record = build(checkout, **variables)
    assert record["cuda_reason"] == "NVRTC 12.9 does not compile them for sm_70, sm_101"
    assert kernels_in(checkout / "build/lib/paramstats") == compiled(90)


def test_cubins_are_in_the_package_after_a_build_in_place(checkout):
    variables = {nvrtc.VARIABLE: fake_nvrtc.library(), "TORCH_CUDA_ARCH_LIST": "9.0"}
    result = run_setup(checkout, "build_ext", "--inplace", **variables)
    assert result.returncode == 0, result.stderr
    assert kernels_in(checkout / "paramstats") == compiled(90)


def test_a_wheel_contains_its_own_cubins_and_not_those_of_the_checkout(checkout):
    pytest.importorskip("wheel", reason="wheel is not installed")
    (checkout / "paramstats/kernels").mkdir()
    (checkout / "paramstats/kernels/sm_80.cubin").write_text("of a build in place")
    variables = {nvrtc.VARIABLE: fake_nvrtc.library(), "TORCH_CUDA_ARCH_LIST": "9.0"}
    result = run_setup(checkout, "bdist_wheel", **variables)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next((checkout / "dist").glob("*.whl"))) as wheel:
        found = {
            Path(name).name: wheel.read(name).decode()
            for name in wheel.namelist()
            if re.fullmatch(r"paramstats/kernels/.+", name)
        }
    assert found == compiled(90)


@pytest.mark.parametrize("library", ["fails", "missing"])
def test_cubins_that_cannot_be_compiled_fail_only_strict_builds(checkout, library):
    (checkout / "csrc/cuda/kernels.h").write_text("FAIL\n")
    path = fake_nvrtc.library() if library == "fails" else "/missing.so"
    record = build(checkout, **{nvrtc.VARIABLE: path})
    reason = "NVRTC_ERROR_COMPILATION" if library == "fails" else "/missing.so"
    assert record["native"] is True and reason in record["cuda_reason"]
    assert kernels_in(checkout / "build/lib/paramstats") == {"kernels.cu": "FAIL\n"}

    strict = {nvrtc.VARIABLE: path, "PARAMSTATS_STRICT_BUILD": "1"}
    result = run_setup(checkout, "build", **strict)
    assert result.returncode != 0 and "PARAMSTATS_STRICT_BUILD is set" in result.stderr
    assert reason in result.stderr


FAKE_NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release 12.4, V12.4.131";;
  --list-gpu-code) printf 'sm_70\\nsm_75\\nsm_80\\nsm_90\\n';;
  *90*) echo "nvcc fatal: no host compiler" >&2; exit 1;;
  *) first=$1; while [ $# -gt 1 ]; do [ "$1" = --output-file ] && echo "$first" > "$2"; shift; done
esac
"""


@pytest.fixture
def toolkit(tmp_path):
    """A folder with an nvcc 12.4 that knows sm_70 to sm_90 and cannot compile for sm_90.

    Its cubin is the first option.
    """
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").write_text(FAKE_NVCC)
    (tmp_path / "bin/nvcc").chmod(0o755)
    return str(tmp_path)


def test_the_order_of_compilers(toolkit, monkeypatch):
    monkeypatch.delenv(nvrtc.VARIABLE, raising=False)
    monkeypatch.setattr(cubins.nvrtc, "find", lambda: "the NVRTC of torch")
    assert cubins.find_compiler(toolkit, None) is None
    assert str(cubins.find_compiler(toolkit, "12.8")) == "nvcc 12.4"
    assert str(cubins.find_compiler(toolkit, "13.0")) == "nvcc 12.4"
    assert cubins.find_compiler(toolkit, "11.8") == "the NVRTC of torch"
    assert cubins.find_compiler(None, "12.8") == "the NVRTC of torch"
    assert cubins.find_compiler("/missing", "12.8") == "the NVRTC of torch"
    monkeypatch.setenv(nvrtc.VARIABLE, "set")
    assert cubins.find_compiler(toolkit, None) == "the NVRTC of torch"


def test_a_build_without_a_compiler_for_the_kernels_says_so(tmp_path, monkeypatch):
    def none() -> None:
        raise OSError("NVRTC was not found")

    monkeypatch.delenv(nvrtc.VARIABLE, raising=False)
    monkeypatch.setattr(cubins.nvrtc, "find", none)
    folder = tmp_path / "new/kernels"
    assert cubins.build(folder, None, "12.8") == ("", "neither nvcc nor NVRTC was found")
    assert [path.name for path in folder.iterdir()] == ["kernels.cu"]


def test_the_nvcc_of_the_toolkit_compiles_the_cubins_if_torch_has_cuda(checkout, toolkit):
    """As far as setup.py and torch.utils.cpp_extension can tell, this torch has CUDA."""
    (checkout / "fake").mkdir()
    (checkout / "fake/sitecustomize.py").write_text(
        "import torch\ntorch.version.cuda = '12.8'\ntorch._C._cuda_getDeviceCount = lambda: 0\n"
    )
    result = run_python(
        *("setup.py", "build", "--build-lib", "build/lib"),
        cwd=checkout,
        CUDA_HOME=toolkit,
        PYTHONPATH=str(checkout / "fake"),
        TORCH_CUDA_ARCH_LIST="7.0 7.5 8.0",
    )
    assert result.returncode == 0, result.stderr
    record = record_of(checkout)
    assert record["cuda_compiler"] == "nvcc 12.4"
    assert record["cuda_reason"] == "nvcc 12.4 does not compile them for sm_70"
    made = {"sm_75.cubin": "--std=c++17\n", "sm_80.cubin": "--std=c++17\n"}
    assert kernels_in(checkout / "build/lib/paramstats") == {"kernels.cu": FLAT, **made}


def test_nvcc_compiles_what_it_knows(toolkit, tmp_path):
    nvcc = cubins.Nvcc(toolkit)
    folder = tmp_path / "kernels"
    assert cubins.write(folder, nvcc, (70, 75, 80, 100)) == ["sm_70", "sm_100"]
    made = {"sm_75.cubin": "--std=c++17\n", "sm_80.cubin": "--std=c++17\n"}
    assert {path.name: path.read_text() for path in folder.glob("*.cubin")} == made
    with pytest.raises(cubins.nvrtc.CompileError, match="nvcc failed\nnvcc fatal: no host"):
        cubins.write(folder, nvcc, (90,))


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("", cubins.ARCHITECTURES),
        ("9.0", (90,)),
        ("8.0;9.0a+PTX 12.0", (80, 90, 120)),
        ("Hopper", cubins.ARCHITECTURES),
    ],
)
def test_architectures_can_be_requested(monkeypatch, listed, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert cubins.requested() == expected


def test_a_flat_source_contains_each_file_once():
    source = cubins.flatten(ROOT / "csrc/cuda/kernels.h")
    assert '#include "' not in source and "#pragma once" not in source
    assert source.count("struct Moments {") == 1
    assert source.index("struct Moments {") < source.index("paramstats_summarize_chunks(")


def test_the_native_backend_can_be_left_out(checkout):
    record = build(checkout, PARAMSTATS_NO_NATIVE="1")
    assert record["native"] is False and record["reason"] == "PARAMSTATS_NO_NATIVE was set"


def test_a_strict_build_fails_without_the_native_backend(checkout):
    result = run_setup(checkout, "build", PARAMSTATS_STRICT_BUILD="1", CXX="false")
    assert result.returncode != 0 and "PARAMSTATS_STRICT_BUILD is set" in result.stderr


def test_the_compiler_of_wheels_needs_no_earlier_build(tmp_path, monkeypatch):
    """A new checkout has no folder build."""
    monkeypatch.setattr(wheels, "ROOT", tmp_path)
    monkeypatch.setitem(sys.modules, "ziglang", SimpleNamespace(__file__="/bin/__init__.py"))
    compiler = Path(wheels.portable_compiler())
    assert compiler.is_relative_to(tmp_path) and os.access(compiler, os.X_OK)
