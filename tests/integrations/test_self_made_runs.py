"""Pipelines calibrated on runs of their own, and the image that checks them."""

from __future__ import annotations

import logging
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from diffusers import (
    AnimateDiffVideoToVideoPipeline,
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    MarigoldDepthPipeline,
    MotionAdapter,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from huggingface_hub import constants
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import hfquant
from hfquant import CalibrationError, HfQuantConfig, quantize_pipeline
from hfquant.calibration.tensor_cache import folder
from hfquant.demo.pipeline import DigitsPipeline
from hfquant.integrations import self_made_runs as module
from hfquant.integrations.self_made_runs import FRAMES, PROMPTS, VIDEO_ARGUMENTS, own_calls
from hfquant.nn.modules import quant_layers
from tests.affiner.pipelines import _vae
from tests.calibration.tiny_models import tiny_dit, tiny_unet
from tests.calibration.tiny_modular import Denoise, Encode, EncodeImage, tiny_modular
from tests.integrations.test_transformers_data import word_tokenizer

FEW = {"source": "self", "samples": 2}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def classes() -> Any:
    return DigitsPipeline(tiny_dit(), DDIMScheduler())


def text_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 8
    config = CLIPTextConfig(
        vocab_size=13, hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, eos_token_id=2,
    )  # fmt: skip
    return {
        **{"text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer, "vae": _vae(2).eval()},
        **{"unet": tiny_unet(), "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1)},
        **{"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    }


def text() -> Any:
    return StableDiffusionPipeline(**text_parts())


def image() -> Any:
    return StableDiffusionImg2ImgPipeline(**text_parts())


def marigold() -> Any:
    parts = {k: v for k, v in text_parts().items() if k in ("text_encoder", "tokenizer", "vae", "scheduler")}
    unet = UNet2DConditionModel.from_config({**tiny_unet().config, "in_channels": 4}).eval()
    # Its prompt is empty, so without a first token there would be none.
    first = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    parts["tokenizer"].backend_tokenizer.post_processor = first
    sizes = {"default_denoising_steps": 2, "default_processing_resolution": 16}
    return MarigoldDepthPipeline(**parts, unet=unet, prediction_type="depth", **sizes)


def unconditional() -> Any:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    return DDPMPipeline(unet.eval(), DDIMScheduler())


PIPELINES = {
    **{"classes": classes, "text": text, "image": image, "unconditional": unconditional},
    **{"modular": tiny_modular, "modular image": lambda: tiny_modular(EncodeImage, Denoise)},
}


def audio() -> Any:
    """AudioLDM2: a language model writes a part of the text embeddings, embedding by embedding."""
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    roberta = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}
    pieces = [*((token, 0.0) for token in ("<pad>", "</s>", "<unk>")), *((letter, -1.0) for letter in letters)]
    text = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    sounds = {
        "spec_size": 64, "num_mel_bins": 16, "patch_size": 4, "patch_stride": [4, 4], "patch_embeds_hidden_size": 8,
        "hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2], "window_size": 4, "projection_dim": 8,
    }  # fmt: skip
    clap = transformers.ClapConfig(
        text_config={**text, "vocab_size": 40, "projection_dim": 8}, audio_config=sounds, projection_dim=8
    )
    t5 = transformers.T5Config(vocab_size=40, d_model=12, d_kv=6, d_ff=20, num_layers=1, num_heads=2)
    gpt2 = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8, sampling_rate=16000, upsample_initial_channel=8, upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]], normalize_before=False,
    )  # fmt: skip
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    parts = {
        "text_encoder": transformers.ClapModel(clap),
        "text_encoder_2": transformers.T5EncoderModel(t5),
        "tokenizer": transformers.RobertaTokenizer(roberta, [], model_max_length=12),
        "tokenizer_2": transformers.T5Tokenizer(pieces, extra_ids=0, model_max_length=12),
        "feature_extractor": transformers.ClapFeatureExtractor(),
        "projection_model": AudioLDM2ProjectionModel(8, 12, 16),
        "language_model": transformers.GPT2LMHeadModel(gpt2).eval(),
        "unet": AudioLDM2UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=([None, 16, 12], [None, 16, 12]), **blocks,
        ),
        "vae": AutoencoderKL(
            in_channels=1, out_channels=1, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, **blocks,
        ),
        "vocoder": transformers.SpeechT5HifiGan(vocoder),
        "scheduler": DDIMScheduler(),
    }  # fmt: skip
    parts["language_model"].config.max_new_tokens = 4
    return AudioLDM2Pipeline(**parts)


