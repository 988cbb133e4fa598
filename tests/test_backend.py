"""Which backend is used, and what is said if it is not the native one."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import paramstats
from paramstats._core import backend as backends
from paramstats._core import images, loading
from tests.conftest import run_python


def test_backend_describes_the_backend_in_use(backend):
    info = paramstats.backend()
    assert info.cpu == backend.name
    assert (info.cuda == "native") == (info.cuda_missing is None)
    assert (info.cuda == "native") == (backend.cuda is not None)
    assert len(info.cuda_devices) == torch.cuda.device_count()
    assert ("no device here" in str(info)) == (torch.cuda.device_count() == 0)
    if info.cuda == "native":
        assert info.cuda_kernels in str(info)
    elif backend.name == "native":
        assert f"why not native on CUDA: {info.cuda_missing}" in str(info)
    assert info.threads == torch.get_num_threads() and info.torch == torch.__version__
    if backend.name == "native":
        assert info.simd in ("avx512", "avx2", "neon", "plain") and info.missing is None
    else:
        assert info.simd is None and info.missing
    assert backend.name in str(info)


@pytest.fixture
def unchosen(monkeypatch):
    """Let the next call choose the backend, as the first call of a process does."""
    monkeypatch.setattr(backends, "_active", None)
    monkeypatch.delenv("PARAMSTATS_BACKEND", raising=False)
    monkeypatch.delenv("PARAMSTATS_SIMD", raising=False)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_forced_backend_is_used_without_a_warning(request, unchosen, monkeypatch, name):
    if name == "native":
        request.getfixturevalue("native")
        monkeypatch.setattr(backends, "_active", None)
    monkeypatch.setenv("PARAMSTATS_BACKEND", name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paramstats.summarize({"w": torch.tensor([3.0, -4.0])})["w"].norm == 5.0
    assert paramstats.backend().cpu == name


def test_an_unknown_backend_is_an_error(unchosen, monkeypatch):
    monkeypatch.setenv("PARAMSTATS_BACKEND", "gpu")
    message = "expected PARAMSTATS_BACKEND to be native or reference, got 'gpu'"
    for call in (paramstats.backend, lambda: paramstats.summarize({"w": torch.ones(2)})):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_simd_level_can_be_forced(simd_level, unchosen, monkeypatch):
    monkeypatch.setenv("PARAMSTATS_SIMD", simd_level)
    assert paramstats.backend().simd == simd_level
    monkeypatch.setattr(backends, "_active", None)
    monkeypatch.setenv("PARAMSTATS_SIMD", "mmx")
    with pytest.raises(ValueError, match=r"expected PARAMSTATS_SIMD to be one of .*got 'mmx'"):
        paramstats.backend()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs have one level only")
def test_the_simd_levels_are_those_of_the_cpu(native):
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip("this system has no /proc/cpuinfo")
    flags = set(re.search(r"^flags\s*: (.*)$", info.read_text(), re.MULTILINE)[1].split())
    needed = {
        "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx2", "fma", "f16c"},
        "avx2": {"avx2", "fma", "f16c"},
        "plain": set(),
    }
    expected = [level for level, instructions in needed.items() if instructions <= flags]
    assert native.native.simd_levels() == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "it was never built"),
        ("[no json", "it was never built"),
        ({"native": False, "reason": "no compiler here"}, "no compiler here"),
        ({"native": True}, "does not load"),
    ],
)
def test_a_missing_native_backend_is_reported_once(unchosen, monkeypatch, tmp_path, record, reason):
    if record is not None:
        text = record if isinstance(record, str) else json.dumps(record)
        (tmp_path / "_build.json").write_text(text)
    monkeypatch.setattr(loading, "_PACKAGE", tmp_path)
    monkeypatch.setitem(sys.modules, "paramstats._native", None)  # an import of it fails
    monkeypatch.setattr(backends, "_extensions", None)
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        norms = [paramstats.summarize({"w": torch.ones(4)})["w"].norm for _ in range(2)]
    assert norms == [2.0, 2.0] and paramstats.backend().cpu == "reference"
    assert len(caught) == 1 and "pip install" in str(caught[0].message)
    assert reason in paramstats.backend().missing
    with pytest.raises(RuntimeError, match=rf"PARAMSTATS_BACKEND=native\), but .*{reason}"):
        backends.choose("native")


def test_a_module_built_on_another_torch_loads(native, monkeypatch):
    monkeypatch.setattr(loading, "_build_record", lambda: {"native": True, "torch": "1.2.3"})
    assert loading.load() == (native.native, None)


@pytest.mark.parametrize("cubins", [("sm_80", "sm_90"), ()])
def test_a_torch_with_cuda_on_a_machine_without_a_gpu(
    native, unchosen, monkeypatch, tmp_path, cubins
):
    for name in cubins:
        (tmp_path / f"{name}.cubin").touch()
    monkeypatch.setattr(images, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(backends, "_extensions", None)
    info = paramstats.backend()
    kernels = "cubins for sm_80 sm_90" if cubins else "compiled at the first use"
    assert info.cuda == "native" and info.cuda_missing is None and info.cuda_kernels == kernels
    assert f"CUDA tensors  no device here; native ({kernels})" in str(info)
    assert "why not" not in str(info)


def test_the_kernels_are_not_for_amd_gpus(native, unchosen, monkeypatch):
    """A torch for them calls its devices "cuda", too."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(backends, "_extensions", None)
    info = paramstats.backend()
    assert info.cuda == "reference" and "do not run on AMD GPUs" in info.cuda_missing


def test_import_brings_torch_and_nothing_else():
    """Optional libraries would be a dependency, and torch._dynamo takes seconds to import."""
    code = """
import sys, torch
before = set(sys.modules)
import paramstats
new = set(sys.modules) - before
assert "torch._dynamo" not in new
new = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names)
assert new == {"paramstats"}, new
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("setup", ["", "sys._is_gil_enabled = lambda: True"], ids=["none", "gil"])
def test_python_with_the_gil_is_supported(setup):
    result = run_python("-c", f"import sys, torch; {setup}\nimport paramstats")
    assert result.returncode == 0, result.stderr


def test_free_threaded_python_is_refused_with_one_line():
    """Without the GIL, reading a model that another thread changes would read freed memory."""
    code = "import sys, torch; sys._is_gil_enabled = lambda: False; import paramstats"
    result = run_python("-c", code)
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ImportError: paramstats: expected Python with the GIL")
    assert "PYTHON_GIL=1" in error
