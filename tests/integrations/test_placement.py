"""Split quantized models: on disk, offloaded, or placed by a device map that is inferred from their size."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers.hooks import apply_layerwise_casting
from safetensors import safe_open
from torch import Tensor, nn

import hfquant
from hfquant import HfQuantConfig
from hfquant.integrations.placement import device_for, put_back, tensor_bytes, without_working_memory
from hfquant.nn.modules import quant_layers
from hfquant.offload import on_disk
from hfquant.planner import plan_layers
from tests.integrations import small_models
from tests.integrations.small_models import assert_same, inputs_of, outputs
from tests.schemes import SVDQUANT

INT4 = {
    "default": {"opt": {"type": "default"}, "weight_quant": {"type": "int4", "axis": -1}, "input_quant": None},
}
MODELS = {
    "flux": "single_transformer_blocks",
    "unet": "down_blocks",
    "sd3": "transformer_blocks",
    "llama": "model.layers",
    "vit": "vit.layers",
    "t5_encoder": "encoder.block",
}
CPU = torch.device("cpu")


def is_diffusers(name: str) -> bool:
    return name in small_models.DIFFUSERS


def load(name: str, folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> nn.Module:
    cls = type((small_models.DIFFUSERS | small_models.TRANSFORMERS)[name]())
    return cls.from_pretrained(folder, **{"torch_dtype" if is_diffusers(name) else "dtype": dtype}, **kwargs)


def device_map(model: nn.Module, blocks: str) -> dict[str, str]:
    """Put the first block on disk and the rest in memory, listing each module by name, as accelerate requires."""
    above = [blocks[: i + 1] for i in range(len(blocks)) if (blocks + ".")[i + 1] == "."]
    rest = [n for n, m in model.named_modules() if n and n not in above and not n.startswith(f"{blocks}.")]
    rest += [n for n, _ in [*model.named_parameters(recurse=False), *model.named_buffers(recurse=False)]]
    others = [f"{blocks}.{i}" for i in range(1, len(model.get_submodule(blocks)))]
    return dict.fromkeys([*rest, *others], "cpu") | {f"{blocks}.0": "disk"}


def inputs_as(dtype: torch.dtype, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: inputs_as(dtype, v) for k, v in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Return what hfquant or transformers wrote to an offload folder, by file and tensor."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {f"{file.name}:{key}": opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


@pytest.fixture(scope="module")
def quantized(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    made: dict[Any, Any] = {}

    def get(name: str, preset: str, dtype: torch.dtype) -> tuple[HfQuantConfig, Path, nn.Module]:
        """Return the config, the quantized checkpoint, and the model in memory."""
        if (name, preset, dtype) not in made:
            inputs = inputs_as(dtype, inputs_of((small_models.DIFFUSERS | small_models.TRANSFORMERS)[name]()))
            config = HfQuantConfig({"int4": INT4, "svdquant": SVDQUANT}.get(preset, preset))
            config.calibration = [inputs] if config.needs_data else None
            model = load(name, checkpoint(name), dtype, quantization_config=config)
            folder = tmp_path_factory.mktemp(f"{name}-{preset}")
            model.save_pretrained(folder)
            made[name, preset, dtype] = config, folder, model
        return made[name, preset, dtype]

    return get


FAST = [("flux", "w8a16"), ("unet", "svdquant"), ("llama", "int4"), ("vit", "fp8")]
PRESETS = ("w8a16", "int4", "svdquant", "fp8")
SLOW = [(name, preset) for name in ("flux", "unet", "llama", "vit", "sd3") for preset in PRESETS]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "preset"), [*FAST, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW if c not in FAST)]
)
def test_weights_on_disk(name, preset, quantized, checkpoint, tmp_path):
    """Loading a quantized checkpoint, or quantizing while loading, gives the outputs of a model in memory."""
    dtype = torch.bfloat16
    config, folder, expected = quantized(name, preset, dtype)
    inputs = inputs_of(expected)
    y = outputs(expected, inputs)
    for source, given in ((folder, None), (checkpoint(name), config)):
        offload = tmp_path / source.name
        where = device_map(expected, MODELS[name])
        model = load(name, source, dtype, quantization_config=given, device_map=where, offload_folder=offload)
        layers = quant_layers(model)
        assert layers.keys() == quant_layers(expected).keys()
        assert {n for n, layer in layers.items() if layer.weight.is_meta} == {
            n for n in layers if n.startswith(f"{MODELS[name]}.0.")
        }
        for n, layer in layers.items():
            assert (on_disk(layer) is not None) == layer.weight.is_meta
            for key, buffer in layer.named_buffers(recurse=False):
                other = getattr(quant_layers(expected)[n], key)
                assert torch.equal(buffer, other), f"{n}.{key}"
                assert buffer.dtype == other.dtype, f"{n}.{key}"
        assert torch.equal(outputs(model, inputs), y)
        assert torch.equal(outputs(model, inputs), y)


@pytest.mark.parametrize("name", ["flux", "llama"])
def test_shards_on_disk(name, quantized, tmp_path):
    config, _, expected = quantized(name, "w8a16", torch.float32)
    float_model = (small_models.DIFFUSERS | small_models.TRANSFORMERS)[name]()
    inputs = inputs_of(expected)
    for i, (model, given) in enumerate(((float_model, config), (expected, None))):
        model.save_pretrained(tmp_path / str(i), max_shard_size="10KB")
        assert len(list((tmp_path / str(i)).glob("*.safetensors"))) > 3
        loaded = load(
            name, tmp_path / str(i), quantization_config=given, device_map=device_map(model, MODELS[name]),
            offload_folder=tmp_path / f"offload{i}",
        )  # fmt: skip
        assert any(layer.weight.is_meta for layer in quant_layers(loaded).values())
        assert torch.equal(outputs(loaded, inputs), outputs(expected, inputs))


@pytest.mark.parametrize("name", ["flux", "llama"])
def test_float_weights_do_not_stay_on_disk(name, checkpoint, tmp_path):
    """After quantizing while loading, the offload folder holds only codes for the linears."""
    model = small_models.DIFFUSERS[name]() if is_diffusers(name) else small_models.TRANSFORMERS[name]()
    where = device_map(model, MODELS[name])
    config = HfQuantConfig("w8a16")
    model = load(name, checkpoint(name), quantization_config=config, device_map=where, offload_folder=tmp_path)
    stored = tensors_in(tmp_path)
    codes = [t for key, t in stored.items() if key.endswith(":weight")]
    meta = [layer for layer in quant_layers(model).values() if layer.weight.is_meta]
    assert meta
    assert len(codes) == len(meta)
    assert all(t.dtype == torch.int8 for t in codes)
    assert not [f.name for f in tmp_path.glob("*.dat") if f.name.removesuffix(".weight.dat") in quant_layers(model)]


@pytest.mark.parametrize("name", ["llama", "t5_encoder", "vit"])
def test_buffers_on_disk(name, quantized, checkpoint, tmp_path):
    config, folder, expected = quantized(name, "w8a16", torch.float32)
    for source, given in ((folder, None), (checkpoint(name), config)):
        model = load(
            name, source, quantization_config=given, device_map={"": "disk"}, offload_buffers=True,
            offload_folder=tmp_path / source.name,
        )  # fmt: skip
        assert all(layer.weight_scale.is_meta and layer.weight.is_meta for layer in quant_layers(model).values())
        assert torch.equal(outputs(model, inputs_of(expected)), outputs(expected, inputs_of(expected)))


def test_an_offloaded_model_is_quantized_on_disk_or_left_alone(checkpoint, tmp_path):
    where = device_map(small_models.llama(), MODELS["llama"])
    model = load("llama", checkpoint("llama"), device_map=where, offload_folder=tmp_path)
    inputs = inputs_of(model)
    y = outputs(model, inputs)
    bad = small_models.llama()
    with torch.no_grad():
        bad.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    model.model.layers[1].mlp.down_proj.weight = bad.model.layers[1].mlp.down_proj.weight
    with pytest.raises(ValueError, match="NaN"):
        hfquant.quantize(model, [inputs], "w8a8")
    model.model.layers[1].mlp.down_proj.weight = small_models.llama().model.layers[1].mlp.down_proj.weight
    assert torch.equal(outputs(model, inputs), y)
    assert not tensors_in(tmp_path)
    hfquant.quantize(model, [inputs], "w8a8")
    codes = [t for key, t in tensors_in(tmp_path).items() if key.endswith(":weight")]
    assert len(codes) == 7
    assert all(t.dtype == torch.int8 for t in codes)
    expected = hfquant.quantize(small_models.llama(), [inputs], "w8a8")
    assert torch.equal(outputs(model, inputs), outputs(expected, inputs))


@pytest.mark.parametrize("name", ["flux", "llama"])
def test_dequantized_weights_go_to_disk_too(name, quantized, tmp_path):
    _, folder, expected = quantized(name, "w8a16", torch.float32)
    inputs = inputs_of(expected)
    where = device_map(expected, MODELS[name])
    model = load(name, folder, device_map=where, offload_folder=tmp_path)
    plain = model.dequantize()
    assert plain is model
    assert not quant_layers(plain)
    assert sum(m.weight.is_meta for m in plain.modules() if type(m) is nn.Linear) >= 2
    assert torch.equal(outputs(plain, inputs), outputs(load(name, folder).dequantize(), inputs))


@pytest.mark.parametrize(("name", "preset"), [("flux", "w8a16"), ("llama", "int4"), ("vit", "w8a16")])
@pytest.mark.parametrize("on_load", [False, True])
def test_an_inferred_device_map_counts_true_bytes(name, preset, on_load, quantized, checkpoint, tmp_path):
    config, folder, expected = quantized(name, preset, torch.float32)
    inputs, size = inputs_of(expected), tensor_bytes(expected)
    largest = max(layer.in_features * layer.out_features for layer in quant_layers(expected).values())
    # If something does not fit, accelerate reserves room for the largest block, so test all of it and about half.
    needed = size + (12 * largest if on_load else 0)
    source, given = (checkpoint(name), config) if on_load else (folder, None)
    for limit, whole in ((needed, True), (needed - size // 3, False)):
        offload = Path(tempfile.mkdtemp(dir=tmp_path))
        model = load(
            name, source, quantization_config=given, device_map="auto", max_memory={"cpu": limit},
            offload_folder=offload,
        )  # fmt: skip
        resident = sum(t.nbytes for t in [*model.parameters(), *model.buffers()] if not t.is_meta)
        assert resident == size if whole else resident < limit
        assert any(layer.weight.is_meta for layer in quant_layers(model).values()) is not whole
        assert torch.equal(outputs(model, inputs), outputs(expected, inputs))
    assert size < tensor_bytes((small_models.DIFFUSERS | small_models.TRANSFORMERS)[name]()) / 1.2


def test_scales_of_a_bfloat16_model_count_as_they_are(quantized, tmp_path):
    """diffusers assumes that all floats, including float32 scales, have the model's dtype."""
    _, folder, expected = quantized("flux", "int4", torch.bfloat16)
    size = tensor_bytes(expected)
    for limit, whole in ((size, True), (size - 2, False)):
        model = load(
            "flux", folder, torch.bfloat16, device_map="auto", max_memory={"cpu": limit}, offload_folder=tmp_path
        )
        assert any(p.is_meta for p in model.parameters()) is not whole


