"""The documentation is correct: its code prints what it shows, and its lists are complete."""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from docs import blocks
from paramstats import FindingCode, Thresholds

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in ROOT.glob("paramstats/**/*.py")
    if ">>> " in path.read_text()
)
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
)
WITH_CODE = [page for page in PAGES if "```python" in (ROOT / page).read_text()]
NUMBER = re.compile(r"^-?\d[\d.,]*(e[+-]\d+)?%?$")


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module, backend):
    try:
        results = doctest.testmod(importlib.import_module(module))
    except ImportError as error:
        pytest.skip(str(error))
    assert results.failed == 0
    assert results.attempted > 0


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # from the trainers
@pytest.mark.parametrize("page", WITH_CODE)
def test_code_of_pages(page, capsys, folder):
    for _ in run_page(page, capsys):
        pass


def test_code_of_readme_with_each_backend(backend, capsys, folder):
    for _ in run_page("README.md", capsys):
        pass


def run_page(page: str, capsys: pytest.CaptureFixture[str]) -> Iterator[dict[str, object]]:
    """Run the Python blocks of a page in order; yield the namespace after each.

    A text block must show what the Python block before it printed, up to rounding.
    """
    parts = re.findall(r"```(python|text)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    printed = ""
    for language, text in parts:
        if language == "python":
            try:
                exec(compile(text, page, "exec"), namespace)
            except ImportError as error:
                pytest.skip(f"{page} needs an optional library: {error}")
            printed = capsys.readouterr().out
            yield namespace
        else:
            assert_equal_up_to_rounding(printed, text)


def assert_equal_up_to_rounding(printed: str, shown: str) -> None:
    actual, expected = printed.split(), shown.split()
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        if NUMBER.match(a) and NUMBER.match(b):
            x, y = (float(word.replace(",", "").removesuffix("%")) for word in (a, b))
            assert x == pytest.approx(y, rel=2e-3), (a, b)
        else:
            assert a == b


def test_every_environment_variable_is_documented():
    sources = [*ROOT.glob("paramstats/**/*.py"), ROOT / "setup.py"]
    used = {v for path in sources for v in re.findall(r"PARAMSTATS_[A-Z_]+", path.read_text())}
    page = (ROOT / "docs/install.md").read_text()
    assert {v for v in used if f"`{v}=" not in page} == set()


def test_every_finding_code_is_documented():
    page = (ROOT / "docs/findings.md").read_text()
    assert set(re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE)) == set(
        FindingCode.__members__
    )


def test_every_threshold_is_documented_with_its_default():
    page = (ROOT / "docs/findings.md").read_text()
    rows = re.findall(r"^\| `([a-z_]+)` \| ([\d.e-]+) \|", page, re.MULTILINE)
    documented = {name: float(default) for name, default in rows}
    assert documented == {field.name: field.default for field in fields(Thresholds)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)", (ROOT / page).read_text())
    for target in targets:
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_no_generated_block_is_empty(page):
    text = (ROOT / page).read_text()
    names = re.findall(r"^<!-- (\S+):begin -->$", text, re.MULTILINE)
    assert [name for name in names if not blocks.content(text, name).strip()] == []
