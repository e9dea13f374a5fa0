"""Whole pipelines: PipelineQuantizationConfig on load, save, reload with no config, and bitwise equal images."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PipelineQuantizationConfig,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

import hfquant
from hfquant import HfQuantConfig
from hfquant.demo import DIGITS_PATH, load_digits_pipeline
from hfquant.integrations.compat import NEEDS_HFQUANT
from hfquant.nn.modules import quant_layers
from tests.integrations import small_models
from tests.integrations.small_models import sqnr

ROOT = Path(__file__).parents[2]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<p>", "<s>", "</s>", *"abcdefgh"])}, "<p>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<p>", eos_token="</s>", bos_token="<s>", model_max_length=20
    )


def vae(**overrides: Any) -> AutoencoderKL:
    torch.manual_seed(30)
    return AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        **overrides,
    ).eval()


def clip(hidden: int, cls: type = CLIPTextModel, projection: int = 20, seed: int = 31) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "projection_dim": projection, "intermediate_size": 41}
    config = CLIPTextConfig(
        vocab_size=11,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=20,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **sizes,
    )
    return cls(config).eval()


def t5(width: int) -> nn.Module:
    torch.manual_seed(33)
    return T5EncoderModel(
        T5Config(vocab_size=11, d_model=width, d_kv=9, d_ff=52, num_layers=2, num_heads=3, pad_token_id=0)
    ).eval()


def stable_diffusion() -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae(),
        clip(36),
        tokenizer(),
        small_models.unet(),
        DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd3() -> DiffusionPipeline:
    return StableDiffusion3Pipeline(
        small_models.sd3(),
        FlowMatchEulerDiscreteScheduler(),
        vae(shift_factor=0.06),
        clip(18, CLIPTextModelWithProjection, 20),
        tokenizer(),
        clip(18, CLIPTextModelWithProjection, 10, seed=32),
        tokenizer(),
        t5(36),
        tokenizer(),
    )


def flux() -> DiffusionPipeline:
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae(shift_factor=0.06),
        clip(30),
        tokenizer(),
        t5(28),
        tokenizer(),
        small_models.flux(),
    )


def pixart() -> DiffusionPipeline:
    return PixArtAlphaPipeline(tokenizer(), t5(36), vae(), small_models.pixart(), DPMSolverMultistepScheduler())


PIPELINES = {"stable_diffusion": stable_diffusion, "sd3": sd3, "flux": flux, "pixart": pixart}
CALLS: dict[str, dict[str, Any]] = {
    "stable_diffusion": {},
    "sd3": {"max_sequence_length": 20},
    "flux": {"max_sequence_length": 20},
    "pixart": {"max_sequence_length": 20, "clean_caption": False, "use_resolution_binning": False},
}


@torch.no_grad()
def images(pipe: DiffusionPipeline, name: str) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    size = {"height": 8, "width": 8, "num_inference_steps": 2, "output_type": "pt"}
    return pipe("a b c", generator=generator, **size, **CALLS[name]).images


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, build in PIPELINES.items():
        made[name] = tmp_path_factory.mktemp(name)
        build().save_pretrained(made[name])
    return made


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", PIPELINES)
def test_two_components_by_quant_mapping(name, folders, tmp_path):
    denoiser = "unet" if name == "stable_diffusion" else "transformer"
    encoder = "text_encoder_2" if name == "flux" else "text_encoder"
    weights = {"opt": {"type": "default"}, "weight_quant": {"type": "int6", "axis": -1}, "input_quant": None}
    mapping = {denoiser: HfQuantConfig("w8a8-dynamic"), encoder: HfQuantConfig({"default": weights})}
    before = {component: config.to_dict() for component, config in mapping.items()}
    pipe = DiffusionPipeline.from_pretrained(
        folders[name], quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
    )
    assert {component: config.to_dict() for component, config in mapping.items()} == before
    original = PIPELINES[name]()
    for component in (denoiser, encoder):
        in_memory = hfquant.quantize(getattr(original, component), None, mapping[component])
        assert quant_layers(in_memory).keys() == quant_layers(getattr(pipe, component)).keys()
    quantized = {n for n, c in pipe.components.items() if isinstance(c, nn.Module) and quant_layers(c)}
    assert quantized == {denoiser, encoder}
    # Quantizing in memory or on load gives the same pipeline.
    expected = images(original, name)
    assert torch.equal(images(pipe, name), expected)
    assert sqnr(images(PIPELINES[name](), name), expected) > 15

    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(original)
    assert torch.equal(images(again, name), expected)


def test_every_component_by_quant_backend(folders, tmp_path, caplog):
    config = PipelineQuantizationConfig(quant_backend="hfquant", quant_kwargs={"config": "w8a8-dynamic"})
    with caplog.at_level(logging.INFO, "hfquant"):
        pipe = DiffusionPipeline.from_pretrained(folders["stable_diffusion"], quantization_config=config)
    assert {n: len(quant_layers(getattr(pipe, n))) for n in ("unet", "text_encoder", "vae")} == {
        "unet": 51,
        "text_encoder": 12,
        "vae": 8,
    }
    assert sum("layers quantized" in record.message for record in caplog.records) == 3
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(images(again, "stable_diffusion"), images(pipe, "stable_diffusion"))
    # Selected components, and every option of the config class.
    config = PipelineQuantizationConfig(
        quant_backend="hfquant",
        quant_kwargs={"config": "w8a16", "modules_to_not_convert": ["mlp"]},
        components_to_quantize=["text_encoder"],
    )
    pipe = DiffusionPipeline.from_pretrained(folders["stable_diffusion"], quantization_config=config)
    assert len(quant_layers(pipe.text_encoder)) == 8
    assert not quant_layers(pipe.unet)


def test_pipeline_in_bfloat16(folders, tmp_path):
    config = PipelineQuantizationConfig(
        quant_mapping={"transformer": HfQuantConfig("w8a8-dynamic"), "text_encoder": HfQuantConfig("w8a16")}
    )
    kwargs = {"dtype": torch.bfloat16}
    pipe = DiffusionPipeline.from_pretrained(folders["pixart"], quantization_config=config, **kwargs)
    for component in (pipe.transformer, pipe.text_encoder):
        assert component.dtype == torch.bfloat16
        assert all(layer.weight_scale.dtype == torch.float32 for layer in quant_layers(component).values())
    expected = images(pipe, "pixart")
    assert expected.isfinite().all()
    pipe.save_pretrained(tmp_path)
    assert torch.equal(images(DiffusionPipeline.from_pretrained(tmp_path, **kwargs), "pixart"), expected)


def test_quantized_components_given_to_a_pipeline(folders, tmp_path):
    """Each component is loaded by its own library, combined by hand, and reloaded without a config."""
    transformer = type(small_models.pixart()).from_pretrained(
        folders["pixart"], subfolder="transformer", quantization_config=HfQuantConfig("w8a8-dynamic")
    )
    encoder = T5EncoderModel.from_pretrained(
        folders["pixart"], subfolder="text_encoder", quantization_config=HfQuantConfig("w8a16")
    )
    pipe = PixArtAlphaPipeline.from_pretrained(folders["pixart"], transformer=transformer, text_encoder=encoder)
    assert pipe.transformer is transformer
    expected = images(pipe, "pixart")
    pipe.save_pretrained(tmp_path)
    assert torch.equal(images(PixArtAlphaPipeline.from_pretrained(tmp_path), "pixart"), expected)


def test_a_component_refuses_prompts_as_calibration(folders):
    config = PipelineQuantizationConfig(
        quant_mapping={"transformer": HfQuantConfig("w8a8", calibration=["a prompt", "another"])}
    )
    with pytest.raises(ValueError, match="quantize_pipeline"):
        DiffusionPipeline.from_pretrained(folders["pixart"], quantization_config=config)
    config = PipelineQuantizationConfig(quant_mapping={"transformer": HfQuantConfig("w8a8")})
    with pytest.raises(ValueError, match="needs calibration data"):
        DiffusionPipeline.from_pretrained(folders["pixart"], quantization_config=config)


def digits(pipe: DiffusionPipeline) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    labels = list(range(10))
    generator = torch.Generator().manual_seed(3)
    return pipe(labels, num_inference_steps=10, generator=generator, output_type="pt").images


FRESH = """
import hashlib, sys, torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from transformers import LlamaForCausalLM
torch.set_num_threads(1)
digits, eight_bits, four_bits, pixart = sys.argv[1:]
explicit = {"experts_implementation": "eager"}
for cls, folder, options in (
    (LlamaForCausalLM, eight_bits, {}),
    (LlamaForCausalLM, four_bits, {"ignore_mismatched_sizes": True}),
    (LlamaForCausalLM, eight_bits, explicit),
    (LlamaForCausalLM, four_bits, explicit),
    (DiTTransformer2DModel, digits + "/transformer", {}),
    (DiffusionPipeline, pixart, {}),
):
    try:
        cls.from_pretrained(folder, **options)
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0].partition(" is not supported")[0].partition(" - ")[0])
    else:
        print("loaded", folder)
