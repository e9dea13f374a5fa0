"""Methods of transformers and diffusers that cannot work on codes refuse, and work on float layers as usual.

``make test-floors`` runs this on the oldest versions.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from diffusers.models.transformers.transformer_wan import WanAttention
from diffusers.training_utils import EMAModel
from torch import nn

import hfquant
from hfquant import HfQuantConfig

ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Attention(8, heads=2, dim_head=4),
    "joint": lambda: FluxAttention(8, heads=2, dim_head=4, added_kv_proj_dim=6),
    "own": lambda: WanAttention(8, heads=2, dim_head=4),
}


@pytest.mark.parametrize(
    ("name", "part"), [("attention", "to_k"), ("joint", "to_q"), ("joint", "add_v_proj"), ("own", "to_v")]
)
def test_quantized_projections_are_not_fused(name: str, part: str) -> None:
    attention = ATTENTIONS[name]()
    others = [other for other, layer in attention.named_modules() if isinstance(layer, nn.Linear) and other != part]
    hfquant.quantize(attention, None, HfQuantConfig("w8a16", modules_to_not_convert=others))
    assert isinstance(getattr(attention, part), hfquant.QuantLinear)
    before = set(attention.state_dict())
    with pytest.raises(ValueError, match="fuse the projections before quantizing, or dequantize first"):
        attention.fuse_projections()
    assert set(attention.state_dict()) == before
    assert not attention.fused_projections


@pytest.mark.parametrize("name", ATTENTIONS)
def test_projections_in_float_are_fused(name: str) -> None:
    attention = ATTENTIONS[name]()
    with torch.no_grad():
        attention.fuse_projections()
    assert attention.fused_projections
    assert attention.to_qkv.weight.shape == (24, 8)


UNETS = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 8, "norm_num_groups": 4}


def unet() -> nn.Module:
    ups = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2, "attention_head_dim": 4}
    return diffusers.UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), **UNETS, **ups)


def wan() -> nn.Module:
    sizes = {"num_attention_heads": 1, "attention_head_dim": 12, "num_layers": 2, "freq_dim": 8, "ffn_dim": 16}
    return diffusers.WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=8, **sizes)


@pytest.mark.parametrize("build", [unet, wan])
def test_a_model_is_fused_before_it_is_quantized_and_not_after(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Nothing is fused if only a later attention is quantized, and the model can be saved afterwards."""
    attentions = [name for name, module in build().named_modules() if hasattr(module, "fuse_projections")]
    model = hfquant.quantize(build(), None, HfQuantConfig("w8a16", modules_to_not_convert=[attentions[0]]))
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=f"the projections of {attentions[1]} are quantized"):
        model.fuse_qkv_projections()
    assert set(model.state_dict()) == before
    model.save_pretrained(tmp_path)
    plain = hfquant.dequantize(model)
    plain.fuse_qkv_projections()
    assert set(plain.state_dict()) > set(build().state_dict())


def test_models_that_copy_float_weights_are_not_made_from_quantized_ones() -> None:
    float_unet, quantized = unet(), hfquant.quantize(unet(), None, "w8a16")
    for make in (
        diffusers.ControlNetModel.from_unet,
        diffusers.UNetMotionModel.from_unet2d,
        partial(diffusers.UNetControlNetXSModel.from_unet, size_ratio=0.5, ctrl_optional_kwargs={}),
    ):
        with pytest.raises(ValueError, match=r"a \w+ copies float weights, and \S+ of the model .* is quantized"):
            make(quantized)
        make(float_unet)
        make(hfquant.dequantize(copy.deepcopy(quantized)))
    assert not any(layer._state_dict_pre_hooks for layer in quantized.modules())


def test_codes_are_not_copied_as_floats() -> None:
    """FLUX's blocks are copied with ``strict=False``, which lets codes pass; layers in float may be copied."""
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    made = {"in_channels": 4, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8)}
    model = diffusers.FluxTransformer2DModel(**made, **sizes)
    config = HfQuantConfig("w8a16", modules_to_not_convert=["time_text_embed", "context_embedder", "x_embedder"])
    hfquant.quantize(model, None, config)
    with pytest.raises(ValueError, match="a FluxControlNetModel copies float weights, and transformer_blocks"):
        diffusers.FluxControlNetModel.from_transformer(model, **sizes)
    diffusers.FluxControlNetModel.from_transformer(model, **sizes, load_weights_from_transformer=False)


