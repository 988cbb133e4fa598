"""What the documentation shows is what happens: docstrings, and the code of README and docs."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

from docs import blocks

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in ROOT.glob("paramstats/**/*.py")
    if ">>> " in path.read_text()
)
DOCS = list(ROOT.glob("docs/*.md"))
PAGES = [
    "README.md",
    *sorted(f"docs/{p.name}" for p in DOCS if "```python" in p.read_text()),
]
NUMBER = re.compile(r"^-?\d[\d.,]*(e[+-]\d+)?%?$")


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module, backend):
    try:
        results = doctest.testmod(importlib.import_module(module))
    except ImportError as error:
        pytest.skip(str(error))
    assert results.failed == 0
    assert results.attempted > 0


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # trainers', of theirs
@pytest.mark.parametrize("page", PAGES)
def test_pages(page, capsys, folder):
    for _ in run_page(page, capsys):
        pass


def test_the_readme_with_each_backend(backend, capsys, folder):
    for _ in run_page("README.md", capsys):
        pass


def run_page(page, capsys):
    """Runs a page's Python blocks in order, and yields what is defined after each; a text block
    after one is what it printed."""
    parts = re.findall(r"```(python|text)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    printed = ""
    for kind, text in parts:
        if kind == "python":
            try:
                exec(compile(text, page, "exec"), namespace)
            except ImportError as error:
                pytest.skip(f"{page} needs more: {error}")
            printed = capsys.readouterr().out
            yield namespace
        else:
            assert_same_up_to_rounding(printed, text)


def assert_same_up_to_rounding(printed: str, shown: str) -> None:
    left, right = printed.split(), shown.split()
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if NUMBER.match(a) and NUMBER.match(b):
            numbers = [float(x.replace(",", "").removesuffix("%")) for x in (a, b)]
            assert numbers[0] == pytest.approx(numbers[1], rel=2e-3), (a, b)
        else:
            assert a == b


def test_every_environment_variable_is_documented():
    sources = [*ROOT.glob("paramstats/*.py"), ROOT / "setup.py"]
    used = {v for path in sources for v in re.findall(r"PARAMSTATS_[A-Z_]+", path.read_text())}
    readme = (ROOT / "README.md").read_text()
    assert {v for v in used if v not in readme} == set()


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{p.name}" for p in DOCS)])
def test_no_recorded_block_is_empty(page):
    text = (ROOT / page).read_text()
    names = re.findall(r"^<!-- (\S+):begin -->$", text, re.MULTILINE)
    assert [name for name in names if not blocks.content(text, name).strip()] == []
