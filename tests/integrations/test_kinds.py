"""Every kind of layer in real classes of both libraries: quantized, saved, loaded, run, and dequantized."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    DiTTransformer2DModel,
    ModelMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    FalconConfig,
    FalconForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperModel,
)

import hfquant
from hfquant import PRESETS, HfQuantConfig
from hfquant.nn.conv import QuantConv
from hfquant.nn.modules import quant_layers
from tests.schemes import SVDQUANT


def preset(name: str, *include: str) -> dict[str, Any]:
    return {"default": {**copy.deepcopy(PRESETS[name]["default"]), "include": list(include)}}


def error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def share(plan: Any, model: nn.Module) -> float:
    quantized = sum(p.in_features * p.out_features for p in plan.layers.values() if not p.tied)
    return quantized / sum(p.numel() for p in model.parameters() if p.dim() > 1)


# Denoisers and autoencoders.

SDXL: dict[str, Any] = {  # as published, stabilityai/stable-diffusion-xl-base-1.0
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "in_channels": 4, "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "layers_per_block": 2,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "sample_size": 128,
    "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}  # fmt: skip


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, cross_attention_dim=16, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip


def tiny_sdxl() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            **SDXL, "block_out_channels": (32, 64), "attention_head_dim": (2, 4), "cross_attention_dim": 24,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "transformer_layers_per_block": (1, 2),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "addition_time_embed_dim": 8, "sample_size": 8,
            "projection_class_embeddings_input_dim": 80, "layers_per_block": 1,
        }
    )  # fmt: skip


def tiny_kl() -> AutoencoderKL:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=8, latent_channels=4, **kinds)


def tiny_vq() -> VQModel:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return VQModel(block_out_channels=(16, 32), norm_num_groups=8, latent_channels=3, num_vq_embeddings=16, **kinds)


def tiny_wan() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8, z_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 8, latents_std=[1.0] * 8,
    )  # fmt: skip


def tiny_cogvideox() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip


def denoiser_inputs(width: int) -> dict[str, Any]:
    pooled = {"text_embeds": torch.randn(2, 32), "time_ids": torch.ones(2, 6)}
    return {
        "sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, width), "added_cond_kwargs": pooled,
    }  # fmt: skip


DENOISERS = {
    "sd": (tiny_unet, lambda: denoiser_inputs(16)),
    "sdxl": (tiny_sdxl, lambda: denoiser_inputs(24)),
}
AUTOENCODERS = {
    "kl": (tiny_kl, lambda: {"sample": torch.randn(1, 3, 16, 16)}),
    "vq": (tiny_vq, lambda: {"sample": torch.randn(1, 3, 16, 16)}),
    "wan": (tiny_wan, lambda: {"sample": torch.randn(1, 3, 5, 16, 16)}),
    "cogvideox": (tiny_cogvideox, lambda: {"sample": torch.randn(1, 3, 5, 16, 16)}),
}


def weights_of(folder: Path) -> bytes:
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


def check_round_trip(model: Any, inputs: dict[str, Any], output: Tensor, folder: Path) -> Any:
    """Check that a model reloads to the same outputs, and that saving it again gives the same bytes."""
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    assert torch.equal(loaded(**inputs)[0], output)
    loaded.save_pretrained(folder / "again")
    assert weights_of(folder / "again") == weights_of(folder)
    return loaded


def check_layers(model: nn.Module, original: nn.Module, at_least: float) -> None:
    """Check that each convolution computes the same on codes as on floats, and is as accurate as its bits promise."""
    for name, layer in quant_layers(model).items():
        if not isinstance(layer, QuantConv):
            continue
        conv: Any = original.get_submodule(name)
        x = torch.randn(1, conv.in_channels, *(2 * k + 1 for k in conv.kernel_size))
        layer.real_quant = False
        fake = layer(x)
        layer.real_quant = True
        torch.testing.assert_close(layer(x), fake, rtol=1e-4, atol=1e-4)
        sqnr = -20 * torch.log10((fake - conv(x)).norm() / conv(x).norm())
        assert sqnr > at_least, name


@pytest.mark.parametrize("name", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("scheme", "at_least"), [("w8a8-dynamic", 34.0), ("w4a16", 14.0)])
@torch.no_grad()
def test_unets(name: str, scheme: str, at_least: float, tmp_path: Path) -> None:
    make, inputs = DENOISERS[name][0], DENOISERS[name][1]()
    model: Any = make().eval()
    model.save_pretrained(tmp_path / "float")
    exact = model(**inputs)[0]
    convs = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)} - {"conv_in", "conv_out"}
    # While loading, weight by weight.
    streamed = type(model).from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig(scheme))
    layers = quant_layers(streamed)
    assert {n for n, layer in layers.items() if isinstance(layer, QuantConv)} == convs
    assert share(hfquant.plan(model, scheme), model) > 0.95
    check_layers(streamed, model, at_least)
    output = streamed(**inputs)[0]
    assert error(output, exact) < (0.05 if scheme.startswith("w8") else 0.4)
    loaded = check_round_trip(streamed, inputs, output, tmp_path / "quantized")
    with safe_open(tmp_path / "quantized" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_slice("down_blocks.0.resnets.0.conv1.weight").get_shape()[:2] == [1, 32]
    hfquant.dequantize(loaded)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    # The same when quantized in memory.
    hfquant.quantize(model, None, scheme)
    assert torch.equal(model(**inputs)[0], output)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-gptq", pytest.param(SVDQUANT, id="svdquant")])
@pytest.mark.parametrize("per_layer_mode", [False, True])
@torch.no_grad()
def test_a_calibrated_unet(scheme: str | dict[str, Any], per_layer_mode: bool, tmp_path: Path) -> None:
    model: Any = tiny_unet().eval()
    data = [denoiser_inputs(16) for _ in range(2)]
    plain, exact = copy.deepcopy(model), model(**data[0])[0]
    hfquant.quantize(model, data, scheme, per_layer_mode)
    output = model(**data[0])[0]
    check_round_trip(model, data[0], output, tmp_path)
    convs = [r for r in model.quant_report.layers if "kernel_size" in r.what]
    assert len(convs) == sum(isinstance(m, QuantConv) for m in model.modules())
    assert all(r.sqnr is not None and r.sqnr > (25 if scheme == "w8a8" else 12) for r in convs)
    if scheme == "w4a16-gptq":
        hfquant.quantize(plain, None, "w4a16")
        assert error(output, exact) < error(plain(**data[0])[0], exact)


@pytest.mark.slow
def test_sdxl_as_published() -> None:
    """On the meta device, in seconds; everything but the layers that read and write the latents is quantized."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**SDXL)
    found = hfquant.plan(model, "w8a8-dynamic")
    assert found.skipped.keys() == {"conv_in", "conv_out"}
    assert share(found, model) > 0.99
    assert sum(p.rank == 4 for p in found.layers.values()) == 49


