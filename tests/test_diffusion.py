"""Facts about denoisers, and quantize_pipeline: from a dataset to a folder that loads in one call."""

import subprocess
import sys
from contextlib import nullcontext
from inspect import Parameter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    KandinskyV22CombinedPipeline,
    MultiControlNetModel,
    PriorTransformer,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    UnCLIPScheduler,
    VQModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from huggingface_hub import constants
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import hfquant
from hfquant import HfQuantConfig, denoisers, load_calibrate_set, quantize_pipeline
from hfquant.affiner import load_affiner
from hfquant.affiner.hooks import attach
from hfquant.demo import DigitsPipeline, load_digits_pipeline
from hfquant.denoisers import (
    call_parameters,
    compute_dtype,
    denoiser_name,
    denoiser_names,
    find_denoiser,
    find_denoisers,
    from_grid,
    has_frames_first,
    is_pipeline,
    modules_of,
    time_reader,
    to_grid,
)
from hfquant.integrations.skeleton import skeleton
from hfquant.nn.modules import quant_layers
from tests.affiner import pipelines
from tests.calibration.tiny_modular import Denoise, Encode, tiny_modular
from tests.integrations import tiny_pipelines
from tests.integrations.test_transformers_data import word_tokenizer
from tests.integrations.tiny_pipelines import CASES

STATIC = {"default": {"weight_quant": {"type": "int8", "axis": -1}, "input_quant": {"type": "int8"}}}


def draw(pipe: DigitsPipeline) -> torch.Tensor:
    latents = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    return pipe(class_labels=list(range(5)), num_inference_steps=4, latents=latents, output_type="pt").images


def test_from_a_dataset_to_a_saved_pipeline(tmp_path: Path) -> None:
    digits = datasets.Dataset.from_dict({"label": list(range(10))})
    rows = {"dataset": digits, "column": {"class_labels": "label"}, "samples": 10, "batch_size": 2}
    pipe = load_digits_pipeline()
    exact = draw(pipe)
    assert quantize_pipeline(pipe, rows, STATIC, num_inference_steps=4) is pipe
    layers = quant_layers(pipe.transformer)
    assert layers
    assert all(layer.plan.static_input for layer in layers.values())
    images = draw(pipe)
    assert 0 < (images - exact).square().mean() < 1e-3
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(DigitsPipeline.from_pretrained(tmp_path)), images)


def test_bad_components_and_data_leave_the_pipeline_alone() -> None:
    pipe = load_digits_pipeline()
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    with pytest.raises(ValueError, match=r"components: .*'vae'.*it has \['transformer'\]"):
        quantize_pipeline(pipe, None, "w8a16", components=["vae"])
    with pytest.raises(TypeError, match="components: expected a list of names, got the string 'transformer'"):
        quantize_pipeline(pipe, None, "w8a16", components="transformer")
    with pytest.raises(TypeError):
        quantize_pipeline(pipe, [{"no_such_argument": 3}], STATIC)
    assert all(torch.equal(v, before[k]) for k, v in pipe.transformer.state_dict().items())
    quantize_pipeline(pipe, None, "w8a16")
    assert quant_layers(pipe.transformer)


@pytest.mark.parametrize("guard", [True, False])
def test_only_a_config_with_a_guard_moves_a_layer_that_is_off(guard: bool) -> None:
    pipe = load_digits_pipeline()
    up, down = pipe.transformer.transformer_blocks[1].ff.net[0].proj, pipe.transformer.transformer_blocks[1].ff.net[2]
    with torch.no_grad():  # an outlier that meets only zeros, and that the scale has to cover
        up.weight[0], up.bias[0], down.weight[0, 0] = 0, 0, 1e4
    scales = {"weight_quant": {"type": "int8", "axis": None}, "input_quant": {"type": "int8", "axis": None}}
    config = {"default": {"opt": {"type": "default"}, "calib": {"type": "amax"}, **scales}}
    quantize_pipeline(pipe, [{"class_labels": [1]}], HfQuantConfig(config, guard=guard), num_inference_steps=2)
    assert any(layer.guard for layer in pipe.transformer.quant_report.layers) == guard


def wan() -> WanPipeline:
    """Wan 2.2's layout: one transformer for the noisier steps, another for the rest."""

    def transformer(seed: int) -> WanTransformer3DModel:
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=32, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
        ).eval()  # fmt: skip

    vae = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4,
                           latents_std=[1.0] * 4, temperal_downsample=[False, True, True])  # fmt: skip
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer(0), transformer_2=transformer(1), boundary_ratio=0.8,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


