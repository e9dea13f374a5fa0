"""Random models of real classes, small and with awkward sizes: odd widths, grouped heads, fused and tied weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def llama(**overrides: Any) -> nn.Module:
    """Tied embeddings, grouped-query attention, odd widths (down_proj reads 77 features)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 40,
        "intermediate_size": 77,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes | overrides)).eval()


def llama_of_64(**overrides: Any) -> nn.Module:
    """Widths are multiples of 64, for presets with groups of that size."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    return llama(**sizes | overrides)


def phi3() -> nn.Module:
    """Fused qkv_proj (split in unequal parts) and gate_up_proj (chunked)."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(1)
    config = Phi3Config(
        vocab_size=67,
        hidden_size=40,
        intermediate_size=54,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Phi3ForCausalLM(config).eval()


def t5_encoder() -> nn.Module:
    """``wo`` stays in float32, and the layer reads its weight's dtype."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    config = T5Config(
        vocab_size=61, d_model=36, d_kv=9, d_ff=52, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def t5() -> nn.Module:
    """Encoder-decoder that cannot run without inputs of its decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(2)
    sizes = {"vocab_size": 61, "d_model": 36, "d_kv": 9, "d_ff": 52, "num_layers": 1, "num_heads": 3}
    tokens = {"decoder_start_token_id": 3, "pad_token_id": 0, "eos_token_id": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, **tokens)).eval()


def bart(**overrides: Any) -> nn.Module:
    """Encoder-decoder whose two halves and head share one embedding."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "vocab_size": 71,
        "d_model": 24,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 3,
        "encoder_ffn_dim": 45,
        "decoder_ffn_dim": 39,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
    }
    return BartForConditionalGeneration(BartConfig(**sizes | overrides)).eval()


def clip_text() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(4)
    config = CLIPTextConfig(
        vocab_size=99,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=24,
        projection_dim=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return CLIPTextModel(config).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=83,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=58,
        max_position_embeddings=40,
    )
    return BertModel(config).eval()


def mixtral() -> nn.Module:
    """Experts are 3-D parameters, not linears: without them, most of the model stays in float."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(6)
    config = MixtralConfig(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return MixtralForCausalLM(config).eval()


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(7)
    config = ViTConfig(
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=53,
        image_size=12,
        patch_size=4,
        num_labels=5,
    )
    return ViTForImageClassification(config).eval()


def _ids(vocabulary: int, length: int = 9) -> Tensor:
    return torch.randint(3, vocabulary, (2, length), generator=torch.Generator().manual_seed(11))


def transformers_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return two samples for a transformers model."""
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(11))}
    made = {"input_ids": _ids(model.config.vocab_size)}
    if model.config.is_encoder_decoder:
        made["decoder_input_ids"] = _ids(model.config.vocab_size, 5)
    return made


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "phi3": phi3,
    "t5_encoder": t5_encoder,
    "bart": bart,
    "clip_text": clip_text,
    "bert": bert,
    "mixtral": mixtral,
    "vit": vit,
}


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(20)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(12,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=36,
        attention_head_dim=4,
    ).eval()


def sd3() -> nn.Module:
    """``pos_embed.proj`` is of a kind that stays in float; the context branch of the last block is cut short."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(21)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=3,
        joint_attention_dim=36,
        caption_projection_dim=36,
        pooled_projection_dim=30,
        pos_embed_max_size=8,
    ).eval()


def flux() -> nn.Module:
    """Single blocks concatenate attention and MLP of unequal width before one linear."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(22)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=3,
        joint_attention_dim=28,
        pooled_projection_dim=30,
        axes_dims_rope=(4, 4, 4),
    ).eval()


def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(23)
    return PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=3,
        cross_attention_dim=36,
        caption_channels=36,
    ).eval()


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(24)
    return DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=3,
        num_embeds_ada_norm=10,
    ).eval()


def wan() -> nn.Module:
    """A class whose ``_keep_in_fp32_modules`` names linears."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(25)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=20,
        freq_dim=16,
        ffn_dim=44,
        num_layers=2,
        rope_max_seq_len=16,
    ).eval()


DIFFUSERS: dict[str, Callable[[], nn.Module]] = {
    "unet": unet,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "dit": dit,
    "wan": wan,
}


def denoiser_inputs(model: nn.Module) -> dict[str, Any]:
    """Return two samples for a denoiser, random where hfquant's own example inputs are zero."""
    from hfquant.integrations.examples import example_inputs

    made = example_inputs(model)
    assert made is not None
    generator = torch.Generator().manual_seed(12)

    def noise(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: noise(v) for k, v in value.items()}
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            return torch.randn(value.shape, generator=generator).to(value.dtype)
        return value

    return {k: v if k.endswith("_ids") else noise(v) for k, v in made.items()}


def outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return the first output tensor, with floating-point inputs cast to the model's dtype."""
    dtype = model.dtype

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cast(v) for k, v in value.items()}
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    with torch.no_grad():
        result = model(**{k: cast(v) for k, v in inputs.items()})
    return result[0]


def inputs_of(model: nn.Module) -> dict[str, Any]:
    """Return two samples for any of the models here."""
    return transformers_inputs(model) if hasattr(model, "main_input_name") else denoiser_inputs(model)


def assert_same(model: nn.Module, other: nn.Module, inputs: dict[str, Any] | None = None) -> None:
    """Assert bitwise equal tensors of equal names and dtypes, and equal outputs."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    inputs = inputs or inputs_of(model)
    assert torch.equal(outputs(model, inputs), outputs(other, inputs))


def sqnr(reference: Tensor, value: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in dB."""
    reference, value = reference.double(), value.double()
    return (10 * torch.log10(reference.square().sum() / (reference - value).square().sum())).item()
