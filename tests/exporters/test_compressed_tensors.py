"""Exports to compressed-tensors: the bytes of its own compressor, equal weights in plain transformers, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from safetensors.torch import load_file
from torch import Tensor, nn

import hfquant
from hfquant.exporters import ExportError
from hfquant.nn.linear import QuantLinear
from hfquant.nn.modules import quant_layers
from tests.exporters.schemes import CHANNEL, GROUPS, IDS, SCHEMES, TOKEN, config, quantized
from tests.integrations import small_models

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[nn.Module, Path]]:
    """Map a scheme's name to a model quantized with it and its export folder. Do not modify either."""

    @cache
    def made(name: str) -> tuple[nn.Module, Path]:
        model, folder = quantized(SCHEMES[name]), tmp_path_factory.mktemp(name)
        hfquant.set_real_quant(model, False)
        hfquant.export(model, folder)
        return model, folder

    return made


def scheme_of(folder: Path, name: str) -> Any:
    """Return the scheme of a layer as compressed-tensors itself reads config.json."""
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    found = QuantizationConfig.model_validate(section)
    linear = nn.Linear(1, 1)
    schemes = [s for s in found.config_groups.values() if is_match(name, linear, s.targets, found.ignore)]
    assert len(schemes) == 1, name
    return schemes[0]


def stored(folder: Path, name: str) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == name}


def float_state(layer: QuantLinear) -> dict[str, Tensor]:
    """Return the input of compressed-tensors' compressor: float weight, scales, zero points."""
    grid = layer.grid()
    assert grid.scale is not None
    state = {"weight": layer.effective_weight(), "weight_scale": grid.scale}
    if grid.zero_point is not None:
        state["weight_zero_point"] = grid.zero_point
    if layer.plan.static_input:
        state["input_scale"] = layer.input_scale
    return state


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_are_those_of_its_own_compressor(name: str, exported: Callable[[str], tuple[nn.Module, Path]]) -> None:
    model, folder = exported(name)
    for layer_name, layer in quant_layers(model).items():
        scheme = scheme_of(folder, layer_name)
        assert scheme.format == infer_module_format(nn.Linear, scheme)
        expected = BaseCompressor.get_value_from_registry(scheme.format).compress(float_state(layer), scheme)
        found = stored(folder, layer_name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype, key
            assert torch.equal(found[key].double(), tensor.double()), key


def activations(x: Tensor, layer: QuantLinear) -> Tensor:
    """Round inputs as compressed-tensors does, float64: integers in [-128, 127]; dynamic scales put amax at 127.5."""
    quant = layer.plan.config.input_quant
    if quant is None:
        return x.double()
    x = x.double()
    integer = quant.format.is_integer
    if not quant.dynamic:
        scale = layer.input_scale.double()
    else:
        amax = x.abs().amax() if quant.axis is None else x.abs().amax(-1, keepdim=True)
        scale = amax / (127.5 if integer else 448.0)
    codes = x / scale
    codes = codes.round().clamp(-128, 127) if integer else codes.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.double() * scale


@pytest.mark.parametrize("name", SCHEMES)
def test_plain_transformers_has_the_same_weights_and_outputs(
    name: str, exported: Callable[[str], tuple[nn.Module, Path]]
) -> None:
    model, folder = exported(name)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    logits = loaded(IDS).logits  # the first forward decompresses
    for key, layer in quant_layers(model).items():
        linear = loaded.get_submodule(key)
        assert torch.equal(linear.weight, layer.effective_weight()), key
        x = torch.randn(2, 5, layer.in_features)
        exact = activations(x, layer) @ layer.effective_weight().double().T
        # A tie that rounds the other way in float32 shifts one input by one step.
        assert (linear(x) - exact).norm() < 2e-3 * exact.norm(), key
    ours = model(IDS).logits
    quant = SCHEMES[name]["input_quant"]
    # Inputs are rounded differently: ties in float32, and dynamic INT8 scales differ by a factor of 127.5 / 127.
    most = 1e-5 if quant is None else 2e-2
    assert (logits - ours).norm() < most * ours.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["w8a8-dynamic", "w4a16-asymmetric"])
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """transformers keeps scales in the model's dtype, so both the scale and the product are rounded."""
    model = quantized(SCHEMES[name], dtype)
    hfquant.export(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    loaded(IDS)
    exact = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    exact(IDS)
    for key, layer in quant_layers(model).items():
        weight = layer.effective_weight()
        error = (loaded.get_submodule(key).weight.float() - weight).abs()
        assert (error <= 1.01 * torch.finfo(dtype).eps * weight.abs() + 1e-7).all(), key
        assert torch.equal(exact.get_submodule(key).weight, weight), key


def check_same_weights(folder: Path, model: nn.Module, kind: Any = None, prefix: str = "") -> None:
    kind = kind or type(model)
    loaded, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    for module in loaded.modules():
        if hasattr(module, "quantization_scheme"):  # the first forward does this for all modules at once
            BaseCompressor.get_value_from_registry(module.quantization_scheme.format.value).decompress_module(module)
    for name, layer in quant_layers(model).items():
        assert torch.equal(loaded.get_submodule(name.removeprefix(prefix)).weight, layer.effective_weight()), name
    own = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), QuantLinear) and name.startswith(prefix):
            assert torch.equal(own[name.removeprefix(prefix)], tensor), name


