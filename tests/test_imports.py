"""What hfquant may import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNSAFE = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}

QUANTIZE_WITHOUT_LIBRARIES = """
import sys
from importlib.machinery import PathFinder

class WithoutLibraries(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("transformers", "diffusers")
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutLibraries

import torch
from torch import nn
import hfquant

model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))
data = [torch.randn(4, 8)]
assert len(hfquant.plan(model).layers) == 2
hfquant.quantize(model, data)
assert all(isinstance(model[i], hfquant.QuantLinear) for i in (0, 2))
assert model(data[0]).isfinite().all()
hfquant.dequantize(model)
assert not any(isinstance(module, hfquant.QuantLinear) for module in model.modules())
"""


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


def test_a_plain_module_is_quantized_where_neither_library_is_installed() -> None:
    done = subprocess.run([sys.executable, "-c", QUANTIZE_WITHOUT_LIBRARIES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
