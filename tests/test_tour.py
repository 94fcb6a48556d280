"""Pages that are programs: their Python blocks run in order, in one namespace, and their assertions hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
pages = pytest.mark.parametrize("page", [DOCS / "tour.md", DOCS / "torch.md"], ids=lambda page: page.name)


@pages
def test_page_runs(page: Path) -> None:
    text = page.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python")
    assert sum("assert " in block[1] for block in blocks) >= len(blocks) - 1  # all but the imports prove something
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in blocks:
        # Blank lines in front make the line numbers of a failure those of the page.
        padding = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(padding + block[1], str(page), "exec"), namespace)


@pages
def test_page_links_to_files_that_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert targets
    assert [target for target in targets if not (page.parent / target).exists()] == []