@pytest.mark.parametrize("data", [FEW, ["a fine day", "rain"]])
def test_a_language_model_that_a_pipeline_runs_with_a_cache_is_calibrated(data: Any) -> None:
    """The pipeline leaves it to the model's config; a cache cannot be recorded."""
    pipe = audio()
    pipe.set_progress_bar_config(disable=True)
    model = pipe.language_model
    call = {"num_inference_steps": 2, "audio_length_in_s": 0.016}
    quantize_pipeline(pipe, data, "w8a8", components=["language_model"], **call)
    assert quant_layers(model)
    assert [r.name for r in model.quant_report.layers if r.fallback or r.guard] == []
    assert model.config.use_cache
    assert pipe("rain", **call).audios.any()


def denoiser(pipe: Any) -> nn.Module:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", PIPELINES)
def test_every_kind_of_pipeline_runs_by_itself(name, caplog):
    pipe = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    with caplog.at_level(logging.INFO, "hfquant"):
        assert quantize_pipeline(pipe, FEW, "w8a8", num_inference_steps=3) is pipe
    layers = quant_layers(denoiser(pipe))
    assert layers
    reports = denoiser(pipe).quant_report.layers
    assert [r.name for r in reports if r.fallback or r.guard] == []
    assert denoiser(pipe).config["quantization_config"].calibration == {"source": "self", "seed": 0, "samples": 2}
    assert "2 runs of 3 steps" in caplog.text
    assert "PSNR of the quantized pipeline's image" in caplog.text


@pytest.mark.parametrize(
    "data",
    [["a cat", "two dogs"], pytest.param([{"prompt": ["a cat"]}, {"prompt": ["two dogs"]}], marks=pytest.mark.slow)],
)
def test_a_modular_pipeline_is_calibrated_on_prompts_or_call_arguments(data):
    pipe, same = tiny_modular(), tiny_modular()
    quantize_pipeline(pipe, data, "w4a8-gptq", num_inference_steps=2)
    quantize_pipeline(same, [{"prompt": "a cat"}, {"prompt": "two dogs"}], "w4a8-gptq", num_inference_steps=2)
    assert quant_layers(pipe.unet)
    tensors = same.unet.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in pipe.unet.state_dict().items())


def test_a_pipeline_that_returns_no_latents_runs_without_asking_for_them(tmp_path):
    """Marigold's refuse any output type but those of images."""
    pipe = marigold()
    pipe.set_progress_bar_config(disable=True)
    quantize_pipeline(pipe, FEW, "w8a8", dump_path=tmp_path / "recorded", num_inference_steps=2)
    assert quant_layers(pipe.unet)
    with pytest.raises(CalibrationError, match=r"MarigoldDepthPipeline cannot run on built-in inputs .*output_type"):
        quantize_pipeline(marigold(), FEW, "w8a8", num_inference_steps=2, output_type="latent")


def test_by_default_with_one_line_and_kept_for_the_next_time(caplog, monkeypatch):
    monkeypatch.setattr(module, "PROMPTS", PROMPTS[:2])
    monkeypatch.setattr(module, "STEPS", 3)
    first, again = classes(), classes()
    with caplog.at_level(logging.WARNING, "hfquant"):
        quantize_pipeline(first, None, "w8a8")
    said = [r.message for r in caplog.records if "calibrated on" in r.message]
    assert len(said) == 1
    assert "DigitsPipeline: no calibration data was given, so transformer is calibrated on 2 runs of 3 steps" in said[0]
    assert "to use your own, pass prompts" in said[0]
    kept = [path for path in folder().iterdir() if path.is_dir()]
    assert len(kept) == 1
    stamps = {path: path.stat().st_mtime_ns for path in kept[0].iterdir()}
    quantize_pipeline(again, "self", HfQuantConfig("w8a8"))
    assert {path: path.stat().st_mtime_ns for path in kept[0].iterdir()} == stamps
    tensors = first.transformer.state_dict()
    assert all(torch.equal(tensors[k], v) for k, v in again.transformer.state_dict().items())


