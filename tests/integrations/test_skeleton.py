"""Models built from their configs alone."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch

import hfquant
from hfquant.integrations.skeleton import skeleton, subfolder
from hfquant.remote_code import remote_code
from tests.integrations.own_models import own_pipeline
from tests.integrations.tiny_pipelines import CASES
from tests.recipes.tiny import PUBLISHED


@pytest.mark.parametrize(
    ("name", "kind", "billions"),
    [
        ("FLUX.1-dev", "FluxPipeline", {"transformer": 11.9, "text_encoder": 0.123, "text_encoder_2": 4.76}),
        (
            "Wan2.2-T2V-A14B-Diffusers",
            "WanPipeline",
            {"transformer": 14.3, "transformer_2": 14.3, "text_encoder": 5.68},
        ),
        ("Llama-3.1-8B-Instruct", "LlamaForCausalLM", {"model": 8.03}),
        ("whisper-large-v3", "WhisperForConditionalGeneration", {"model": 1.54}),
    ],
)
def test_published_models_have_their_size(name, kind, billions):
    found = skeleton(str(PUBLISHED / name))
    assert found.kind == kind
    counts = {part: sum(p.numel() for p in model.parameters()) / 1e9 for part, model in found.models.items()}
    assert counts == pytest.approx(billions, rel=0.005)
    assert all(p.is_meta for model in found.models.values() for p in model.parameters())
    assert found.is_pipeline == ("model" not in billions)
    assert found.denoisers == [n for n in billions if n.startswith("transformer")] or found.denoisers == ["model"]


def test_several_controlnets_are_models_of_their_own(tmp_path):
    pipe = CASES["sd-controlnet"].build()
    other = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8, 12))
    pipe.controlnet = diffusers.MultiControlNetModel([pipe.controlnet, other])
    pipe.save_pretrained(tmp_path)
    found = skeleton(str(tmp_path))
    assert set(found.models) == {"vae", "unet", "controlnet.nets.0", "controlnet.nets.1"}
    assert found.denoisers == ["unet"]
    for name, real in zip(("controlnet.nets.0", "controlnet.nets.1"), pipe.controlnet.nets, strict=True):
        assert sizes(found.models[name]) == sizes(real)
        assert json.loads((tmp_path / subfolder(name) / "config.json").read_text())["_class_name"] == "ControlNetModel"


def sizes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_several_adapters_are_models_of_their_own(tmp_path):
    adapters = [diffusers.T2IAdapter(channels=[4 * i, 8], num_res_blocks=1, downscale_factor=8) for i in (1, 2)]
    diffusers.MultiAdapter(adapters).save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "X", "adapter": ["diffusers", "MultiAdapter"]})
    )
    found = skeleton(str(tmp_path)).models
    assert list(found) == ["adapter.adapters.0", "adapter.adapters.1"]
    assert [sizes(model) for model in found.values()] == [sizes(adapter) for adapter in adapters]
    assert [subfolder(name) for name in found] == ["adapter", "adapter_1"]


def test_a_denoiser_that_is_defined_in_the_module_of_a_pipeline(tmp_path):
    audio_ldm2(tmp_path)
    found = skeleton(str(tmp_path))
    assert {name: type(model).__name__ for name, model in found.models.items()} == {
        "unet": "AudioLDM2UNet2DConditionModel",
        "projection_model": "AudioLDM2ProjectionModel",
    }
    assert found.denoisers == ["unet"]
    assert all(p.is_meta for model in found.models.values() for p in model.parameters())


def audio_ldm2(folder: Path, preset: str | None = None) -> None:
    """Write what the command line reads of an AudioLDM2 pipeline, with a quantized denoiser if a preset is given."""
    unet = diffusers.AudioLDM2UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16),
    )  # fmt: skip
    if preset is not None:
        hfquant.quantize(unet, None, preset)
    unet.save_pretrained(folder / "unet")
    projection = diffusers.AudioLDM2ProjectionModel(text_encoder_dim=8, text_encoder_1_dim=8, langauge_model_dim=8)
    projection.save_pretrained(folder / "projection_model")
    index = {
        "_class_name": "AudioLDM2Pipeline",
        "unet": ["audioldm2", "AudioLDM2UNet2DConditionModel"],
        "projection_model": ["audioldm2", "AudioLDM2ProjectionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "other": ["their_module", "TheirModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def test_models_that_diffusers_could_not_have_saved_are_left_out(tmp_path):
    CASES["sd-img2img"].build().save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text()) | {"controlnet": ["diffusers", "SD3MultiControlNetModel"]}
    file.write_text(json.dumps(index))
    assert set(skeleton(str(tmp_path)).models) == {"vae", "unet"}


def test_a_pipeline_with_code_of_its_own(tmp_path):
    own_pipeline(tmp_path)
    with pytest.raises(ValueError, match=r"has code of its own.* pass --trust-remote-code"):
        skeleton(str(tmp_path))
    with remote_code(True):
        found = skeleton(str(tmp_path))
    assert found.kind == "OwnPipeline"
    assert {name: type(model).__name__ for name, model in found.models.items()} == {"transformer": "OwnDenoiser"}
    assert all(p.is_meta for p in found.models["transformer"].parameters())


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        skeleton(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="neither"):
        skeleton(str(tmp_path))
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "X", "scheduler": ["diffusers", "DDIMScheduler"]})
    )
    with pytest.raises(ValueError, match="no model among its components"):
        skeleton(str(tmp_path))
