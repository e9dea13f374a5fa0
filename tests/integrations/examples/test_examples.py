"""Patterns in real model classes with tiny random configs, run with example inputs derived from those configs."""

import logging

import pytest
import torch
from torch import nn

from benchmarks import tiny_transformers
from hfquant.dataflow import twin
from hfquant.dataflow.trace import trace
from hfquant.enums import SegPattern as P
from hfquant.integrations.examples import example_inputs
from hfquant.nn.kinds import layers_in


def flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=10,
        pooled_projection_dim=6,
        in_channels=4,
        axes_dims_rope=(4, 4, 4),
        guidance_embeds=True,
    )


def sd3():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        num_layers=2,
        attention_head_dim=6,
        num_attention_heads=2,
        joint_attention_dim=10,
        caption_projection_dim=12,
        pooled_projection_dim=14,
        out_channels=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def sdxl():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=10,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=30,
    )


def pixart(**kwargs):
    from diffusers import PixArtTransformer2DModel

    small = {
        "sample_size": 16,
        "num_layers": 2,
        "attention_head_dim": 6,
        "num_attention_heads": 2,
        "norm_num_groups": 1,
    }
    return PixArtTransformer2DModel(**small, caption_channels=10, cross_attention_dim=12, **kwargs)


def sana():
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=6,
        num_cross_attention_heads=2,
        cross_attention_head_dim=6,
        cross_attention_dim=12,
        caption_channels=10,
        sample_size=8,
    )


def dit():
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=6, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=1
    )


def unet():
    from diffusers import UNet2DModel

    channels = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 4}
    return UNet2DModel(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **channels
    )


def wan():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=10, freq_dim=8, ffn_dim=20, num_layers=1, in_channels=4
    )


TEXT = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}


def of_transformers(name, config, **kwargs):
    import transformers

    return getattr(transformers, name)(getattr(transformers, config)(**kwargs))


def llama(**kwargs):
    return of_transformers("LlamaForCausalLM", "LlamaConfig", **TEXT, intermediate_size=20, **kwargs)


def phi3():
    return of_transformers("Phi3ForCausalLM", "Phi3Config", **TEXT, intermediate_size=20, num_key_value_heads=1)


