"""Models built from their configs alone."""

from __future__ import annotations

import json

import pytest

from hfquant.integrations.skeleton import skeleton
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
