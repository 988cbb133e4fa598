"""The kernels for a GPU: from the package, the disk cache, or NVRTC in the background."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from paramstats._core import cubin_cache, images, nvrtc
from tests import fake_nvrtc
from tests.conftest import run_python

SOURCE = "the source of the kernels"


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """The folder of the package's kernels, with cubins; an empty cache; no NVRTC."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "kernels.cu").write_text(SOURCE)
    for number in (75, 80, 90, 100, 120):
        (folder / f"sm_{number}.cubin").write_text(f"shipped {number}")
    monkeypatch.setattr(images, "FOLDER", folder)
    monkeypatch.setattr(images, "_compilations", {})
    monkeypatch.setenv(cubin_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(nvrtc.VARIABLE, str(tmp_path / "no NVRTC"))
    return folder


@pytest.fixture
def only_source(kernels, tmp_path, monkeypatch):
    """The same without cubins, and with a fake NVRTC. Returns the file that counts its uses."""
    for file in kernels.glob("*.cubin"):
        file.unlink()
    monkeypatch.setenv(nvrtc.VARIABLE, fake_nvrtc.library())
    monkeypatch.setenv("FAKE_NVRTC_COUNT", str(tmp_path / "count"))
    return tmp_path / "count"


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """The fake NVRTC compiles only once this file exists."""
    monkeypatch.setenv("FAKE_NVRTC_WAIT", str(tmp_path / "gate"))
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


def forget(monkeypatch):
    """Continue as a new process would."""
    monkeypatch.setattr(images, "_compilations", {})


@pytest.mark.parametrize(
    ("capability", "number"),
    [
        ((7, 5), 75),
        ((8, 0), 80),
        ((8, 6), 80),
        ((8, 9), 80),
        ((9, 0), 90),
        ((10, 0), 100),
        ((10, 3), 100),
        ((12, 0), 120),
        ((12, 1), 120),
    ],
)
def test_the_cubin_of_the_same_major_version_is_used(kernels, capability, number):
    image = images.find(capability)
    assert image == images.Image(f"shipped {number}".encode(), f"cubin sm_{number}")


def test_the_highest_cubin_that_fits_is_used(kernels):
    """Code for 8.7, which is Tegra, runs there only."""
    for number in (86, 87, 89):
        (kernels / f"sm_{number}.cubin").write_text(f"shipped {number}")
    found = [images.find((8, minor)) for minor in (0, 6, 7, 8, 9)]
    assert [image.origin for image in found] == [f"cubin sm_{n}" for n in (80, 86, 87, 86, 89)]


def test_available_names_the_cubins(kernels):
    assert images.available() == ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
    (kernels / "sm_75.cubin").rename(kernels / "sm_75 (1).cubin")
    assert images.available()[0] == "sm_80"


@pytest.mark.parametrize("capability", [(5, 0), (7, 0), (7, 2)])
def test_older_gpus_are_refused(kernels, capability):
    reason = images.find(capability, wait=True)
    assert "is below 7.5" in reason and not isinstance(reason, images.NotYet)


def test_without_nvrtc_the_reason_says_so(kernels):
    for _ in range(2):
        reason = images.find((13, 0))
        assert "compute capability 13.0 cannot be compiled" in reason
        assert nvrtc.VARIABLE in reason and not isinstance(reason, images.NotYet)


def test_an_architecture_that_nvrtc_does_not_know(only_source):
    reason = images.find((13, 0), wait=True)
    assert "NVRTC 12.9 does not know this compute capability" in reason and "newer torch" in reason
    assert not only_source.exists()


@pytest.mark.parametrize(
    ("capability", "number"), [((8, 9), 80), ((10, 0), 100), ((10, 3), 103), ((12, 1), 120)]
)
def test_nvrtc_compiles_for_the_highest_architecture_that_fits(only_source, capability, number):
    image = images.find(capability, wait=True)
    assert image.data == fake_nvrtc.cubin(number, SOURCE)
    assert image.origin == f"compiled by NVRTC 12.9 for sm_{number}"


def test_cubins_of_desktop_gpus_are_not_used_on_tegra(kernels, monkeypatch):
    monkeypatch.setenv(nvrtc.VARIABLE, fake_nvrtc.library())
    assert images.find((8, 7), wait=True).origin == "compiled by NVRTC 12.9 for sm_87"


def test_a_cubin_that_cannot_be_read_is_compiled(only_source, kernels):
    (kernels / "sm_90.cubin").mkdir()
    assert images.find((9, 0), wait=True).origin == "compiled by NVRTC 12.9 for sm_90"


def test_it_compiles_in_the_background_and_once(only_source, gate):
    for _ in range(3):
        reason = images.find((9, 0))
        assert isinstance(reason, images.NotYet) and "9.0 are being compiled" in reason
    gate.touch()
    image = images.find((9, 0), wait=True)
    assert image.data == fake_nvrtc.cubin(90, SOURCE)
    assert images.find((9, 0)) is image
    assert only_source.read_text() == "x"


def test_a_later_process_reads_the_cache(only_source, monkeypatch):
    first = images.find((9, 0), wait=True)
    forget(monkeypatch)
    assert images.find((9, 0)) == first  # at once: no thread is needed
    assert only_source.read_text() == "x"

    forget(monkeypatch)
    monkeypatch.setenv(nvrtc.VARIABLE, fake_nvrtc.library(minor=8))
    assert images.find((9, 0), wait=True).origin == "compiled by NVRTC 12.8 for sm_90"
    assert only_source.read_text() == "xx"


def test_a_damaged_cache_is_compiled_again(only_source, tmp_path, monkeypatch):
    first = images.find((9, 0), wait=True)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    for expected in ("xx", "xx"):
        forget(monkeypatch)
        assert images.find((9, 0), wait=True) == first
        assert only_source.read_text() == expected


def test_a_cache_that_cannot_be_written_is_no_error(only_source, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    for expected in ("x", "xx"):
        forget(monkeypatch)
        assert images.find((9, 0), wait=True).data == fake_nvrtc.cubin(90, SOURCE)
        assert only_source.read_text() == expected


def test_an_error_of_nvrtc_is_the_reason_and_is_not_tried_again(only_source, kernels, gate):
    (kernels / "kernels.cu").write_text("FAIL")
    assert isinstance(images.find((9, 0)), images.NotYet)
    gate.touch()
    for _ in range(2):
        reason = images.find((9, 0), wait=True)
        assert "NVRTC_ERROR_COMPILATION" in reason
        assert reason.endswith("kernels.cu(7): error: expected a ';'")
        assert not isinstance(reason, images.NotYet)
    assert only_source.read_text() == "x"


def test_without_the_source_the_reason_says_so(only_source, kernels):
    (kernels / "kernels.cu").unlink()
    reason = images.find((9, 0), wait=True)
    assert "kernels.cu" in reason and not isinstance(reason, images.NotYet)


def test_several_threads_ask_at_once(only_source, gate):
    """They may start more than one compilation, but get the same; later calls start no more."""
    results = []
    barrier = threading.Barrier(8)

    def ask():
        barrier.wait()
        results.append(images.find((9, 0), wait=True))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    fake_nvrtc.wait_until_compiling(only_source)
    gate.touch()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert {image.data for image in results} == {fake_nvrtc.cubin(90, SOURCE)}
    started = only_source.read_text()
    assert images.find((9, 0)).data == results[0].data
    assert only_source.read_text() == started


def test_after_an_interrupt_the_next_call_starts_it(only_source, monkeypatch):
    find = nvrtc.find

    def interrupted():
        monkeypatch.setattr(nvrtc, "find", find)
        raise KeyboardInterrupt

    monkeypatch.setattr(nvrtc, "find", interrupted)
    with pytest.raises(KeyboardInterrupt):
        images.find((9, 0))
    assert images.find((9, 0), wait=True).data == fake_nvrtc.cubin(90, SOURCE)


def run(code: str, kernels: Path) -> None:
    """Run `code` in a process of its own, with the environment of this test and without torch."""
    start = f"""
import os, sys, threading, types
from pathlib import Path
package = sys.modules["paramstats"] = types.ModuleType("paramstats")
package.__path__ = [{str(Path(images.__file__).parent.parent)!r}]
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from paramstats._core import images
from tests import fake_nvrtc
images.FOLDER = Path({str(kernels)!r})
count, gate = (Path(os.environ["FAKE_NVRTC_" + name]) for name in ("COUNT", "WAIT"))
"""
    variables = {k: v for k, v in os.environ.items() if k.startswith("PARAMSTATS_")}
    result = run_python("-W", "ignore", "-c", start + code, **variables)
    assert result.returncode == 0 and result.stderr == "", result.stderr


def test_a_process_that_ends_waits_for_nvrtc(only_source, kernels, gate, tmp_path):
    """The gate opens when the main thread has ended. The cache has the result afterwards."""
    code = """
def open_the_gate():
    threading.main_thread().join()
    fake_nvrtc.wait_until_compiling(count)
    gate.touch()
threading.Thread(target=open_the_gate).start()
assert isinstance(images.find((9, 0)), images.NotYet)
"""
    run(code, kernels)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_forked_child_does_not_wait_for_a_thread_that_it_lacks(only_source, kernels, gate):
    code = """
assert isinstance(images.find((9, 0)), images.NotYet)
fake_nvrtc.wait_until_compiling(count)
child = os.fork()
if child == 0:
    reason = images.find((9, 0), wait=True)
    os._exit(0 if "forked" in reason and not isinstance(reason, images.NotYet) else 1)
assert os.waitpid(child, 0)[1] == 0
gate.touch()
image = images.find((9, 0), wait=True)
child = os.fork()
if child == 0:
    os._exit(0 if images.find((9, 0)) == image else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    run(code, kernels)


def test_threads_of_the_process_may_have_a_small_stack(only_source, kernels, gate):
    code = """
gate.touch()
threading.stack_size(64 * 1024)
threads = [threading.Thread(target=images.find, args=((9, 0), True)) for _ in range(2)]
for thread in threads:
    thread.start()
    thread.join()
assert threading.stack_size() == 64 * 1024
assert isinstance(images.find((9, 0)), images.Image)
"""
    run(code, kernels)


def test_eight_processes_compile_and_read_the_cache_at_once(only_source, kernels, gate, tmp_path):
    code = """
children = []
for _ in range(8):
    child = os.fork()
    if child == 0:
        while not gate.exists():
            pass
        data = [images.find(pair, wait=True).data for pair in ((9, 0), (8, 0), (10, 3))]
        source = (images.FOLDER / "kernels.cu").read_text()
        os._exit(0 if data == [fake_nvrtc.cubin(n, source) for n in (90, 80, 103)] else 1)
    children.append(child)
gate.touch()
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
"""
    run(code, kernels)
    assert 3 <= len(only_source.read_text()) <= 24
    assert len(list((tmp_path / "cache").iterdir())) == 3
