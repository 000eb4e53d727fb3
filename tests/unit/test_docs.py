"""What the documents and the docstrings name is there: pages, sections of them, scripts."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "bench").rglob("*.md"))]
SOURCES = [path for room in ("src", "bench", "csrc", "tests") for path in sorted((ROOT / room).rglob("*.[pch]*"))]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        if ROOT / "bench" in there.parents and not (ROOT / "bench").exists():
            continue  # a source distribution has none
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


@pytest.mark.parametrize("name", ["test_reference_training.py", "test_wgm_bench.py"])
def test_a_source_distribution_can_read_its_tests(name: str, tmp_path: Path) -> None:
    """It has no bench/: a file of tests of what is there is skipped, and no error of all tests."""
    path = Path(shutil.copy(ROOT / "tests" / name, tmp_path))
    spec = importlib.util.spec_from_file_location("as_distributed", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(pytest.skip.Exception, match="a source distribution has no bench/"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_named_files_are_there() -> None:
    named = re.compile(r"\b(?:docs/\w+\.md|bench/\w+\.py)\b")
    for path in [*PAGES, *(path for path in SOURCES if path.suffix in (".py", ".cpp", ".h"))]:
        for name in named.findall(path.read_text(encoding="utf-8")):
            if (ROOT / name).parent.exists():  # a source distribution has no bench/
                assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"
