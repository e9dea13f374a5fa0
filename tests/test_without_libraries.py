"""Without transformers and diffusers, hfquant can be imported and quantizes plain modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Both an import and ``find_spec`` behave as if neither library were installed.
HIDDEN = """
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec

class WithoutLibraries(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("transformers", "diffusers")
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutLibraries
for library in ("transformers", "diffusers"):
    assert find_spec(library) is None
    try:
        __import__(library)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{library} is not hidden")

import torch
from torch import nn
import hfquant

torch.manual_seed(0)
torch.set_num_threads(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(24, 64), nn.Linear(64, 24), nn.Linear(24, 5)

    def forward(self, x):
        gate, value = self.up(x).chunk(2, -1)
        return self.head(x + self.down(torch.cat([nn.functional.silu(gate), value], -1)))

model, data = Net(), [torch.randn(8, 24) for _ in range(4)]
x = data[0]
exact = model(x).detach()

def check(worst):
    error = ((model(x) - exact).norm() / exact.norm()).item()
    assert 0 < error < worst, error
"""

TASKS = {
    "every public name": "assert all(getattr(hfquant, name) is not None for name in hfquant.__all__)",
    "data-free": """
for preset in ("w8a8-dynamic", "w4a16", "fp8-dynamic"):
    hfquant.quantize(model, None, preset)
    assert all(isinstance(getattr(model, n), hfquant.QuantLinear) for n in ("up", "down", "head"))
    check(0.2)
    model = Net()
    exact = model(x).detach()
""",
    "calibrated": """
gptq = {"opt": {"type": "default"}, "calib": {"type": "gptq"}, "weight_quant": {"type": "int4", "group_size": 16}}
config = {"default": {**gptq, "input_quant": {"type": "int8"}}, "down": {"opt": {"type": "smooth"}}}
assert hfquant.plan(model, config, x).layers["down"].input_segments == (32, 32)
hfquant.quantize(model, data, config)
assert model.down.plan.config.calib.type == "gptq"
assert model.down.plan.dual == (True, False)
assert len(model.quant_report.layers) == 3
check(0.2)
fake = model(x)
hfquant.set_real_quant(model)
torch.testing.assert_close(model(x), fake, rtol=1e-4, atol=1e-4)
""",
    "layer by layer, resumed and back": """
import tempfile
with tempfile.TemporaryDirectory() as folder:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hfquant.quantize(model, data, "w4a16-gptq", per_layer_mode=True, resume_dir=folder)
    first = model(x)
    other = Net()
    other.load_state_dict(state)
    hfquant.quantize(other, data, "w4a16-gptq", per_layer_mode=True, resume_dir=folder)
    assert torch.equal(other(x), first)
hfquant.dequantize(model)
assert type(model.up) is nn.Linear
check(0.2)
""",
    "the state of one module in another": """
hfquant.quantize(model, data, "w8a8")
other = Net()
hfquant.quantize(other, data, "w8a8")
other.load_state_dict(model.state_dict())
assert torch.equal(other(x), model(x))
""",
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("task", TASKS)
def test_without_either_library(task: str) -> None:
    script = HIDDEN + TASKS[task] + "\nassert not {'transformers', 'diffusers'} & sys.modules.keys()\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