assert "hfquant" not in sys.modules

from hfquant.demo import DigitsPipeline
pipe = DigitsPipeline.from_pretrained(digits)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(3)
results = [pipe(list(range(10)), num_inference_steps=10, generator=generator, output_type="pt").images]
for folder in (eight_bits, four_bits):
    with torch.no_grad():
        results.append(LlamaForCausalLM.from_pretrained(folder)(input_ids=torch.arange(3, 20)[None]).logits)
for tensor in results:
    print(hashlib.sha256(tensor.numpy().tobytes()).hexdigest())
"""


def test_digits_pipeline_and_a_fresh_process(checkpoint, folders, tmp_path):
    """A new process gives the same bits; without hfquant, loading fails, since codes in a plain linear would be noise.

    The config requests an experts implementation that only hfquant has, so the error names hfquant. If the user asks
    for another implementation, the shape of the codes still makes loading fail.
    """
    config = PipelineQuantizationConfig(quant_mapping={"transformer": HfQuantConfig("w8a8-dynamic")})
    pipe = DiffusionPipeline.from_pretrained(DIGITS_PATH, quantization_config=config)
    original = load_digits_pipeline()
    linears = sum(type(m) is nn.Linear for m in original.transformer.modules())
    assert len(quant_layers(pipe.transformer)) == linears - 1  # all but the last projection
    for name, layer in quant_layers(pipe.transformer).items():
        assert sqnr(original.transformer.get_submodule(name).weight, layer.effective_weight()) >= 35
    expected = [digits(pipe)]
    assert sqnr(digits(original), expected[0]) > 10
    saved = [tmp_path / "digits", tmp_path / "8", tmp_path / "4", tmp_path / "pixart"]
    pipe.save_pretrained(saved[0])
    stored = json.loads((saved[0] / "transformer" / "config.json").read_text())
    assert stored["quantization_config"]["quant_method"] == "hfquant"
    assert torch.equal(digits(DiffusionPipeline.from_pretrained(saved[0])), expected[0])
    four_bits = {"opt": {"type": "default"}, "weight_quant": {"type": "int4", "axis": -1}, "input_quant": None}
    for folder, rules in ((saved[1], "w8a8-dynamic"), (saved[2], {"default": four_bits})):
        model = type(small_models.llama()).from_pretrained(
            checkpoint("llama"), quantization_config=HfQuantConfig(rules)
        )
        model.save_pretrained(folder)
        with torch.no_grad():
            expected.append(model(input_ids=torch.arange(3, 20)[None]).logits)
    encoder = PipelineQuantizationConfig(quant_mapping={"text_encoder": HfQuantConfig("w8a16")})
    DiffusionPipeline.from_pretrained(folders["pixart"], quantization_config=encoder).save_pretrained(saved[3])

    run = subprocess.run(
        [sys.executable, "-c", FRESH, *saved],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "warning"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        *[f'ValueError Specified `experts_implementation="{NEEDS_HFQUANT}"`'] * 2,
        *[
            "RuntimeError You set `ignore_mismatched_sizes` to `False`, thus raising an error. "
            "For details look at the above report!"
        ]
        * 2,
        "ValueError Unknown quantization type, got hfquant",
        f'ValueError Specified `experts_implementation="{NEEDS_HFQUANT}"`',
        *[hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in expected],
    ]
    assert "Unknown quantization type, got hfquant" in run.stderr