def neox():
    return of_transformers("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT, intermediate_size=20)


def mpt():
    return of_transformers("MptForCausalLM", "MptConfig", vocab_size=50, d_model=12, n_heads=2, n_layers=2)


def mixtral():
    sizes = {"intermediate_size": 20, "num_local_experts": 2, "num_key_value_heads": 1}
    return of_transformers("MixtralForCausalLM", "MixtralConfig", **TEXT, **sizes)


def t5():
    sizes = {"vocab_size": 50, "d_model": 12, "d_kv": 6, "num_heads": 2, "d_ff": 20, "num_layers": 1}
    return of_transformers(
        "T5ForConditionalGeneration", "T5Config", **sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0
    )


def bart():
    sizes = {"d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return of_transformers("BartForConditionalGeneration", "BartConfig", vocab_size=50, **sizes, **heads)


def bert():
    return of_transformers("BertModel", "BertConfig", **TEXT, intermediate_size=20)


VISION = {
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "image_size": 16,
    "patch_size": 8,
}


def vit():
    return of_transformers("ViTForImageClassification", "ViTConfig", **VISION)


def clip():
    text = {
        "vocab_size": 50,
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 20,
    }
    return of_transformers("CLIPModel", "CLIPConfig", text_config=text, vision_config=VISION, projection_dim=6)


def whisper():
    sizes = {"d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 10, "num_mel_bins": 8}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return of_transformers("WhisperForConditionalGeneration", "WhisperConfig", vocab_size=50, **sizes, **heads, **ids)


# Per class, what is found at some of its linears: (input sizes, output sizes, activations), taken from its source.
CLASSES = {
    flux: {
        "single_transformer_blocks.0.proj_out": ((24, 96), (24,), (None, "gelu")),
        "single_transformer_blocks.0.norm.linear": ((24,), (24,) * 3, ("silu",)),
        "transformer_blocks.0.norm1_context.linear": ((24,), (24,) * 6, ("silu",)),
        "transformer_blocks.0.attn.to_add_out": ((12,) * 2, (24,), (None,) * 2),
        "transformer_blocks.0.ff.net.2": ((96,), (24,), ("gelu",)),
        "transformer_blocks.0.attn.to_q": ((24,), (24,), (None,)),
        "norm_out.linear": ((24,), (24,) * 2, ("silu",)),
        "time_text_embed.guidance_embedder.linear_1": ((128, 128), (24,), (None, None)),
    },
    sd3: {
        "transformer_blocks.0.norm1.linear": ((12,), (12,) * 9, ("silu",)),
        "transformer_blocks.1.norm1.linear": ((12,), (12,) * 6, ("silu",)),
        "transformer_blocks.1.norm1_context.linear": ((12,), (12,) * 2, ("silu",)),
        "transformer_blocks.0.ff_context.net.2": ((48,), (12,), ("gelu",)),
        "transformer_blocks.0.attn.to_add_out": ((6,) * 2, (12,), (None,) * 2),
    },
    sdxl: {
        "add_embedding.linear_1": ((6, 24), (32,), (None, None)),
        "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": ((16,), (64, 64), (None,)),
        "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": ((64,), (16,), ("gelu",)),
        "down_blocks.1.resnets.0.time_emb_proj": ((32,), (16,), ("silu",)),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": ((4,) * 4, (16,), (None,) * 4),
    },
    pixart: {
        "adaln_single.linear": ((12,), (12,) * 6, ("silu",)),
        "caption_projection.linear_2": ((12,), (12,), ("gelu",)),
        "transformer_blocks.0.attn1.to_q": ((12,), (12,), (None,)),
        "transformer_blocks.1.ff.net.2": ((48,), (12,), ("gelu",)),
    },
    sana: {
        "time_embed.linear": ((12,), (12,) * 6, ("silu",)),
        "transformer_blocks.0.attn1.to_out.0": ((6,) * 2, (12,), (None,) * 2),
    },
    dit: {
        "transformer_blocks.0.norm1.linear": ((12,), (12,) * 6, ("silu",)),
        "transformer_blocks.1.ff.net.2": ((48,), (12,), ("gelu",)),
        "proj_out_1": ((12,), (12,) * 2, ("silu",)),
    },
    unet: {
        "time_embedding.linear_2": ((32,), (32,), ("silu",)),
        "mid_block.attentions.0.to_out.0": ((4,) * 4, (16,), (None,) * 4),
    },
    wan: {
        "condition_embedder.time_proj": ((24,), (24,) * 6, ("silu",)),
        "blocks.0.ffn.net.2": ((20,), (24,), ("gelu",)),
    },
    llama: {
        "model.layers.0.self_attn.q_proj": ((12,), (12,), (None,)),
        "model.layers.0.self_attn.o_proj": ((6,) * 2, (12,), (None,) * 2),
        "model.layers.1.mlp.down_proj": ((20,), (12,), ("silu",)),
    },
    phi3: {
        "model.layers.0.self_attn.qkv_proj": ((12,), (12, 6, 6), (None,)),
        "model.layers.0.mlp.gate_up_proj": ((12,), (20, 20), (None,)),
        "model.layers.1.mlp.down_proj": ((20,), (12,), ("silu",)),
    },
    neox: {"gpt_neox.layers.0.attention.query_key_value": ((12,), (36,), (None,))},
    mpt: {"transformer.blocks.0.attn.Wqkv": ((12,), (12,) * 3, (None,))},
    mixtral: {"model.layers.0.self_attn.o_proj": ((6,) * 2, (12,), (None,) * 2)},
    t5: {"encoder.block.0.layer.1.DenseReluDense.wo": ((20,), (12,), ("gelu",))},
    bart: {"model.decoder.layers.0.fc2": ((20,), (12,), ("gelu",))},
    bert: {"encoder.layer.1.output.dense": ((20,), (12,), ("gelu",))},
    vit: {"vit.layers.0.mlp.fc2": ((20,), (12,), ("gelu",))},
    clip: {"text_model.encoder.layers.0.mlp.fc2": ((20,), (12,), ("quick_gelu",))},
    whisper: {"model.encoder.layers.0.fc2": ((20,), (12,), ("gelu",))},
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("build", CLASSES, ids=lambda f: f.__name__)
def test_real_classes(build):
    """Every linear is seen on the meta device, and likewise with real weights, which run on the example inputs."""
    with torch.device("meta"):
        model = build()
    found = trace(model, example_inputs(model))
    # An embedding that only shares its weight with others never runs.
    missed = layers_in(model).keys() - found.keys()
    assert found.keys() <= layers_in(model).keys()
    assert all(isinstance(model.get_submodule(name), nn.Embedding) for name in missed)
    assert not any(t.obstacle for n, t in found.items() if isinstance(model.get_submodule(n), nn.Linear))
    for name, expected in CLASSES[build].items():
        t = found[name]
        assert (t.input_segments, t.output_segments, t.activations) == expected, name
    real = build().eval()
    with torch.no_grad():
        real(**example_inputs(real))
    assert trace(real, example_inputs(real)) == found


@pytest.mark.parametrize("build", [flux, llama, sdxl], ids=lambda f: f.__name__)
def test_real_classes_on_real_tensors(build, monkeypatch):
    """The fallback to real tensors finds the same as the pass on fake ones."""
    model = build().bfloat16()
    example = example_inputs(model)
    found = trace(model, example)

    def refuse(**kwargs):
        raise NotImplementedError("no fakes today")

    monkeypatch.setattr(twin, "FakeTensorMode", refuse)
    assert trace(model, example) == found


def test_pixart_with_sizes():
    model = pixart(use_additional_conditions=True)
    assert trace(model, example_inputs(model))["adaln_single.emb.resolution_embedder.linear_2"].activations == ("silu",)


def test_qkv_fused_by_diffusers():
    model = sdxl()
    model.fuse_qkv_projections()
    found = trace(model, example_inputs(model))
    fused = "mid_block.attentions.0.transformer_blocks.0"
    assert found[f"{fused}.attn1.to_qkv"].output_segments == (16, 16, 16)
    assert found[f"{fused}.attn2.to_kv"].output_segments == (16, 16)


def test_group_offloading():
    model = flux()
    expected = trace(model, example_inputs(model))
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert trace(model, example_inputs(model)) == expected


def test_hunyuan_skip_connection():
    """``cat -> LayerNorm -> Linear``, the long skip connection of U-shaped transformers."""
    from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiTBlock

    block = HunyuanDiTBlock(12, 2, cross_attention_dim=10, skip=True)
    hidden = torch.zeros(2, 5, 12)
    example = {"hidden_states": hidden, "encoder_hidden_states": torch.zeros(2, 3, 10), "temb": torch.zeros(2, 12)}
    assert trace(block, example | {"skip": hidden})["skip_linear"].input_segments == (12, 12)


def test_no_example_inputs_for_what_is_not_known(caplog):
    """The result is None, and a debug line gives the reason."""
    from diffusers import MotionAdapter

    with torch.device("meta"):
        models = [nn.Linear(2, 2), MotionAdapter(block_out_channels=(32,)), flux(), sd3()]
    models[2].register_to_config(joint_attention_dim=None)  # configs that the classes themselves reject
    models[3].register_to_config(patch_size="two")
    for model, why in zip(models, ["not a model of", "no forward of its own", "joint_attention_dim", ""], strict=True):
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "hfquant"):
            assert example_inputs(model) is None
        assert f"{type(model).__name__}: no example inputs" in caplog.text
        assert why in caplog.text


def test_example_inputs_take_the_models_dtype():
    example = example_inputs(sdxl().bfloat16())
    assert example["sample"].dtype == example["added_cond_kwargs"]["text_embeds"].dtype == torch.bfloat16
    assert example_inputs(llama())["input_ids"].dtype == torch.long


def test_weights_read_outside_their_forward():
    """HunyuanDiT's pooler passes its linears' weights to a fused attention, so replacing them would break the model."""
    from benchmarks.tiny_diffusers import build

    model = build("HunyuanDiT2DModel")
    found = {name for name, t in trace(model, example_inputs(model)).items() if t.obstacle}
    assert found == {f"time_extra_emb.pooler.{part}_proj" for part in "cqkv"}


@pytest.mark.slow
def test_flux_as_published():
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    found = trace(model, example_inputs(model))
    assert len(found) == 504
    joined = [t for t in found.values() if t.input_segments == (3072, 12288)]
    assert len(joined) == 38
    assert all(t.activations == (None, "gelu") for t in joined)
    assert sum(P.LINEAR2CHUNK in t.patterns for t in found.values()) == 2 * 19 + 38 + 1


def chroma():
    from diffusers import ChromaTransformer2DModel

    heads = {"attention_head_dim": 12, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 4), "joint_attention_dim": 10}
    approximator = {"approximator_num_channels": 8, "approximator_hidden_dim": 12, "approximator_layers": 1}
    return ChromaTransformer2DModel(in_channels=4, num_layers=1, num_single_layers=1, **heads, **approximator)


def auraflow():
    from diffusers import AuraFlowTransformer2DModel

    layers = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 6, "num_attention_heads": 2}
    sizes = {"sample_size": 8, "joint_attention_dim": 10, "caption_projection_dim": 12, "pos_embed_max_size": 64}
    return AuraFlowTransformer2DModel(**layers, **sizes)


def small_unet(**kwargs):
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
    return UNet2DModel(**blocks, block_out_channels=(8,), add_attention=False, **kwargs)


def small_conditional_unet(**kwargs):
    from diffusers import UNet2DConditionModel

    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 4}
    return UNet2DConditionModel(**blocks, **sizes, **{"cross_attention_dim": 10} | kwargs)