@pytest.mark.parametrize("name", ["kl", *(pytest.param(n, marks=pytest.mark.slow) for n in ("vq", "wan", "cogvideox"))])
@torch.no_grad()
def test_autoencoders(name: str, tmp_path: Path) -> None:
    """Their convolutions stay in float unless an option of the config includes them."""
    make, inputs = AUTOENCODERS[name][0], AUTOENCODERS[name][1]()
    model: Any = make().eval()
    exact = model(**inputs)[0]
    assert not any(p.rank > 2 for p in hfquant.plan(model, "w8a16").layers.values())
    config = preset("w8a16", "autoencoder_convs")
    model.save_pretrained(tmp_path / "float")
    quantized = type(model).from_pretrained(tmp_path / "float", quantization_config=HfQuantConfig(config))
    assert sum(isinstance(layer, QuantConv) for layer in quantized.modules()) >= 15
    check_layers(quantized, model, 40)
    output = quantized(**inputs)[0]
    if name != "vq":  # whose latents jump between codebook entries
        assert error(output, exact) < 0.05
    loaded = check_round_trip(quantized, inputs, output, tmp_path / "quantized")
    hfquant.dequantize(loaded)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]


@torch.no_grad()
def test_a_dit_keeps_its_patches(tmp_path: Path) -> None:
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=2, num_layers=1, sample_size=4, patch_size=2,
        num_embeds_ada_norm=5, norm_num_groups=2,
    ).eval()  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 2, 4, 4), "timestep": torch.tensor([3, 5])}
    inputs["class_labels"] = torch.tensor([1, 2])
    assert not any(p.rank > 2 for p in hfquant.plan(model, "w8a8-dynamic").layers.values())
    hfquant.quantize(model, None, preset("w8a8-dynamic", "edge_convs", "embeddings"))
    layers = quant_layers(model)
    assert {"pos_embed.proj", "transformer_blocks.0.norm1.emb.class_embedder.embedding_table"} <= layers.keys()
    check_round_trip(model, inputs, model(**inputs)[0], tmp_path)


