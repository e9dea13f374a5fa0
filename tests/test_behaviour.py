"""Every row of docs/behaviour.md names an existing test."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def rows() -> list[list[str]]:
    lines = (ROOT / "docs/behaviour.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if row[0] != "behaviour" and row[0].strip("-")]


def test_every_row_names_tests_that_exist():
    for row in rows():
        assert len(row) == 4, f"{row}: behaviour, transformers, diffusers, test"
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[3])
        assert tests, f"{row[0]!r} names no test"
        for file, name in tests:
            source = (ROOT / file).read_text()
            assert re.search(rf"^\s*def {name}\(", source, re.MULTILINE), f"{row[0]!r}: {file} has no {name}"
