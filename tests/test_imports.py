"""What hfquant may import, and which file may read private attributes of libraries."""

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


# Attributes that libraries keep on modules and configs, by the one file that may use them.
PRIVATE = {
    "hfquant/offload.py": {"_hf_hook", "_diffusers_hook", "_old_forward"},
    "hfquant/integrations/compat.py": {
        *("_internal_dict", "_is_hf_initialized", "_weight_conversions"),
        *("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_experts_implementation"),
    },
}


def test_private_attributes_of_libraries_are_read_in_one_file() -> None:
    found = []
    for path in (ROOT / "hfquant").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        foreign = set().union(*(names for file, names in PRIVATE.items() if file != name))
        for node in ast.walk(ast.parse(path.read_text())):
            said = getattr(node, "attr", getattr(node, "value", None))  # x.name, getattr(x, "name")
            if isinstance(said, str) and said in foreign:
                found.append(f"{name}:{node.lineno}: {said}")
    assert found == []
