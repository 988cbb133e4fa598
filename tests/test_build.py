"""Building the native backend, or installing without it: what setup.py leaves and reports.

The builds use a tiny source in place of csrc/, because they test setup.py alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import run_python

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
    (tmp_path / "paramstats/_build.json").write_text('{"native": true, "torch": "2.13.0"}')
    return tmp_path


def run_setup(checkout: Path, *arguments: str, **environment: str) -> Any:
    environment["CUDA_HOME"] = os.devnull
    return run_python("setup.py", *arguments, cwd=checkout, **environment)


def build(checkout: Path, **environment: str) -> dict[str, object]:
    """Return the record of a build into build/lib."""
    result = run_setup(checkout, "build", "--build-lib", "build/lib", **environment)
    assert result.returncode == 0, result.stderr
    assert (checkout / "build/lib/paramstats/py.typed").exists()
    return json.loads((checkout / "build/lib/paramstats/_build.json").read_text())


def test_a_working_compiler_builds_a_library_that_loads(checkout):
    record = build(checkout)
    assert record["native"] is True and record["torch"] == torch.__version__, record
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


def test_without_torch_at_build_time_the_build_succeeds_and_says_why(checkout):
    fake = checkout / "fake/torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ImportError('none here')")
    record = build(checkout, PYTHONPATH=str(fake.parent))
    assert record["native"] is False
    reason = "torch could not be imported when it was built (none here)"
    assert record["reason"] == reason


def test_the_native_backend_can_be_left_out(checkout):
    record = build(checkout, PARAMSTATS_NO_NATIVE="1")
    assert record["native"] is False and record["reason"] == "PARAMSTATS_NO_NATIVE was set"


def test_a_strict_build_fails_without_the_native_backend(checkout):
    result = run_setup(checkout, "build", PARAMSTATS_STRICT_BUILD="1", CXX="false")
    assert result.returncode != 0 and "PARAMSTATS_STRICT_BUILD is set" in result.stderr