INPUTS = {
    "Chroma": chroma,
    "AuraFlow": auraflow,
    "UNet with class numbers": lambda: small_unet(num_class_embeds=3),
    "UNet with class times": lambda: small_unet(class_embed_type="timestep"),
    "UNet with class vectors": lambda: small_unet(class_embed_type="identity"),
    "conditional UNet with class numbers": lambda: small_conditional_unet(num_class_embeds=3),
    "conditional UNet with class times": lambda: small_conditional_unet(class_embed_type="timestep"),
    "conditional UNet with class vectors": lambda: small_conditional_unet(class_embed_type="identity"),
    "conditional UNet with projected classes": lambda: small_conditional_unet(
        class_embed_type="projection", projection_class_embeddings_input_dim=6
    ),
    "conditional UNet with projected text": lambda: small_conditional_unet(
        encoder_hid_dim=6, encoder_hid_dim_type="text_proj"
    ),
    "conditional UNet with a text's and a picture's time": lambda: small_conditional_unet(
        addition_embed_type="text_image", encoder_hid_dim=6, encoder_hid_dim_type="text_image_proj"
    ),
    "conditional UNet with a picture's time": lambda: small_conditional_unet(
        addition_embed_type="image", encoder_hid_dim=6, encoder_hid_dim_type="image_proj"
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", INPUTS)
def test_example_inputs_fit_the_forward(name):
    model = INPUTS[name]().eval()
    with torch.no_grad():
        assert model(**example_inputs(model)).sample.isfinite().all()
    assert trace(model, example_inputs(model)).keys() == layers_in(model).keys()


#: Model types of transformers that need more than one input, and inputs that they must get.
SEVERAL = {
    "blip": {"pixel_values": 4, "input_ids": 2},
    "sam3": {"pixel_values": 4, "input_ids": 2},
    "udop": {"input_ids": 2, "bbox": 3, "decoder_input_ids": 2},
    "videoprism": {"pixel_values_videos": 5, "input_ids": 2},
    "vilt": {"input_ids": 2, "pixel_values": 4},
    "pp_formulanet": {"pixel_values": 4, "decoder_input_ids": 2},
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_models_that_take_several_inputs(kind):
    model = next(tiny_transformers.small(kind, 150_000_000)).eval()
    inputs = example_inputs(model)
    assert {name: value.dim() for name, value in inputs.items()} == SEVERAL[kind]
    with torch.no_grad():
        assert model(**inputs) is not None


@pytest.mark.parametrize("widths", [[[None, 8, 16]] * 2, [8, 16], 16], ids=["published", "of each block", "one"])
def test_what_attentions_of_audioldm2_read(widths):
    """Published U-Nets list a width for each attention of a block; None attends to itself."""
    from diffusers.pipelines.audioldm2 import AudioLDM2UNet2DConditionModel

    model = AudioLDM2UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        cross_attention_dim=widths,
        layers_per_block=1,
        norm_num_groups=8,
    )
    found = trace(model, example_inputs(model))
    assert {name for name, module in model.named_modules() if type(module) is nn.Linear} <= found.keys()