def test_models_that_only_read_a_config_are_made_from_quantized_ones() -> None:
    quantized = hfquant.quantize(unet(), None, "w8a16")
    assert diffusers.ControlNetXSAdapter.from_unet(quantized, size_ratio=0.5).config.base_block_out_channels == (8, 16)
    diffusers.ControlNetModel.from_unet(quantized, load_weights_from_unet=False)


def test_classes_defined_later_refuse_too() -> None:
    class Later(diffusers.ControlNetModel):
        @classmethod
        def from_unet(cls, unet: nn.Module, **options: object) -> str:
            return f"{cls.__name__} of {len(unet.mid_block.state_dict())} tensors"

    assert Later.from_unet(unet()) == f"Later of {len(unet().mid_block.state_dict())} tensors"
    with pytest.raises(ValueError, match="a Later copies float weights, and mid_block"):
        Later.from_unet(unet=hfquant.quantize(unet(), None, "w8a16"))


def test_modules_copied_as_they_are_can_be_saved(tmp_path: Path) -> None:
    class Shares(diffusers.ControlNetModel):
        from_unet_keys = ("mid_block",)

        @classmethod
        def from_unet(cls, unet: nn.Module) -> Shares:
            made = cls.from_config(unet.config)
            for key in cls.from_unet_keys:
                setattr(made, key, copy.deepcopy(getattr(unet, key)))
            return made

        @staticmethod
        def from_unet_named(name: str) -> str:
            return name

        @property
        def from_unet_kind(self) -> str:
            return type(self).__name__

    made = Shares.from_unet(hfquant.quantize(unet(), None, "w8a16"))
    made.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    assert (made.from_unet_named("a"), made.from_unet_kind) == ("a", "Shares")


def llama(include: list[str], tied: bool = False) -> transformers.LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=tied, **sizes)
    weights = {"type": "int4", "group_size": 8}
    rule = {"weight_quant": weights, "input_quant": None, "opt": {"type": "default"}, "include": include}
    return hfquant.quantize(transformers.LlamaForCausalLM(config), None, {"default": rule})


@pytest.mark.parametrize("sizes", [(33,), (31,), (None, 64), (30, 64)], ids=str)
@pytest.mark.parametrize(
    ("include", "tied", "name"),
    [
        (["embeddings"], False, "model.embed_tokens"),
        (["output_heads"], False, "lm_head"),
        (["embeddings", "output_heads"], False, "model.embed_tokens"),
        (["embeddings", "output_heads"], True, "model.embed_tokens"),
    ],
    ids=["embedding", "head", "both", "tied"],
)
def test_quantized_embeddings_and_heads_are_not_resized(
    include: list[str], tied: bool, name: str, sizes: tuple[Any, ...]
) -> None:
    model = llama(include, tied)
    before, config = model.state_dict(), model.config.to_dict()
    message = rf"LlamaForCausalLM: {name} is quantized, so it cannot be resized: .* or leave it out of `include`"
    with pytest.raises(ValueError, match=message):
        model.resize_token_embeddings(*sizes)
    assert model.config.to_dict() == config
    assert all(value is before[key] or torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for same in ((), (32,), (None, 8), (29, 16)):
        assert model.resize_token_embeddings(*same).num_embeddings == 32
    plain = hfquant.dequantize(model)
    plain.resize_token_embeddings(*sizes)
    assert plain(torch.tensor([[1, 2]])).logits.shape[-1] == plain.config.vocab_size != 32


def test_a_list_of_quantized_embeddings_is_not_resized() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16, "num_codebooks": 2}
    model = transformers.MusicgenForCausalLM(transformers.MusicgenDecoderConfig(vocab_size=16, **sizes))
    rule = {"weight_quant": {"type": "int8"}, "input_quant": None, "include": ["embeddings"]}
    hfquant.quantize(model, None, {"default": {**rule, "opt": {"type": "default"}}})
    with pytest.raises(ValueError, match=r"embed_tokens\.0 is quantized, so it cannot be resized"):
        model.resize_token_embeddings(30)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_heads_in_float_are_resized(tied: bool) -> None:
    model = llama([], tied)
    assert model.resize_token_embeddings(pad_to_multiple_of=5, mean_resizing=False).num_embeddings == 35
    assert model(torch.tensor([[34]])).logits.shape == (1, 1, 35)