@pytest.mark.parametrize(("offload", "buffers"), [(cpu_offload, False), (disk_offload, True)])
@pytest.mark.parametrize("name", ["unet", "llama"])
def test_offloaded_by_accelerate(name, buffers, offload, quantized, tmp_path):
    """As a pipeline's sequential offload does to each of its models."""
    _, folder, expected = quantized(name, "svdquant" if name == "unet" else "int4", torch.bfloat16)
    inputs = inputs_of(expected)
    model = load(name, folder, torch.bfloat16)
    kwargs = {"offload_dir": tmp_path} if offload is disk_offload else {}
    offload(model, execution_device=CPU, offload_buffers=buffers, **kwargs)
    layers = quant_layers(model).values()
    assert all(layer.weight.is_meta and layer.weight_scale.is_meta == buffers for layer in layers)
    assert torch.equal(outputs(model, inputs), outputs(expected, inputs))


@pytest.mark.parametrize(("kind", "to_disk"), [("block_level", False), ("leaf_level", True)])
@pytest.mark.parametrize(("name", "preset"), [("flux", "w8a16"), ("unet", "svdquant")])
def test_group_offload(name, preset, kind, to_disk, quantized, tmp_path):
    _, folder, expected = quantized(name, preset, torch.bfloat16)
    inputs = inputs_of(expected)
    model = load(name, folder, torch.bfloat16)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    disk = {"offload_to_disk_path": str(tmp_path)} if to_disk else {}
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **blocks, **disk)
    for _ in range(2):
        assert torch.equal(outputs(model, inputs), outputs(expected, inputs))
    if to_disk:
        assert any(t.dtype == torch.int8 for t in tensors_in(tmp_path).values())


