"""Callbacks that run after a module has been imported, without importing it."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfquant.registration import after_import


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "awaited_module.py").write_text("ready = False\nready = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield "awaited_module"
    sys.modules.pop("awaited_module", None)
    assert sys.meta_path == finders, "nothing stays behind"


def test_the_action_waits_for_the_whole_module(module):
    seen = []
    after_import(module, lambda: seen.append(sys.modules[module].ready))
    assert not seen
    assert module not in sys.modules
    assert importlib.import_module(module).ready
    assert seen == [True]
    importlib.reload(sys.modules[module])
    assert seen == [True]


def test_a_module_that_is_there_already(module):
    importlib.import_module(module)
    seen = []
    after_import(module, lambda: seen.append(1))
    assert seen == [1]


def test_asking_whether_the_module_is_installed_does_not_end_the_wait(module):
    seen = []
    after_import(module, lambda: seen.append(1))
    for _ in range(2):
        assert importlib.util.find_spec(module) is not None
    assert not seen
    importlib.import_module(module)
    assert seen == [1]


def test_a_module_that_is_missing_is_still_awaited(tmp_path, monkeypatch):
    finders, seen = list(sys.meta_path), []
    after_import("installed_later", lambda: seen.append(1))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("installed_later")
    (tmp_path / "installed_later.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    importlib.import_module("installed_later")
    sys.modules.pop("installed_later")
    assert seen == [1]
    assert sys.meta_path == finders


TRANSFORMERS_ALONE = """
import sys
import hfquant
assert not {"torch", "transformers", "diffusers"} & sys.modules.keys()
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
LlamaForCausalLM(config).save_pretrained("float")
model = LlamaForCausalLM.from_pretrained("float", quantization_config=hfquant.HfQuantConfig("w4a16"))
model.save_pretrained("quantized")
assert isinstance(LlamaForCausalLM.from_pretrained("quantized").model.layers[0].mlp.up_proj, hfquant.QuantLinear)
assert "diffusers" not in sys.modules
"""


def test_who_uses_transformers_alone_does_not_import_diffusers(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRANSFORMERS_ALONE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["loaders.unet", pytest.param("pipelines.free_noise_utils", marks=pytest.mark.slow)])
def test_a_module_that_is_adapted_may_be_the_first_of_diffusers(module: str) -> None:
    """It imports what registers with diffusers while it is still executing."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", f"import hfquant, diffusers.{module}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("transformers", "'hfquant' in sys.modules['transformers.quantizers.auto'].AUTO_QUANTIZER_MAPPING"),
        ("diffusers", "'hfquant' in sys.modules['diffusers.quantizers.auto'].AUTO_QUANTIZER_MAPPING"),
        ("adapters", "hfquant.integrations.adapters.LoraQuantLinear"),
    ],
)
def test_what_registers_may_be_imported_first(name: str, known: str) -> None:
    """The module imports its library while it is still executing, and that import in turn asks for the module."""
    code = f"import sys, hfquant.integrations.{name}\nassert {known}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
