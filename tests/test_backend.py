"""Which backend runs and what is said of it; each case in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import paramstats
from paramstats._core import backend as backends

SUMMARIZE = """
import torch, paramstats
print(paramstats.backend().cpu)
print(paramstats.summarize({"w": torch.tensor([3.0, -4.0])})["w"].norm)
paramstats.summarize({"w": torch.ones(2)})
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("PARAMSTATS_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=keep | environment,
        cwd=os.sep,  # `-c` looks for packages in the working directory first
        timeout=300,
    )


def test_backend_tells_what_runs(backend):
    info = paramstats.backend()
    assert info.cpu == backend.name
    assert (info.cuda == "native") == (info.cuda_missing is None)
    assert (info.cuda == "native") == (backend.cuda is not None)
    assert len(info.cuda_devices) == torch.cuda.device_count()
    assert ("no device here" in str(info)) == (torch.cuda.device_count() == 0)
    if info.cuda == "native":
        assert "sm_" in info.cuda_architectures or "." in info.cuda_architectures
    elif backend.name == "native":
        assert f"why not native on CUDA: {info.cuda_missing}" in str(info)
    assert info.threads == torch.get_num_threads() and info.torch == torch.__version__
    if backend.name == "native":
        assert info.simd in ("avx512", "avx2", "plain") and info.missing is None
    else:
        assert info.simd is None and info.missing
    assert backend.name in str(info)


def test_forced_reference_is_quiet():
    result = run(SUMMARIZE, PARAMSTATS_BACKEND="reference")
    assert result.stdout.split() == ["reference", "5.0"] and result.stderr == ""


def test_forced_native(native):
    result = run(SUMMARIZE, PARAMSTATS_BACKEND="native")
    assert result.stdout.split() == ["native", "5.0"] and result.stderr == ""


def test_unknown_backend():
    result = run(SUMMARIZE, PARAMSTATS_BACKEND="gpu")
    assert result.returncode == 1
    assert "expected PARAMSTATS_BACKEND to be native or reference, got 'gpu'" in result.stderr


@pytest.mark.parametrize("level", ["avx2", "plain"])
def test_forced_simd_level(native, level):
    if level not in native.native.simd_levels():
        pytest.skip(f"this processor has no {level}")
    result = run("import paramstats; print(paramstats.backend().simd)", PARAMSTATS_SIMD=level)
    assert result.stdout.strip() == level
    assert "expected PARAMSTATS_SIMD" in run(SUMMARIZE, PARAMSTATS_SIMD="mmx").stderr


def copy_package(to: Path, record: dict | None) -> Path:
    """The package without its library, as an installation without a compiler has it."""
    source = Path(paramstats.__file__).parent
    package = to / "paramstats"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("*.so", "*.json", "__pycache__"))
    if record is not None:
        (package / "_build.json").write_text(json.dumps(record))
    return to


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (None, "it was never built"),
        ({"native": False, "reason": "no compiler here"}, "no compiler here"),
        ({"native": True, "torch": "1.2.3"}, "built for torch 1.2.3"),
        ({"native": True, "torch": torch.__version__}, "does not load"),
    ],
)
def test_a_missing_engine_is_said_once(tmp_path, record, said):
    path = copy_package(tmp_path, record)
    # An editable installation would find the library that the copy lacks.
    block = "import sys; sys.modules['paramstats._native'] = None\n"
    result = run(block + SUMMARIZE, PYTHONPATH=str(path))
    assert result.stdout.split() == ["reference", "5.0"], result.stderr
    assert result.stderr.count("RuntimeWarning") == 1
    assert said in result.stderr and "pip install" in result.stderr
    forced = run(block + SUMMARIZE, PYTHONPATH=str(path), PARAMSTATS_BACKEND="native")
    assert forced.returncode == 1 and "RuntimeError" in forced.stderr and said in forced.stderr


@pytest.mark.parametrize(("part", "loads"), [(1, False), (2, True)])
def test_a_library_for_another_torch(native, monkeypatch, part, loads):
    """Of another minor version it may not be loaded; of another patch version it is."""
    version = [int(number) for number in re.findall(r"\d+", torch.__version__)[:3]]
    version[part] += 1
    built_for = ".".join(map(str, version))
    monkeypatch.setattr(backends, "_record", lambda: {"native": True, "torch": built_for})
    found, missing = backends._load_native()
    if loads:
        assert found is native.native and missing is None
    else:
        assert found is None and f"built for torch {built_for} and this is torch" in missing


def test_import_brings_torch_and_nothing_else():
    code = """
import sys, torch
before = set(sys.modules)
import paramstats
new = {m.partition(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(new - {"paramstats"}))
"""
    assert run(code).stdout.strip() == "[]"


def test_versions_are_compared_by_number():
    assert backends._minor("2.13.0+cpu") == (2, 13) != backends._minor("2.1.3")