MIXED = {"*.down_proj": {"weight_quant": CHANNEL}, "*.1.self_attn.*": {"enable": False}}


def test_several_schemes_and_layers_left_in_float(tmp_path: Path) -> None:
    model = quantized(SCHEMES["w4a16"], **MIXED)
    hfquant.export(model, tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert len(section["config_groups"]) == 2
    check_same_weights(tmp_path, model)
    check_same_weights(tmp_path, model, transformers.AutoModel, "model.")


def test_asymmetric_weights_beside_others_take_a_byte_a_code(tmp_path: Path) -> None:
    """transformers could not load them packed."""
    model = quantized(SCHEMES["w4a16-asymmetric"], **{"*.mlp.*": SCHEMES["w8a8-dynamic"]})
    hfquant.export(model, tmp_path)
    assert stored(tmp_path, "model.layers.0.self_attn.q_proj")["weight"].dtype == torch.int8
    check_same_weights(tmp_path, model)
    check_same_weights(tmp_path, model, transformers.AutoModel, "model.")


def test_storage_of_several_kinds_is_mixed_precision(tmp_path: Path) -> None:
    model = quantized(SCHEMES["w4a16"], **{"*.mlp.*": SCHEMES["fp8-dynamic"]})
    hfquant.export(model, tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert section["format"] == "mixed-precision"
    assert {group["format"] for group in section["config_groups"].values()} == {"pack-quantized", "float-quantized"}
    check_same_weights(tmp_path, model)


def test_weights_that_are_a_mere_cast_are_float_weights(tmp_path: Path) -> None:
    model = quantized(SCHEMES["w4a16"], **{"*.mlp.*": {"weight_quant": {"type": "bf16"}}})
    hfquant.export(model, tmp_path)
    check_same_weights(tmp_path, model)
    only = quantized({"weight_quant": {"type": "bf16"}, "input_quant": None})
    with pytest.raises(ExportError, match="no layer has a scale"):
        hfquant.export(only, tmp_path / "only")


def test_a_quantized_head_is_no_longer_tied(tmp_path: Path) -> None:
    model = quantized(SCHEMES["w4a16"], lm_head={"enable": True})
    hfquant.export(model, tmp_path)
    assert "lm_head" in quant_layers(model)
    check_same_weights(tmp_path, model)


def test_shards(tmp_path: Path) -> None:
    model = quantized(SCHEMES["w4a16-asymmetric"])
    hfquant.export(model, tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-0*.safetensors"))) > 2
    check_same_weights(tmp_path, model)
    check_same_weights(tmp_path, model, transformers.AutoModel, "model.")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a16"])
@pytest.mark.parametrize("name", ["llama", "phi3", "t5_encoder", "bart"])
def test_architectures_of_odd_widths(name: str, scheme: str, tmp_path: Path) -> None:
    """77 columns, fused projections, a class that initializes weights by name, one embedding shared three times."""
    model = hfquant.quantize(getattr(small_models, name)(), None, config(SCHEMES[scheme]))
    hfquant.export(model, tmp_path)
    check_same_weights(tmp_path, model)


def test_output_segments_are_scales_of_channels(tmp_path: Path) -> None:
    """phi3's fused projections: one scale per row segment is exported as one scale per row, with repeats."""
    scheme = {"weight_quant": {"type": "int8"}, "input_quant": None}
    model = hfquant.quantize(small_models.phi3(), None, {"default": {**scheme, "opt": {"type": "default"}}})
    layer = model.model.layers[0].self_attn.qkv_proj
    assert len(layer.plan.output_segments) > 1
    hfquant.export(model, tmp_path)
    check_same_weights(tmp_path, model)


def test_offloaded_weights_are_fetched(tmp_path: Path) -> None:
    quantized(SCHEMES["w4a16"]).save_pretrained(tmp_path / "ours")
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map = parts | {"model.layers.0": "disk", "model.layers.1": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    hfquant.export(model, tmp_path / "theirs")
    check_same_weights(tmp_path / "theirs", quantized(SCHEMES["w4a16"]))


SMOOTH = {"opt": {"type": "smooth"}, "weight_quant": CHANNEL, "input_quant": TOKEN}
SVD = {"opt": {"type": "svd", "low_rank": 4}, "weight_quant": GROUPS, "input_quant": None}
REFUSED = [
    (config(SMOOTH), r"its input is transformed at run time \(smooth\): 'model\.layers\.0\.self_attn\.q_proj'"),
    (config(SVD), r"transformed at run time \(smooth, svd_down, svd_up\)"),
    (
        config({"weight_quant": {"type": "int4", "group_size": 48}, "input_quant": None}),
        r"differ in size \(48 and 16\)",
    ),
    (
        {"default": {"opt": {"type": "default"}, "weight_quant": CHANNEL, "input_quant": TOKEN}},
        r"its input segments have separate scales|second scale for negative values",
    ),
]


@pytest.mark.parametrize(
    ("settings", "message"), REFUSED, ids=["smooth", "svd", "short groups", "segments, dual scale"]
)
def test_what_it_lacks_is_refused_or_rounded_anew(
    settings: dict[str, Any], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = hfquant.quantize(small_models.llama_of_64(), [{"input_ids": IDS}], settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ExportError, match=message) as caught:
        hfquant.export(model, tmp_path / "refused")
    assert "requantize=True" in str(caught.value)
    assert not list(tmp_path.iterdir())
    hfquant.export(model, tmp_path / "made", requantize=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    loaded(IDS)
    floor = 14 if "int4" in json.dumps(settings) else 35
    for name, layer in quant_layers(model).items():
        weight = layer.effective_weight()
        error = loaded.get_submodule(name).weight - weight
        assert 10 * torch.log10(weight.square().sum() / error.square().sum().clamp(min=1e-30)) > floor, name
    assert "requantized for the export" in caplog.text


def test_dual_scale_alone_keeps_the_codes(tmp_path: Path) -> None:
    settings = {"seglinear": False, "opt": {"type": "default"}, "weight_quant": CHANNEL, "input_quant": TOKEN}
    model = hfquant.quantize(small_models.bart(), None, {"default": settings})
    dual = [name for name, layer in quant_layers(model).items() if any(layer.plan.dual)]
    assert dual
    hfquant.export(model, tmp_path, requantize=True)
    check_same_weights(tmp_path, model)


def test_folded_smoothing_is_exported_as_it_is(tmp_path: Path) -> None:
    folding = {"type": "smooth", "fold": True}
    settings = config({**SMOOTH, "opt": folding}, **{"*.o_proj": {"enable": False}, "*.down_proj": {"enable": False}})
    model = hfquant.quantize(small_models.llama_of_64(), [{"input_ids": IDS}], settings)
    assert all(layer.plan.folded for layer in quant_layers(model).values())
    hfquant.export(model, tmp_path)
    check_same_weights(tmp_path, model)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"weight_quant": {"type": "int16"}, "input_quant": None}, "int16 weights are not supported, only "),
        ({"weight_quant": {"type": "fp8e5m2"}, "input_quant": None}, "fp8e5m2 weights are not supported, only "),
        (
            {"weight_quant": CHANNEL, "input_quant": {**TOKEN, "type": "int16"}},
            "int16 inputs are not supported with int8",
        ),
    ],
)
def test_formats_that_it_has_not_are_refused_also_when_rounding_anew(
    scheme: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = quantized(scheme)
    with pytest.raises(ExportError, match=f"{message}.*model.layers.0.*\nquantize these layers differently, or excl"):
        hfquant.export(model, tmp_path, requantize=True)


# A process without hfquant loads the exported folders.
ELSEWHERE = """
import sys
import torch
import transformers
from safetensors.torch import save_file

transformers.utils.logging.disable_progress_bar()
ids = torch.arange(24).view(2, 12) % 101
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = {"logits": model(ids).logits}
    found |= {name: p for name, p in model.named_parameters() if name.endswith("proj.weight")}
    save_file({name: t.detach().contiguous() for name, t in found.items()}, folder + "/found.out")
assert "hfquant" not in sys.modules
"""


@pytest.mark.slow
def test_a_fresh_process_without_hfquant(tmp_path: Path) -> None:
    models = {}
    for name, scheme in SCHEMES.items():
        for dtype in (torch.float32, torch.bfloat16):
            folder = tmp_path / f"{name}-{dtype}".replace("torch.", "")
            models[folder] = quantized(scheme, dtype)
            hfquant.export(models[folder], folder, max_shard_size="30KB")
            assert (folder / "model.safetensors.index.json").exists()
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", ELSEWHERE, *map(str, models)], check=True, env=environment, cwd=tmp_path)
    for folder, model in models.items():
        found = load_file(folder / "found.out")
        half = model.dtype == torch.bfloat16
        for name, layer in quant_layers(model).items():
            weight = layer.effective_weight()
            error = (found[f"{name}.weight"].float() - weight).abs()
            assert (error <= (1.01 * 2**-7 * weight.abs() if half else 0)).all(), (folder, name)
        hfquant.set_real_quant(model, False)
        ours = model(IDS).logits.float()
        error = (found["logits"].float() - ours).norm() / ours.norm()
        weights_alone = model.model.layers[0].mlp.up_proj.plan.config.input_quant is None
        assert error < (5e-2 if half else 1e-5 if weights_alone else 2e-2), folder
