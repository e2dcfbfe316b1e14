"""Every page of the documentation runs: its python blocks in order, each printing exactly the text block under it."""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```)?", re.M | re.S)


def run_page(text):
    """[(code, promised output or None, printed)] of a page's blocks, run in one namespace."""
    names, out = {"__name__": "page"}, []
    for code, promised in BLOCK.findall(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "page", "exec"), names)
        out.append((code, promised, printed.getvalue()))
    return out


LONG = {
    f"{n}.md"
    for n in (
        "adaspa",
        "algebra",
        "divprune",
        "experts",
        "icbs",
        "lapp",
        "loraprune",
        "models",
        "sparse_training",
        "zero_tprune",
    )
}
NAMES = sorted(p.name for p in PAGES.glob("*.md") if "```python" in p.read_text())


@pytest.mark.parametrize("page", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in NAMES])
def test_the_page_runs_and_prints_what_it_says(page):
    blocks = run_page((PAGES / page).read_text())
    assert blocks
    for code, promised, printed in blocks:
        assert printed.strip() == promised.strip(), f"after\n{code}"


def test_a_wrong_page_is_noticed():
    (block,) = run_page("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
    assert block[1:] == ("3\n", "2\n")