def test_group_offload_comes_after_quantizing(quantized, tmp_path):
    """diffusers keeps a group's tensors, possibly on disk, so those in the modules must not be read or replaced."""
    leaves = {"offload_type": "leaf_level", "onload_device": CPU}
    model = small_models.flux()
    inputs = inputs_of(model)
    y = outputs(model, inputs)
    model.enable_group_offload(**leaves, offload_to_disk_path=str(tmp_path / "float"))
    with pytest.raises(ValueError, match="enable_group_offload afterwards"):
        hfquant.quantize(model, None, "w8a16")
    assert torch.equal(outputs(model, inputs), y)
    _, folder, expected = quantized("flux", "w8a16", torch.float32)
    model = load("flux", folder)
    model.enable_group_offload(**leaves, offload_to_disk_path=str(tmp_path / "quantized"))
    with pytest.raises(ValueError, match="enable_group_offload afterwards"):
        model.dequantize()
    assert torch.equal(outputs(model, inputs), outputs(expected, inputs))


@pytest.mark.parametrize("preset", ["w8a16", "w8a8-smooth"])
def test_layerwise_casting_to_fp8_comes_after_quantizing(preset):
    model = small_models.flux()
    inputs = inputs_of(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    y = outputs(model, inputs)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"stores its weight as torch.float8_e4m3fn: load the model in float32"):
            hfquant.quantize(model, [inputs], preset)
        model.to(torch.float32)  # its hooks cast it back with each call
    assert torch.equal(outputs(model, inputs), y)


