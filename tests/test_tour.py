"""docs/tour.md is a program: its Python blocks run in order, in one namespace, and their assertions hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

TOUR = Path(__file__).parents[1] / "docs" / "tour.md"


def test_tour_runs() -> None:
    text = TOUR.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python")
    assert sum("assert " in block[1] for block in blocks) == len(blocks) - 1  # all but the imports prove something
    namespace: dict[str, Any] = {"__name__": "tour"}
    for block in blocks:
        # Blank lines in front make the line numbers of a failure those of the page.
        padding = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(padding + block[1], str(TOUR), "exec"), namespace)


def test_tour_links_to_files_that_exist() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", TOUR.read_text())
    assert targets
    assert [target for target in targets if not (TOUR.parent / target).exists()] == []