def test_classes_with_a_method_of_their_own_refuse_too() -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(vocab_size=40, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, **sizes)
    rule = {"weight_quant": {"type": "int8"}, "input_quant": None, "include": ["embeddings", "output_heads"]}
    rule["opt"] = {"type": "default"}
    model = hfquant.quantize(transformers.BartForConditionalGeneration(config), None, {"default": rule})
    with pytest.raises(ValueError, match=r"BartForConditionalGeneration: model\.shared is quantized"):
        model.resize_token_embeddings(new_num_tokens=50)
    assert model.final_logits_bias.shape == (1, 40)


def animate_diff() -> Any:
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "cross_attention_dim": 8}
    small = diffusers.UNet2DConditionModel(8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **kinds)
    motion = {"motion_layers_per_block": 1, "motion_num_attention_heads": 2, "motion_norm_num_groups": 4}
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "scheduler": diffusers.DDIMScheduler()}
    adapter = diffusers.MotionAdapter(block_out_channels=(8,), **motion)
    return diffusers.AnimateDiffPipeline(unet=small, motion_adapter=adapter, **parts)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return the modules of a model, to compare by identity, and copies of its tensors."""
    return {"modules": list(model.modules()), "tensors": {k: v.clone() for k, v in model.state_dict().items()}}


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert all(new is old for new, old in zip(after["modules"], before["modules"], strict=True))
    assert after["tensors"].keys() == before["tensors"].keys()
    assert all(torch.equal(value, before["tensors"][name]) for name, value in after["tensors"].items())


def quantize_last_motion_modules(model: nn.Module) -> None:
    """Leave all other blocks in float, so that something would change before codes are met."""
    rule = {"weight_quant": {"type": "int8"}, "input_quant": None, "opt": {"type": "default"}, "enable": False}
    hfquant.quantize(model, None, {"default": rule, "up_blocks.*.motion_modules.*": {"enable": True}})


def free_noise_blocks(pipe: Any) -> int:
    return sum(type(module).__name__ == "FreeNoiseTransformerBlock" for module in pipe.unet.modules())


@pytest.mark.parametrize("enabled", [False, True], ids=["enable", "disable"])
def test_free_noise_is_switched_before_quantizing_and_not_after(enabled: bool) -> None:
    """diffusers would put in new blocks with random weights, and only then fail to copy codes into them."""
    pipe = animate_diff()
    if enabled:
        pipe.enable_free_noise(context_length=2, context_stride=1)
    count = free_noise_blocks(pipe)
    quantize_last_motion_modules(pipe.unet)
    before = state_of(pipe.unet)
    word, switch = ("disable", pipe.disable_free_noise) if enabled else ("enable", pipe.enable_free_noise)
    with pytest.raises(ValueError, match=rf"cannot {word} FreeNoise: .*up_blocks\.0.* is quantized: {word} it before"):
        switch()
    assert_unchanged(pipe.unet, before)
    assert pipe.free_noise_enabled == enabled
    # Nothing is copied if it is as asked already.
    if enabled:
        pipe.enable_free_noise(context_length=4, context_stride=2)
        assert {m.context_length for m in pipe.unet.modules() if hasattr(m, "context_length")} == {4}
    else:
        pipe.disable_free_noise()
    assert_unchanged(pipe.unet, before)
    hfquant.dequantize(pipe.unet)
    switch()
    assert free_noise_blocks(pipe) != count


def test_free_noise_is_switched_if_motion_modules_are_in_float() -> None:
    pipe = animate_diff()
    hfquant.quantize(pipe.unet, None, HfQuantConfig("w8a16", modules_to_not_convert=["motion_modules"]))
    codes = {name: layer.weight for name, layer in pipe.unet.named_modules() if isinstance(layer, hfquant.QuantLinear)}
    pipe.enable_free_noise()
    assert free_noise_blocks(pipe) > 0
    pipe.disable_free_noise()
    assert free_noise_blocks(pipe) == 0
    assert codes
    assert all(pipe.unet.get_submodule(name).weight is weight for name, weight in codes.items())


def test_quantized_motion_modules_are_neither_loaded_nor_saved_as_floats(tmp_path: Path) -> None:
    pipe = animate_diff()
    quantize_last_motion_modules(pipe.unet)
    before = state_of(pipe.unet)
    for refused in (
        lambda: pipe.unet.load_motion_modules(animate_diff().motion_adapter),
        lambda: pipe.unet.save_motion_modules(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=r"up_blocks\.0\.motion_modules\S+ is quantized"):
            refused()
    assert_unchanged(pipe.unet, before)
    assert not list(tmp_path.iterdir())
    plain, adapter = animate_diff().unet, hfquant.quantize(animate_diff().motion_adapter, None, "w8a16")
    before = state_of(plain)
    with pytest.raises(ValueError, match=r"MotionAdapter: mid_block\.motion_modules\S+ is quantized"):
        plain.load_motion_modules(motion_adapter=adapter)
    assert_unchanged(plain, before)


def test_motion_modules_in_float_are_loaded_and_saved(tmp_path: Path) -> None:
    pipe, other = animate_diff(), animate_diff()
    hfquant.quantize(pipe.unet, None, HfQuantConfig("w8a16", modules_to_not_convert=["motion_modules"]))
    pipe.unet.load_motion_modules(other.motion_adapter)
    pipe.unet.save_motion_modules(str(tmp_path))
    saved = diffusers.MotionAdapter.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in other.motion_adapter.state_dict().items())


#: Quantizes layers without a bias, so that the parameters of both models have equal shapes in equal order.
UNBIASED = {
    "default": {"enable": False, "weight_quant": {"type": "int8"}, "input_quant": None, "opt": {"type": "default"}},
    "*.attn1.to_q": {"enable": True},
}


def average_of(model: nn.Module, foreach: bool = False) -> EMAModel:
    kind = {"model_cls": type(model), "model_config": model.config}
    return EMAModel(model.parameters(), decay=0.5, foreach=foreach, **kind)


@pytest.mark.parametrize("config", [UNBIASED, "w8a16"], ids=["unbiased", "all"])
def test_an_average_of_a_quantized_model_is_not_saved_as_floats(config: Any, tmp_path: Path) -> None:
    model = hfquant.quantize(unet(), None, config)
    average, message = average_of(model), r"belongs to a quantized model.*copy it to that model.*save_pretrained"
    with pytest.raises(ValueError, match=rf"EMAModel\.copy_to: .*{message}"):
        average.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_average_of_a_dequantized_model_is_saved(tmp_path: Path) -> None:
    model = hfquant.dequantize(hfquant.quantize(unet(), None, "w8a16"))
    average_of(model).save_pretrained(tmp_path)
    saved = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


IMPORTED_FIRST = """
import hfquant
from diffusers.training_utils import EMAModel
import diffusers
sizes = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
model = hfquant.quantize(diffusers.DiTTransformer2DModel(**sizes), None, "w8a16")
try:
    EMAModel(model.parameters(), model_cls=type(model), model_config=model.config).save_pretrained("x")