def test_layers_in_fp8_that_are_not_quantized_may_stay():
    model = small_models.flux()
    apply_layerwise_casting(model.proj_out, torch.float8_e4m3fn, torch.float32)
    config = hfquant.HfQuantConfig("w8a16", modules_to_not_convert=["proj_out"])
    assert quant_layers(hfquant.quantize(model, None, config))
    assert model.proj_out.weight.dtype == torch.float8_e4m3fn


def test_streams_are_refused_where_there_are_none(quantized):
    _, folder, expected = quantized("flux", "w8a16", torch.float32)
    model = load("flux", folder)
    with pytest.raises(ValueError, match="streams"):
        model.enable_group_offload(onload_device=CPU, offload_type="leaf_level", use_stream=True)
    assert_same(model, expected)


@pytest.mark.parametrize("name", ["flux", "llama"])
def test_a_disk_map_without_a_folder(name, checkpoint):
    for config in (HfQuantConfig("w8a16"), HfQuantConfig("w8a8", calibration=[inputs_of(small_models.llama())])):
        with pytest.raises(ValueError, match="offload_folder"):
            load(name, checkpoint(name), quantization_config=config, device_map={"": "disk"})


def test_what_diffusers_cannot_do_offloaded(quantized, tmp_path):
    _, folder, expected = quantized("flux", "w8a16", torch.float32)
    with pytest.raises(ValueError, match="offload_state_dict=True needs"):
        load("flux", folder, offload_state_dict=True)
    where = device_map(expected, MODELS["flux"])
    model = load("flux", folder, device_map=where, offload_folder=tmp_path / "o", offload_state_dict=False)
    assert torch.equal(outputs(model, inputs_of(model)), outputs(expected, inputs_of(expected)))
    with pytest.raises(ValueError, match=r"offloaded.*without device_map"):
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("preset", ["w4a16", "w8a8"])
@pytest.mark.parametrize("where", ["meta", torch.device("meta"), {"": "meta"}, {"model": "cpu", "lm_head": "meta"}])
def test_weights_without_values_are_not_quantized(where, preset, checkpoint):
    config = HfQuantConfig(preset)
    with pytest.raises(ValueError, match=r"device_map: on the meta device.*hfquant\.plan"):
        load("llama", checkpoint("llama"), quantization_config=config, device_map=where)