class TiedDenoiser(ModelMixin, ConfigMixin):
    """A diffusers model whose embedding and head share a weight."""

    @register_to_config
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(20, width), nn.Linear(width, width), nn.Linear(width, 20)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (self.head(self.body(self.embed(ids))),)


@torch.no_grad()
def test_tied_layers_of_diffusers_are_stored_once(tmp_path: Path) -> None:
    model, inputs = TiedDenoiser().eval(), {"ids": torch.randint(0, 20, (2, 5))}
    hfquant.quantize(model, None, preset("w4a16", "embeddings", "output_heads"))
    loaded = check_round_trip(model, inputs, model(**inputs)[0], tmp_path)
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert [k for k in file.keys() if k.startswith("head.")] == ["head.bias"]  # noqa: SIM118 (not a dict)
    assert loaded.head.weight is loaded.embed.weight


@torch.no_grad()
def test_a_dtype_asked_for_when_loading_is_an_embedding_s_too(tmp_path: Path) -> None:
    model, ids = TiedDenoiser().eval(), torch.randint(0, 20, (2, 5))
    hfquant.quantize(model, None, preset("w8a16", "embeddings", "output_heads"))
    model.save_pretrained(tmp_path)
    loaded = TiedDenoiser.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.embed(ids).dtype == torch.bfloat16
    assert loaded(ids)[0].dtype == torch.bfloat16


# Language models.


def tiny(kind: Any, config: Any, **sizes: Any) -> Any:
    return kind(config(vocab_size=60, **sizes)).eval()


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "scale_embedding": True, "max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "llama": lambda: tiny(LlamaForCausalLM, LlamaConfig, intermediate_size=48, tie_word_embeddings=True, **SMALL),
    "llama, untied": lambda: tiny(LlamaForCausalLM, LlamaConfig, intermediate_size=48, **SMALL),
    "gpt2": lambda: tiny(
        GPT2LMHeadModel, GPT2Config, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    ),
    "gemma": lambda: tiny(
        GemmaForCausalLM, GemmaConfig, intermediate_size=48, num_key_value_heads=1, head_dim=16, **SMALL
    ),
    "falcon": lambda: tiny(FalconForCausalLM, FalconConfig, **SMALL),
    "bart": lambda: tiny(BartForConditionalGeneration, BartConfig, **BART),
    "t5": lambda: tiny(T5ForConditionalGeneration, T5Config, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2),
    "bert": lambda: tiny(BertForMaskedLM, BertConfig, intermediate_size=48, **SMALL),
}
#: The layer that owns the codes, and the layers that share them.
OWNERS = {
    "llama": ("model.embed_tokens", {"lm_head"}),
    "llama, untied": ("", set()),
    "gpt2": ("transformer.wte", {"lm_head"}),
    "gemma": ("model.embed_tokens", {"lm_head"}),
    "falcon": ("transformer.word_embeddings", {"lm_head"}),
    "bart": ("model.shared", {"lm_head", "model.encoder.embed_tokens", "model.decoder.embed_tokens"}),
    "t5": ("shared", {"lm_head", "encoder.embed_tokens", "decoder.embed_tokens"}),
    "bert": ("bert.embeddings.word_embeddings", {"cls.predictions.decoder"}),
}  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", ["w8a8", pytest.param("w4a16", marks=pytest.mark.slow)])
@torch.no_grad()
def test_embeddings_and_heads(name: str, scheme: str, tmp_path: Path) -> None:
    model, inputs = MODELS[name](), {"input_ids": torch.randint(5, 60, (2, 7))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(5, 60, (2, 4))
    exact = model(**inputs).logits
    model.save_pretrained(tmp_path / "float")
    config = preset(scheme, "embeddings", "output_heads")
    data = [inputs] if scheme == "w8a8" else None
    quantized = type(model).from_pretrained(
        tmp_path / "float", quantization_config=HfQuantConfig(config, calibration=data)
    )
    layers, (owner, others) = quant_layers(quantized), OWNERS[name]
    assert {n: layer.plan.tied for n, layer in layers.items() if layer.plan.tied} == dict.fromkeys(others, owner)
    assert all(layers[n].weight is layers[owner].weight for n in others)
    output = quantized(**inputs).logits
    assert error(output, exact) < (0.06 if scheme == "w8a8" else 0.35)

    quantized.save_pretrained(tmp_path / "quantized")
    with safe_open(tmp_path / "quantized" / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert not stored & {f"{n}.weight" for n in others}
    assert not stored & {f"{n}.weight_scale" for n in others}
    loaded = type(model).from_pretrained(tmp_path / "quantized")
    assert torch.equal(loaded(**inputs).logits, output)
    again = quant_layers(loaded)
    assert all(again[n].weight is again[owner].weight for n in others)
    loaded.tie_weights()
    assert torch.equal(loaded(**inputs).logits, output)
    loaded.save_pretrained(tmp_path / "again")
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "quantized")
    # The same when quantized in memory; tied again in float.
    twin = type(model).from_pretrained(tmp_path / "float")
    hfquant.quantize(twin, data, config)
    assert torch.equal(twin(**inputs).logits, output)
    hfquant.dequantize(loaded)
    modules = dict(loaded.named_modules())
    assert all(modules[n].weight is modules[owner].weight for n in others)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]