@pytest.mark.slow
def test_modular_pipelines_of_other_blocks_share_no_recordings():
    class Slow(Denoise):
        pass

    for blocks in ((Encode, Denoise), (Encode, Slow), (Encode, Denoise)):
        quantize_pipeline(tiny_modular(*blocks), FEW, "w8a8", num_inference_steps=2)
    assert len([path for path in folder().iterdir() if path.is_dir()]) == 2


def test_a_home_that_cannot_be_written_does_not_matter(home, caplog):
    home.write_text("a file where a folder would have to be")
    pipe = classes()
    with caplog.at_level(logging.INFO, "hfquant"):
        quantize_pipeline(pipe, FEW, "w8a8", num_inference_steps=2)
    assert quant_layers(pipe.transformer)
    assert "could not be cached" in caplog.text


def test_the_configs_own_wish_counts_and_data_before_it():
    pipe = classes()
    quantize_pipeline(pipe, None, HfQuantConfig("w8a8", calibration={**FEW, "seed": 4}), num_inference_steps=2)
    assert pipe.transformer.config["quantization_config"].calibration["seed"] == 4
    pipe = classes()
    data = [{"class_labels": [3]}]
    quantize_pipeline(pipe, data, HfQuantConfig("w8a8", calibration=FEW), num_inference_steps=2)
    assert pipe.transformer.config["quantization_config"].calibration is None


def test_calls_have_what_a_pipeline_takes():
    calls = own_calls(text(), 9, 0, {})
    assert [call["prompt"] for call in calls] == [*PROMPTS, PROMPTS[0]]
    assert "" in PROMPTS
    assert {call["num_inference_steps"] for call in calls} == {20}
    assert own_calls(text(), 1, 0, {"num_inference_steps": 4, "prompt": "mine"}) == [{}]
    assert [call["class_labels"] for call in own_calls(classes(), 12, 0, {})] == [[i % 10] for i in range(12)]
    picture = own_calls(image(), 1, 0, {"height": 16, "width": 24})[0]["image"]
    assert picture.size == (24, 16)
    assert picture.tobytes() == own_calls(image(), 1, 0, {"height": 16, "width": 24})[0]["image"].tobytes()


def test_a_picture_for_each_of_several_controlnets():
    parts = text_parts()
    net = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 4))
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=net.eval())
    assert own_calls(pipe, 1, 0, {"height": 16, "width": 24})[0]["image"].size == (24, 16)
    pipe.controlnet = MultiControlNetModel([pipe.controlnet])
    assert [p.size for p in own_calls(pipe, 1, 0, {"height": 16, "width": 24})[0]["image"]] == [(24, 16)]
    pipe.controlnet = MultiControlNetModel([pipe.controlnet.nets[0]] * 2)
    pipe.set_progress_bar_config(disable=True)
    quantize_pipeline(pipe, FEW, "w8a8", num_inference_steps=2, height=16, width=16)
    assert quant_layers(pipe.unet)
    assert [r.name for r in pipe.unet.quant_report.layers if r.fallback] == []


def video_to_video() -> Any:
    parts = text_parts()
    channels = parts["unet"].config.block_out_channels
    adapter = MotionAdapter(channels, motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=2)
    names = ("text_encoder", "tokenizer", "vae", "unet", "scheduler")
    return AnimateDiffVideoToVideoPipeline(**{name: parts[name] for name in names}, motion_adapter=adapter)


def test_frames_for_a_pipeline_that_starts_from_a_video():
    pipe = video_to_video()
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 16, "width": 24}
    frames = own_calls(pipe, 1, 0, call)[0]["video"]
    assert {frame.size for frame in frames} == {(24, 16)}
    assert len({frame.tobytes() for frame in frames}) == len(frames) == FRAMES
    config = HfQuantConfig("w8a8", guard=False)
    quantize_pipeline(pipe, {**FEW, "samples": 1}, config, num_inference_steps=1, strength=1.0, height=8, width=8)
    assert quant_layers(pipe.unet)
    assert [r.name for r in pipe.unet.quant_report.layers if r.fallback] == []