WAN_CALL = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 4, "output_type": "latent"}


def wan_rows(count: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return [{name: torch.randn(6, 16, generator=draw) for name in names} for _ in range(count)]


def test_wans_second_transformer_is_quantized_too() -> None:
    pipe = wan()
    assert denoiser_names(pipe) == ["transformer", "transformer_2"]
    rows = [{k: v.expand(2, 6, 16) for k, v in row.items()} for row in wan_rows(2)]
    quantize_pipeline(pipe, rows, STATIC, **WAN_CALL)
    for part in (pipe.transformer, pipe.transformer_2):
        layers = quant_layers(part)
        assert layers
        assert all(layer.plan.static_input for layer in layers.values())
    one = wan()
    quantize_pipeline(one, None, "w8a16", components=["transformer_2"])
    assert not quant_layers(one.transformer)
    assert quant_layers(one.transformer_2)
    one.transformer = None
    assert find_denoiser(one) is one.transformer_2


def test_one_of_several_controlnets_is_quantized() -> None:
    pipe = CASES["sd-controlnet"].build()
    pipe.controlnet = MultiControlNetModel([pipe.controlnet, CASES["sd-controlnet"].build().controlnet])
    quantize_pipeline(pipe, None, "w8a16", components=["controlnet.nets.1"])
    assert [bool(quant_layers(model)) for model in (pipe.unet, *pipe.controlnet.nets)] == [False, False, True]
    with pytest.raises(ValueError, match=r"controlnet\.nets\.2.* is not a module"):
        quantize_pipeline(pipe, None, "w8a16", components=["controlnet.nets.2"])


def test_sdxl_casts_its_autoencoder_in_float16_alone() -> None:
    """As docs/troubleshooting.md says: diffusers cannot cast a quantized autoencoder, and in bfloat16 need not."""
    case = CASES["sdxl"]
    for dtype in (torch.float16, torch.bfloat16):
        pipe = case.build().to(dtype)
        quantize_pipeline(pipe, None, "w8a16", components=["vae"])
        assert quant_layers(pipe.vae)
        batch = {name: value.to(dtype) for name, value in tiny_pipelines.batches(case, 1)[0].items()}
        call = {**batch, **case.call, "output_type": "pt"}
        if dtype == torch.float16:
            with pytest.raises(ValueError, match="Casting a quantized model to a new `dtype` is unsupported"):
                pipe(**call)
        else:
            assert pipe(**call).images.isfinite().all()


def kandinsky() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "projection_dim": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 8
    text = CLIPTextConfig(vocab_size=13, num_attention_heads=2, max_position_embeddings=8, eos_token_id=2, **sizes)
    image = CLIPVisionConfig(image_size=16, patch_size=8, num_attention_heads=2, **sizes)
    unet = tiny_pipelines.unet(
        out_channels=8,
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        cross_attention_dim=12,
    )
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=16,
        num_layers=1,
        num_embeddings=8,
        additional_embeddings=4,
    )
    decoder = VQModel(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, num_vq_embeddings=8)
    steps = UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0)
    pipe = KandinskyV22CombinedPipeline(
        unet.eval(), tiny_pipelines.ddim(), decoder.eval(), prior.eval(), CLIPVisionModelWithProjection(image).eval(),
        CLIPTextModelWithProjection(text).eval(), tokenizer, steps, CLIPImageProcessor(crop_size=16, size=16),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


KANDINSKY_CALL = {"height": 16, "width": 16, "num_inference_steps": 3, "prior_num_inference_steps": 4}


@pytest.mark.parametrize("data", [[{"prompt": "a b"}, {"prompt": "c"}], {"source": "self", "samples": 2}])
def test_the_prior_of_a_combined_pipeline_is_quantized_too(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    pipe = kandinsky()
    assert denoiser_names(pipe) == ["unet", "prior_prior"]
    assert find_denoisers(pipe) == [pipe.unet]
    quantize_pipeline(pipe, data, STATIC, dump_path=tmp_path / "inputs", **KANDINSKY_CALL)
    for part in (pipe.unet, pipe.prior_prior):
        assert quant_layers(part)
        assert all(layer.plan.static_input for layer in quant_layers(part).values())
    recorded = [load_calibrate_set(tmp_path / "inputs" / name) for name in ("unet", "prior_prior")]
    assert [len(found) for found in recorded] == [2 * 3, 2 * 4]
    assert skeleton_denoisers(pipe, tmp_path / "saved") == ["unet", "prior_prior"]


def skeleton_denoisers(pipe: Any, folder: Path) -> list[str]:
    pipe.save_pretrained(folder)
    return skeleton(str(folder)).denoisers


def test_an_affiner_leaves_the_prior_of_a_combined_pipeline_alone() -> None:
    pipe, halving = kandinsky(), SimpleNamespace(correct=lambda timestep, batch: batch / 2)
    seen: list[torch.Tensor] = []
    pipe.prior_prior.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    call = {**KANDINSKY_CALL, "prior_num_inference_steps": 2}
    images = []
    for attached in (False, True):
        with attach(pipe, halving, "text") if attached else nullcontext():
            images.append(pipe("a b", generator=torch.Generator().manual_seed(0), output_type="pt", **call).images)
    assert torch.stack(seen[:2]).equal(torch.stack(seen[2:]))
    assert not images[0].equal(images[1])


def test_an_affiner_corrects_the_steps_of_both_transformers() -> None:
    real, quant = wan(), wan()
    gains = {"transformer": 0.8, "transformer_2": 1.25}
    for name, gain in gains.items():
        getattr(quant, name).register_forward_hook(lambda m, a, out, gain=gain: (out[0] * gain,))
    config = {"solver": {"blocksize": None, "lambda1": 0.0, "lambda2": 0.0, "alpha": 1.0}, "extra_args": WAN_CALL}
    affiner = load_affiner(config, wan_rows(3), real, quant)
    scales = [affiner.prediction.table[t][0].mean().item() for t in affiner.timesteps]
    expected = [1 / gains["transformer" if t >= 800 else "transformer_2"] for t in affiner.timesteps]
    assert scales == pytest.approx(expected, rel=1e-3)
    assert len({round(x, 2) for x in expected}) == 2


def test_the_facts_need_neither_library() -> None:
    """The file is run on its own, since `import hfquant` may import more."""
    code = (
        "import sys, runpy; sys.modules['diffusers'] = sys.modules['transformers'] = None; "
        f"print(runpy.run_path({denoisers.__file__!r})['DENOISERS'][0])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "transformer"


def test_what_a_pipeline_and_its_denoiser_are() -> None:
    pipe = load_digits_pipeline()
    assert is_pipeline(pipe)
    assert not is_pipeline(pipe.transformer)
    assert denoiser_name(pipe) == "transformer"
    assert find_denoiser(pipe) is find_denoiser(pipe.transformer) is pipe.transformer
    assert modules_of(pipe) == modules_of(pipe.transformer) == [pipe.transformer]
    with pytest.raises(ValueError, match="SimpleNamespace has none of the denoisers transformer, transformer_2"):
        find_denoiser(SimpleNamespace(scheduler=None))
    assert compute_dtype(nn.Linear(2, 2).bfloat16()) == torch.bfloat16
    assert compute_dtype(nn.ReLU()) == torch.get_default_dtype()


def test_the_timestep_is_read_from_any_call() -> None:
    class Cascade(nn.Module):
        def forward(self, sample: torch.Tensor, timestep_ratio: torch.Tensor) -> None: ...

    read = time_reader(Cascade())
    assert read is not None
    assert (read((1, 2), {}), read((1,), {"timestep_ratio": 3}), read((1,), {})) == (2, 3, None)
    assert time_reader(nn.Linear(2, 2)) is None


def test_a_component_that_fails_leaves_all_of_them_alone() -> None:
    pipe = wan()
    rows = [{k: v.expand(2, 6, 16) for k, v in row.items()} for row in wan_rows(1)]
    with torch.no_grad():
        pipe.transformer_2.blocks[0].ffn.net[2].weight[0, 0] = float("nan")
    parts = (pipe.transformer, pipe.transformer_2)
    before = [(repr(part), dict(part.config), list(vars(part))) for part in parts]
    tensors = [dict(part.named_parameters()) for part in parts]
    with pytest.raises(ValueError, match=r"NaN|finite"):
        quantize_pipeline(pipe, rows, "w8a16")
    assert [(repr(part), dict(part.config), list(vars(part))) for part in parts] == before
    for part, old in zip(parts, tensors, strict=True):
        assert all(p is old[name] for name, p in part.named_parameters())
        assert not quant_layers(part)
    with torch.no_grad():
        pipe.transformer_2.blocks[0].ffn.net[2].weight[0, 0] = 0.0
    quantize_pipeline(pipe, None, "w8a16")
    assert all(quant_layers(part) for part in parts)


@pytest.mark.parametrize("frames_first", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 7, 4, 5), (2, 16, 3), (2, 15, 3)])
def test_layouts_go_there_and_back(shape: tuple[int, ...], frames_first: bool) -> None:
    values = torch.randn(shape)
    grid = to_grid(values, frames_first)
    channels = shape[2] if len(shape) == 3 or (len(shape) == 5 and frames_first) else shape[1]
    assert grid.shape[1] == channels
    assert torch.equal(from_grid(grid, values, frames_first), values)


def test_frames_are_told_from_channels_by_the_config() -> None:
    denoiser = nn.Identity()
    denoiser.config = SimpleNamespace(in_channels=8, out_channels=4)
    assert not has_frames_first(torch.empty(1, 4, 3, 2, 2), denoiser)
    assert has_frames_first(torch.empty(1, 3, 4, 2, 2), denoiser)
    assert not has_frames_first(torch.empty(1, 4, 2, 2), denoiser)
    assert not has_frames_first(torch.empty(1, 3, 5, 2, 2), nn.Identity())  # there is no config to tell
    for shape in ((1, 4, 4, 2, 2), (1, 8, 4, 2, 2)):
        with pytest.raises(ValueError, match="take another number of frames"):
            has_frames_first(torch.empty(shape), denoiser)


def test_autoencoders_are_not_calibrated() -> None:
    """Pipelines call their halves, which nothing records; without data they are quantized."""
    pipe, row, arguments = pipelines.unet()
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="vae: pipelines call its encode and decode"):
        quantize_pipeline(pipe, [row], STATIC, components=["unet", "vae"], **arguments)
    assert not quant_layers(pipe.unet)
    quantize_pipeline(pipe, None, "w8a16", components=["vae"])
    assert quant_layers(pipe.vae)


