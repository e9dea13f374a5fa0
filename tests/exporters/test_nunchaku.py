"""Exports to nunchaku-lite, loaded by diffusers' own code and run with the kernels' arithmetic, spelled out by lane.

The kernels need a GPU and a download, so ``Kernels`` stands in for them. The part of a matrix that each lane holds
follows the PTX ISA's figures of mma.m16n8k64 (INT4) and mma.m16n8k16 (half precision), operand B.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import hfquant
from hfquant.exporters import ExportError
from hfquant.nn.modules import quant_layers
from tests.integrations.mixtures import nucleus

INT4 = {"type": "int4", "axis": -1, "dynamic": True}
SETTINGS = {
    "default": {
        "seglinear": False,
        "opt": {"type": "svd", "low_rank": 24},
        "weight_quant": {"type": "int4", "group_size": 64},
        "input_quant": INT4,
    },
    "*emb*": {"enable": False},
    "proj_out_2": {"enable": False},
}


def dit(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 1, "sample_size": 8, "in_channels": 4}
    model = diffusers.DiTTransformer2DModel(**sizes, num_embeds_ada_norm=10, **overrides)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def inputs() -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "class_labels": torch.tensor([1, 7]),
    }


def quantized(dtype: torch.dtype = torch.bfloat16, **layers: Any) -> nn.Module:
    model = dit()
    batches = [inputs() for _ in range(2)]
    hfquant.quantize(model, batches, {**SETTINGS, **layers})
    # Cast everything but codes and scales, as if loaded in that dtype.
    for module in model.modules():
        for part in (module._parameters, module._buffers):
            for name, tensor in part.items():
                own = getattr(module, "_model_floats", None)
                if tensor is not None and tensor.is_floating_point() and (own is None or name in own):
                    tensor.data = tensor.data.to(dtype)
    return model


@cache
def nibble_of(rows: int, columns: int) -> Tensor:
    """Return the position of each code [rows, columns] among the stored nibbles."""
    out = torch.full((rows, columns), -1)
    tile = out.view(rows // 128, 8, 16, columns // 64, 64).permute(0, 3, 1, 2, 4)  # views: tiles, strip, n, k
    start = torch.arange(rows * columns // 1024).view(tile.shape[:3]) * 1024
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for register in range(4):
            second_product, upper_half = register // 2, register % 2
            for element in range(8):
                at = start + (lane * 4 + register) * 8 + element
                tile[:, :, :, group + 8 * second_product, thread * 8 + element + 32 * upper_half] = at
    return out


def codes(qweight: Tensor) -> Tensor:
    """Unpack [out, in / 2] bytes into codes [out, in]."""
    stored = qweight.flatten().int()
    nibbles = torch.stack([stored & 15, stored >> 4 & 15], -1).flatten()
    found = nibbles[nibble_of(len(qweight), 2 * qweight.shape[1])]
    return torch.where(found > 7, found - 16, found).to(torch.int8)


def scales(stored: Tensor) -> Tensor:
    """Unpack [G, out] as stored into [out, G]. A lane sums channels 2 t and 2 t + 1 of each product of eight."""
    groups, rows = stored.shape
    out = torch.empty(rows // 128, 128, groups, dtype=stored.dtype)
    stream = stored.reshape(rows // 128, groups, 32, 4)
    for lane in range(32):
        strip, thread = lane // 4, lane % 4
        for i in range(4):
            out[:, strip * 16 + 8 * (i // 2) + 2 * thread + i % 2] = stream[:, :, lane, i]
    return out.reshape(rows, groups)


def vector(stored: Tensor) -> Tensor:
    return scales(stored[None])[:, 0]


def factor(stored: Tensor, down: bool) -> Tensor:
    """Unpack [channels, rank] as stored into ``down`` [rank, channels] or ``up`` [channels, rank]."""
    channels, rank = stored.shape
    stream = stored.reshape(channels // 16, rank // 16, 32, 8)
    out = torch.empty(channels // 16, rank // 16, 16, 16, dtype=stored.dtype)  # ..., n, k
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for i in range(8):
            second_product, upper_half, element = i // 4, i // 2 % 2, i % 2
            out[:, :, group + 8 * second_product, thread * 2 + element + 8 * upper_half] = stream[:, :, lane, i]
    return (out.permute(1, 2, 0, 3) if down else out.permute(0, 2, 1, 3)).reshape(
        *((rank, channels) if down else (channels, rank))
    )


class Kernels:
    """The two operators that diffusers' SVDQW4A4Linear calls, in float32."""

    @staticmethod
    def quantize_w4a4_act_fuse_lora(
        x: Tensor, out: Tensor, ascales: Tensor, down: Tensor, lora: Tensor, smooth: Tensor, glu: bool, fp4: bool
    ) -> None:
        assert not glu
        assert not fp4
        rows = len(x)
        groups = (x.float() / vector(smooth).float()).unflatten(-1, (-1, 64))
        scale = (groups.abs().amax(-1) / 7).to(ascales.dtype)
        found = (groups / scale.float().clamp(min=1e-8)[..., None]).round().clamp(-8, 7).int().flatten(1) & 15
        out[:rows] = (found[:, ::2] | found[:, 1::2] << 4).to(torch.uint8)
        ascales[:, :rows] = scale.T
        lora[:rows] = x.float() @ factor(down, True).float().T

    @staticmethod
    def gemm_w4a4(*arguments: Any) -> None:
        act, weight, out, _, ascales, wscales, _, _, lora, up, _, _, _, _, _, bias, *_ = arguments
        rows = len(out)
        nibbles = torch.stack([act & 15, act >> 4], -1).flatten(1).int()
        x = (
            torch.where(nibbles > 7, nibbles - 16, nibbles).float().unflatten(-1, (-1, 64))
            * ascales.T.float()[..., None]
        )
        w = codes(weight).float().unflatten(-1, (-1, 64)) * scales(wscales).float()[..., None]
        y = x.flatten(1) @ w.flatten(1).T + lora @ factor(up, False).float().T
        out.copy_((y + (0 if bias is None else vector(bias).float()))[:rows])


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make diffusers believe that there is a GPU and that the kernels have been downloaded."""
    from diffusers.quantizers.nunchaku import NunchakuLiteQuantizer
    from diffusers.utils import constants, import_utils

    kernels: Any = ModuleType("kernels")
    kernels.get_kernel = lambda *_, **__: SimpleNamespace(ops=Kernels)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setattr(import_utils, "_kernels_available", True)
    monkeypatch.setattr(import_utils, "_kernels_version", "0.13.0")
    monkeypatch.setattr(constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    monkeypatch.setattr(NunchakuLiteQuantizer, "validate_environment", lambda *_, **__: None)
    # Use the stub for this import only, since other code looks for the package as well.
    sys.modules.pop("diffusers.quantizers.nunchaku.utils", None)
    import_module("diffusers.quantizers.nunchaku.utils")
    monkeypatch.delitem(sys.modules, "kernels")
    yield
    sys.modules.pop("diffusers.quantizers.nunchaku.utils")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("loading")
def test_diffusers_loads_and_runs_it(dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized(dtype)
    hfquant.export(model, tmp_path, format="nunchaku-lite")
    loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    layers = quant_layers(model)
    assert len(layers) == 8
    eps = torch.finfo(dtype).eps
    for name, layer in layers.items():
        module = loaded.get_submodule(name)
        assert type(module).__name__ == "SVDQW4A4Linear"
        assert torch.equal(codes(module.qweight), layer.codes()), name
        scale = layer.grid().scale
        assert scale is not None
        assert torch.equal(scales(module.wscales), scale.to(dtype)), name
        assert torch.equal(vector(module.smooth_factor), layer.smooth.to(dtype)), name
        assert torch.equal(factor(module.proj_down, True)[:24], layer.svd_down), name
        assert torch.equal(factor(module.proj_up, False)[:, :24], layer.svd_up), name
        assert not factor(module.proj_up, False)[:, 24:].any()
        assert torch.equal(vector(module.bias), layer.bias), name
        # The product, with inputs in INT4 groups of 64, as in the kernels.
        x = torch.randn(3, layer.in_features).to(dtype)
        groups = (x.double() / layer.smooth.to(dtype).double()).unflatten(-1, (-1, 64))
        step = (groups.abs().amax(-1, keepdim=True) / 7).to(dtype).double()
        seen = ((groups / step).round().clamp(-8, 7) * step).flatten(1)
        y = seen @ layer.dequantize().double().T + layer.bias.double()
        y += x.double() @ layer.svd_down.double().T @ layer.svd_up.double().T
        assert (module(x).double() - y).norm() < 4 * eps * y.norm(), name
    state = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        if not any(name.startswith(f"{layer}.") for layer in layers):
            assert torch.equal(tensor, state[name]), name
    batch = {key: t.to(dtype) if t.is_floating_point() else t for key, t in inputs().items()}
    hfquant.dequantize(model)
    expected = model(**batch).sample.float()
    assert (loaded(**batch).sample.float() - expected).norm() < 0.3 * expected.norm()  # 4-bit activations


def test_ranks_differ_and_layers_without_a_branch(tmp_path: Path) -> None:
    """All layers get the largest rank, padded with zeros that add nothing."""
    model = quantized(
        **{
            "*.attn1.*": {"opt": {"type": "svd", "low_rank": 16}},
            "*.ff.*": {"opt": {"type": "default"}},
        }
    )
    hfquant.export(model, tmp_path, format="nunchaku-lite")
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["svdq_w4a4"]
    assert section["rank"] == 32
    assert set(section["targets"]) == quant_layers(model).keys()
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.attn1.to_q"
    layer = model.get_submodule(name)
    assert torch.equal(factor(tensors[f"{name}.proj_down"], True)[:16], layer.svd_down)
    assert not factor(tensors[f"{name}.proj_down"], True)[16:].any()
    name = "transformer_blocks.0.ff.net.2"
    assert not tensors[f"{name}.proj_up"].any()
    assert (tensors[f"{name}.smooth_factor"] == 1).all()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"*.ff.*": {"input_quant": {**INT4, "type": "int8"}}}, "its inputs are not dynamic int4"),
        ({"*.ff.*": {"input_quant": None}}, "its inputs are not dynamic int4"),
        (
            {"*.norm1.*": {"seglinear": True}},
            r"its output segments have separate transforms \(seglinear: False",
        ),
        ({"proj_out_2": {"enable": True}}, r"not multiples of 128 \(128 x 16\): 'proj_out_2'"),
        ({"*.ff.*": {"weight_quant": {"group_size": 32}}}, "its weights are not symmetric int4 in groups of 64"),
    ],
)
def test_what_the_kernels_lack_is_refused(layers: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        hfquant.export(quantized(**layers), tmp_path, format="nunchaku-lite")


@pytest.mark.usefixtures("loading")
def test_other_groups_are_rounded_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = quantized(**{"*.ff.*": {"weight_quant": {"group_size": 32, "symmetric": False}}})
    hfquant.export(model, tmp_path, format="nunchaku-lite", requantize=True)
    assert "requantized for the export" in caplog.text
    loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
    name = "transformer_blocks.0.ff.net.2"
    module, weight = loaded.get_submodule(name), model.get_submodule(name).effective_weight()
    found = codes(module.qweight) * scales(module.wscales).float().repeat_interleave(64, 1)
    assert (found - weight).norm() < 0.2 * weight.norm()


@pytest.mark.slow
@pytest.mark.usefixtures("loading")
def test_flux_and_shards(tmp_path: Path) -> None:
    """proj_out of FLUX's single blocks joins two inputs; groups do not straddle them, so nothing else is needed."""
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64}
    sizes |= {"joint_attention_dim": 128, "pooled_projection_dim": 128, "in_channels": 16}
    model = diffusers.FluxTransformer2DModel(**sizes, axes_dims_rope=(16, 24, 24)).bfloat16()
    batch = {
        "hidden_states": torch.randn(1, 16, 16).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 7, 128).bfloat16(),
        "pooled_projections": torch.randn(1, 128).bfloat16(),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(7, 3),
    }
    rest = {glob: {"enable": False} for glob in ("*embed*", "proj_out", "context_embedder")}
    settings = {**SETTINGS, **rest, "*.proj_out": {"seglinear": True, "search_patterns": ["concat2linear"]}}
    hfquant.quantize(model, [batch], settings)
    joined = model.single_transformer_blocks[0].proj_out
    assert joined.plan.input_segments == (128, 512)
    hfquant.export(model, tmp_path, format="nunchaku-lite", max_shard_size="200KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists()
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    stored = {k: t for file in tmp_path.glob("*.safetensors") for k, t in load_file(file).items()}
    import_module("diffusers.quantizers.nunchaku.utils").check_strict_state_dict_match(loaded, stored)
    for name, layer in quant_layers(model).items():
        assert torch.equal(codes(loaded.get_submodule(name).qweight), layer.codes()), name
    hfquant.dequantize(model)
    expected = model(**batch).sample.float()
    assert (loaded(**batch).sample.float() - expected).norm() < 0.3 * expected.norm()


def test_fused_experts_are_refused(tmp_path: Path) -> None:
    model = hfquant.quantize(nucleus(), None, "w8a16")
    with pytest.raises(ExportError, match="it is not a linear but fused experts: 'transformer_blocks"):
        hfquant.export(model, tmp_path, format="nunchaku-lite", requantize=True)