@pytest.mark.parametrize(
    ("defaults", "expected"),
    [
        ({"video": None, "num_frames": 81}, {}),  # it can start from noise
        ({"video": Parameter.empty, "num_frames": 5}, {"video": 5}),
        ({"video": None}, {"video": FRAMES}),
        ({"conditioning_frames": None, "num_frames": None}, {"conditioning_frames": FRAMES}),
        ({"conditioning_frames": None, "num_frames": 16, "controlnet_frame_indices": [0]}, {"conditioning_frames": 1}),
    ],
)
def test_which_pipelines_get_how_many_frames(defaults: dict[str, Any], expected: dict[str, int]):
    class Pipe:
        components: ClassVar = {}
        unet = tiny_unet()

        def __call__(self) -> None: ...

    kind = Parameter.KEYWORD_ONLY
    parameters = [Parameter(name, kind, default=default) for name, default in defaults.items()]
    Pipe.__call__.__signature__ = Signature([Parameter("self", Parameter.POSITIONAL_ONLY), *parameters])
    made = own_calls(Pipe(), 1, 0, {})[0]
    assert {name: len(made[name]) for name in VIDEO_ARGUMENTS if name in made} == expected
    if "num_frames" in defaults and "controlnet_frame_indices" not in defaults:
        assert {len(frames) for frames in own_calls(Pipe(), 1, 0, {"num_frames": 9})[0].values()} <= {9}


@pytest.mark.parametrize("data", [FEW, ["a fine day"]])
def test_a_component_whose_forward_never_runs_is_named(data: Any):
    """AudioLDM2 calls the `get_text_features` of its first text encoder."""
    pipe = audio()
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "audio_length_in_s": 0.016}
    with pytest.raises(CalibrationError, match=r"^text_encoder: the run never calls its forward\. .* needs no data$"):
        quantize_pipeline(pipe, data, "w8a8", components=["unet", "text_encoder"], **call)
    assert not quant_layers(pipe.unet)


def test_calls_have_what_a_modular_pipeline_takes():
    """With an image that it can do without, it would run other blocks, which may lack their models."""
    expected = [{"prompt": prompt, "num_inference_steps": 20} for prompt in PROMPTS[:2]]
    assert own_calls(tiny_modular(), 2, 0, {}) == expected
    assert own_calls(tiny_modular(), 1, 0, {"num_inference_steps": 4, "prompt": "mine"}) == [{}]
    with_image = tiny_modular(EncodeImage, Denoise)
    assert own_calls(with_image, 1, 0, {"height": 16, "width": 24})[0]["image"].size == (24, 16)


def test_a_pipeline_that_cannot_run_by_itself_says_so_and_is_left_alone():
    pipe = text()
    pipe.tokenizer = pipe.text_encoder = None
    with pytest.raises(CalibrationError, match=r"StableDiffusionPipeline cannot run on built-in inputs \(.*pass"):
        quantize_pipeline(pipe, None, "w8a8", num_inference_steps=2)
    assert not quant_layers(pipe.unet)


def test_without_data_nothing_runs(home, caplog):
    pipe = classes()
    with caplog.at_level(logging.INFO, "hfquant"):
        quantize_pipeline(pipe, None, "w8a8-dynamic")
    assert "calibrated on" not in caplog.text
    assert "its image" not in caplog.text
    assert not home.exists()


def test_the_guard_of_layers_checks_a_run_of_another_seed(monkeypatch):
    """The layer guard also repairs a layer of a pipeline that is far off."""
    from hfquant import ptq

    solve, name = ptq.solve, "transformer_blocks.0.ff.net.0.proj"

    def saturating(layer: str, *args: Any) -> Any:
        solution = solve(layer, *args)
        if layer == name:
            solution.tensors["input_scale"] /= 100
        return solution

    monkeypatch.setattr(ptq, "solve", saturating)
    pipe = classes()
    quantize_pipeline(pipe, FEW, "w8a8", num_inference_steps=3)
    assert [r.name for r in pipe.transformer.quant_report.layers if r.guard] == [name]
    with pytest.raises(ValueError, match="already quantized"):
        hfquant.quantize(pipe.transformer, None, "w8a16")
