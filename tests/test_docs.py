"""What the documents say is run: every docstring example, every block of the README and docs."""

from __future__ import annotations

import doctest
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness import backends

ROOT = Path(__file__).parents[1]
NEEDS = {
    "torch": "torch",
    "tensorflow": "tensorflow",
    "jax": "jax",
    "keras": "keras-",
    "flax": "flax-",
}
_WITH_NUMBA = ("numpy._compiled", "numpy._numba", "numpy._threads")  # which the tests may lack
FILES = [
    path.relative_to(folder)
    for folder in (ROOT / "normkit", ROOT / "backends")
    for path in sorted(folder.rglob("*.py"))
]
MODULES = [
    ".".join(("normkit", *path.with_suffix("").parts)).removesuffix(".__init__") for path in FILES
]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
]


def available(name: str) -> bool:
    chosen = backends.chosen()
    if name.endswith(_WITH_NUMBA) and find_spec("numba") is None:
        return False
    return all(
        any(c.startswith(needed) for c in chosen)
        for framework, needed in NEEDS.items()
        if re.search(rf"\b{framework}\b", name)
    )


@pytest.mark.parametrize("name", [m for m in MODULES if available(m)])
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("block", [b for b in BLOCKS if available(b.values[0])])
def test_blocks(block):
    exec(compile(block, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
