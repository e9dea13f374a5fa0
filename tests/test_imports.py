"""What hfquant may import."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNSAFE = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def test_nothing_is_pickled() -> None:
    found = []
    for path in (ROOT / "hfquant").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
                names = ["pickle"]
            else:
                continue
            found += [f"{path.relative_to(ROOT)}:{node.lineno}" for name in names if name.partition(".")[0] in UNSAFE]
    assert found == []