except ValueError as error:
    assert "belongs to a quantized model" in str(error), error
else:
    raise AssertionError("saved")
"""


def test_what_defines_averages_may_be_imported_first(tmp_path: Path) -> None:
    """It imports all of diffusers, and so what registers with diffusers, while it is still executing."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", IMPORTED_FIRST]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("foreach", [False, True], ids=["each", "foreach"])
def test_averages_of_quantized_and_float_models_are_not_mixed(foreach: bool) -> None:
    plain, quantized = unet(), hfquant.quantize(unet(), None, UNBIASED)
    for model, other, message in ((quantized, plain, "to a quantized model"), (plain, quantized, "to a float model")):
        average = average_of(model, foreach)
        average.store(model.parameters())
        before, shadows = state_of(other), [shadow.clone() for shadow in average.shadow_params]
        for method in (average.copy_to, average.restore, average.step):
            with pytest.raises(ValueError, match=rf"EMAModel\.{method.__name__}: this average belongs {message}"):
                method(other.parameters())
        assert_unchanged(other, before)
        assert all(map(torch.equal, average.shadow_params, shadows))


@pytest.mark.parametrize("foreach", [False, True], ids=["each", "foreach"])
@pytest.mark.parametrize("config", [None, "w8a16"], ids=["float", "quantized"])
def test_a_model_uses_its_own_average(config: str | None, foreach: bool) -> None:
    model = unet() if config is None else hfquant.quantize(unet(), None, config)
    norm = model.conv_norm_out.weight.requires_grad_(True)
    average, start = average_of(model, foreach), state_of(model)
    with torch.no_grad():
        norm += 1
    for _ in range(2):  # the first sets the average to the parameters
        average.step(parameters=model.parameters())
        with torch.no_grad():
            norm += 1
    trained = state_of(model)
    average.store(model.parameters())
    average.copy_to(model.parameters())
    assert (start["tensors"]["conv_norm_out.weight"] < norm).all()
    assert (norm < trained["tensors"]["conv_norm_out.weight"]).all()
    average.restore(model.parameters())
    assert_unchanged(model, trained)