def test_a_quantized_checkpoint_is_loaded_on_the_meta_device(quantized):
    _, folder, _ = quantized("llama", "w8a16", torch.float32)
    model = load("llama", folder, device_map="meta")
    assert quant_layers(model)
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}


def test_room_to_quantize_the_largest_linear():
    plan = plan_layers(nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 7)), HfQuantConfig("w8a16").rules)
    assert without_working_memory({0: 5000, "cpu": 100}, plan) == {0: 5000 - 3 * 4 * 200, "cpu": 0}
    assert without_working_memory({0: 5000}, None) == {0: 5000}


def test_bytes_that_a_plan_comes_to():
    model, config = small_models.llama(), HfQuantConfig(INT4, modules_to_not_convert=["lm_head"])
    expected = tensor_bytes(model, hfquant.plan(model, config))
    assert expected < tensor_bytes(model) / 2
    assert tensor_bytes(hfquant.quantize(model, None, config)) == expected


def test_reserved_memory_is_half_of_the_true_bytes(quantized, monkeypatch):
    """diffusers reserves count // factor elements of the model's dtype before loading: half of a float model's size."""
    from diffusers.models import modeling_utils

    seen = []

    def reserve(model: nn.Module, expanded: Any, dtype: torch.dtype, quantizer: Any) -> None:
        elements = sum(t.numel() for t in model.state_dict().values())
        seen.append(elements // quantizer.get_cuda_warm_up_factor() * dtype.itemsize)

    monkeypatch.setattr(modeling_utils, "_caching_allocator_warmup", reserve)
    config, folder, expected = quantized("flux", "int4", torch.bfloat16)
    load("flux", folder, torch.bfloat16, device_map={"": "cpu"})
    small_models.flux().save_pretrained(folder.parent / "float")
    load("flux", folder.parent / "float", torch.bfloat16, device_map={"": "cpu"}, quantization_config=config)
    for size in seen:
        assert 0.3 < size / tensor_bytes(expected) <= 0.6


def test_a_name_is_looked_up_from_the_longest_prefix():
    where = {"": 0, "a": "cpu", "a.b": "disk"}
    assert [device_for(n, where) for n in ("a.b.c", "a.bc", "ab")] == ["disk", "cpu", 0]
    assert device_for("x", {"a": "cpu"}) is None


def test_linears_are_put_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    linears = {str(i): model[i] for i in range(2)}
    model[0], model[1] = nn.Linear(2, 2), nn.Linear(2, 2)
    put_back(model, linears, {"": "cpu", "1": "disk"})
    assert model[0] is not linears["0"]
    assert model[1] is linears["1"]
    put_back(model, linears)
    assert model[0] is linears["0"]