@torch.no_grad()
def test_a_model_without_a_head_reads_the_checkpoint(tmp_path: Path) -> None:
    model, ids = MODELS["llama"](), torch.randint(5, 60, (2, 7))
    hfquant.quantize(model, None, preset("w8a8-dynamic", "embeddings", "output_heads"))
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert "embed_tokens" in quant_layers(body)


@torch.no_grad()
def test_a_tied_layer_whose_owner_is_float_is_named(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    hfquant.quantize(model, None, preset("w8a8-dynamic", "embeddings", "output_heads"))
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    stored["quantization_config"]["skipped"] = {"model.embed_tokens": "an embedding"}
    file.write_text(json.dumps(stored))
    with pytest.raises(hfquant.ConfigError, match=r"'lm_head': it is tied to 'model.embed_tokens', which is not quant"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_shares_of_language_models() -> None:
    """All matrices except embeddings and heads are quantized; with the option, these as well."""
    for name in ("gpt2", "falcon"):
        model = MODELS[name]()
        blocks = {n for n, m in model.named_modules() if type(m).__name__ in ("Conv1D", "FalconLinear")}
        assert hfquant.plan(model, "w8a8-dynamic").layers.keys() == blocks
        assert share(hfquant.plan(model, preset("w8a8-dynamic", "embeddings", "output_heads")), model) == 1


@torch.no_grad()
def test_convolutions_of_transformers() -> None:
    """Whisper's are quantized; CLIP's patch embedding stays in float, since other code reads its dtype."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 16, "vocab_size": 60}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    whisper = WhisperModel(WhisperConfig(max_source_positions=20, **sizes, **heads, **special)).eval()
    inputs = {"input_features": torch.randn(1, 16, 40), "decoder_input_ids": torch.tensor([[1, 2]])}
    exact = whisper(**inputs).last_hidden_state
    hfquant.quantize(whisper, None, "w8a8-dynamic")
    assert {n for n, layer in quant_layers(whisper).items() if isinstance(layer, QuantConv)} == {
        "encoder.conv1", "encoder.conv2",
    }  # fmt: skip
    assert error(whisper(**inputs).last_hidden_state, exact) < 0.05
    clip = CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, intermediate_size=32, **SMALL))
    found = hfquant.plan(clip, preset("w8a8-dynamic", "edge_convs"))
    patches = "embeddings.patch_embedding"
    assert found.skipped[next(n for n in found.skipped if n.endswith(patches))].startswith("code outside it casts")


@torch.no_grad()
def test_a_pipeline_of_both_libraries(tmp_path: Path) -> None:
    """The UNet's convolutions and the text encoder's embeddings are quantized; the autoencoder is unchanged."""
    from diffusers import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextModel(
        CLIPTextConfig(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    pipe = StableDiffusionPipeline(
        vae=tiny_kl(), text_encoder=text, tokenizer=None, unet=tiny_unet(), scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    hfquant.quantize(pipe.unet, None, "w8a8-dynamic")
    hfquant.quantize(pipe.text_encoder, None, preset("w8a8-dynamic", "embeddings"))
    inputs = {
        "prompt_embeds": torch.randn(1, 5, 16), "negative_prompt_embeds": torch.randn(1, 5, 16), "output_type": "pt",
        "num_inference_steps": 2,
    }  # fmt: skip

    def image(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(**inputs, generator=torch.Generator().manual_seed(0)).images

    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None, tokenizer=None)
    assert torch.equal(image(loaded), image(pipe))
    assert any(isinstance(m, QuantConv) for m in loaded.unet.modules())
    assert not quant_layers(loaded.vae)
    ids = torch.randint(0, 50, (1, 6))
    assert torch.equal(loaded.text_encoder(ids)[0], pipe.text_encoder(ids)[0])
