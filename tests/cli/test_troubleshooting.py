"""docs/troubleshooting.md is keyed by messages that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADINGS = re.findall(r"^### (.+)$", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)


def templates() -> list[str]:
    """Every text in the code, with … for the parts filled in at run time."""
    found = []
    for file in [*(ROOT / "ftfast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEMPLATES = templates()


@pytest.mark.parametrize("heading", HEADINGS)
def test_message_exists(heading):
    words = [re.escape(part) for part in heading.split("…")]
    pattern = re.compile(".*".join(words), re.DOTALL)
    assert any(pattern.search(template) for template in TEMPLATES), heading


def test_headings_are_distinct():
    assert len(HEADINGS) == len(set(HEADINGS)) > 30
