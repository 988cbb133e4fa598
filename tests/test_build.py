"""setup.py builds the native backend, or installs without it and records the reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_backend import SUMMARIZE, run

ROOT = Path(__file__).parent.parent


def build(to: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    keep = {k: v for k, v in os.environ.items() if not k.startswith("PARAMSTATS_")}
    command = [sys.executable, "setup.py", "build", "--build-base", str(to), "--build-lib"]
    return subprocess.run(
        [*command, str(to / "lib")],
        cwd=ROOT,
        env=keep | environment,
        capture_output=True,
        text=True,
    )


def check_reference(to: Path, reason: str) -> None:
    """The build has no native backend, works, and warns once with the reason."""
    record = json.loads((to / "lib/paramstats/_build.json").read_text())
    assert record["native"] is False and reason in record["reason"]
    assert (to / "lib/paramstats/py.typed").exists()
    result = run(SUMMARIZE, PYTHONPATH=str(to / "lib"))
    assert result.stdout.split() == ["reference", "5.0"], result.stderr
    assert result.stderr.count("RuntimeWarning") == 1 and reason in result.stderr


def test_a_failing_compiler_gives_the_reference_backend(tmp_path):
    result = build(tmp_path, CC="false", CXX="false")
    assert result.returncode == 0, result.stderr
    check_reference(tmp_path, "it could not be compiled")


def test_a_failing_build_in_place_replaces_the_record_of_an_earlier_build(tmp_path):
    """Editable installations are built in place."""
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.so", "tests")
    )
    (tree / "paramstats/_build.json").write_text('{"native": true, "torch": "2.13.0"}')
    keep = {k: v for k, v in os.environ.items() if not k.startswith("PARAMSTATS_")}
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env=keep | {"CC": "false", "CXX": "false"},
        check=True,
        capture_output=True,
    )
    record = json.loads((tree / "paramstats/_build.json").read_text())
    assert record["native"] is False and "could not be compiled" in record["reason"]


def test_a_build_without_torch_gives_the_reference_backend(tmp_path):
    fake = tmp_path / "fake/torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ImportError('none here')")
    result = build(tmp_path, PYTHONPATH=str(fake.parent))
    assert result.returncode == 0, result.stderr
    check_reference(tmp_path, "torch could not be imported when it was built (none here)")


def test_no_native_build_on_request(tmp_path):
    assert build(tmp_path, PARAMSTATS_NO_NATIVE="1").returncode == 0
    check_reference(tmp_path, "PARAMSTATS_NO_NATIVE was set")


def test_a_strict_build_fails_where_the_compiler_fails(tmp_path):
    result = build(tmp_path, CC="false", CXX="false", PARAMSTATS_STRICT_BUILD="1")
    assert result.returncode != 0 and "PARAMSTATS_STRICT_BUILD is set" in result.stderr


@pytest.mark.slow
def test_a_working_compiler_gives_the_native_backend(tmp_path, native):
    result = build(tmp_path)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "lib/paramstats").glob("_native*.so"))
    output = run(SUMMARIZE, PYTHONPATH=str(tmp_path / "lib"))
    assert output.stdout.split() == ["native", "5.0"] and output.stderr == ""