CACHES = {
    "first block": FirstBlockCacheConfig(threshold=5.0),
    "taylorseer": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    ),
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_denoiser_is_not_calibrated_while_its_cache_is_enabled(cache: str) -> None:
    """Its layers would not all run in each step, or the cache fails outside of the pipeline."""
    case = CASES["ltx"]
    pipe, data = case.build(), tiny_pipelines.batches(case, 1)
    pipe.transformer.enable_cache(CACHES[cache])
    advice = r"its cache .* cannot be calibrated: call disable_cache\(\) on it first"
    with pytest.raises(ValueError, match=rf"pipe\.transformer: {advice}"):
        quantize_pipeline(pipe, data, STATIC, **case.call)
    with pytest.raises(ValueError, match=rf"LTXVideoTransformer3DModel: {advice}"):
        hfquant.quantize(pipe.transformer, [{}], STATIC)
    with pytest.raises(ValueError, match=r"model_real's LTXVideoTransformer3DModel: .* cannot be a reference"):
        hfquant.load_affiner({}, data, pipe, case.build())
    assert not quant_layers(pipe.transformer)
    assert pipe.transformer.is_cache_enabled
    pipe.transformer.disable_cache()
    quantize_pipeline(pipe, data, STATIC, **case.call)
    pipe.transformer.enable_cache(CACHES[cache])
    assert quant_layers(pipe.transformer)
    assert tiny_pipelines.run(pipe, case).isfinite().all()


def test_a_denoiser_is_quantized_without_data_while_its_cache_is_enabled() -> None:
    pipe = CASES["ltx"].build()
    pipe.transformer.enable_cache(CACHES["first block"])
    quantize_pipeline(pipe, None, "w8a16")
    assert quant_layers(pipe.transformer)
    assert tiny_pipelines.run(pipe, CASES["ltx"]).isfinite().all()


class Guided(Denoise):
    @property
    def inputs(self) -> list[InputParam]:
        return [*super().inputs, InputParam(kwargs_type="denoiser_input_fields")]


def test_parameters_of_a_modular_pipeline_are_those_of_its_blocks() -> None:
    found = call_parameters(tiny_modular(Encode, Guided))
    assert next(iter(found)) == "prompt"
    assert {"image", "num_inference_steps", "denoiser_input_fields", "state", "output"} <= found.keys()
    assert found["prompt"].default is Parameter.empty
    assert found["num_inference_steps"].default == 50
    assert "kwargs" not in found
