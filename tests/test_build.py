"""Building the native backend, or installing without it: what setup.py leaves and reports.

The builds use a tiny source in place of csrc/, because they test setup.py alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import run_python
from tools import wheels

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


@pytest.fixture
def checkout(tmp_path):
    """A copy of the checkout with the stub, and with the record of an earlier build."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    shutil.copytree(
        ROOT / "paramstats",
        tmp_path / "paramstats",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/binding.cpp").write_text(STUB)
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
