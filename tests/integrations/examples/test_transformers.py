"""Example inputs for the common tasks of transformers, and for third-party classes with common argument names."""

import pytest
import torch
import transformers
from torch import nn

from benchmarks import tiny_transformers
from hfquant.dataflow.trace import trace
from hfquant.integrations.examples import example_inputs
from hfquant.nn.kinds import layers_in
from tests.integrations.tiny_transformers import GQA, MODELS, build

# Forwards whose control flow depends on values, and so run on real tensors only.
ON_VALUES = {"BartForSequenceClassification", "Siglip2VisionModel", "Siglip2Model", "Kosmos2ForConditionalGeneration"}
ON_VALUES |= {"OneFormerForUniversalSegmentation"}
# Parts that run on inputs that are not needed: masks from earlier clicks, and sounds (what is read are their codes).
NOT_RUN = {"Sam2Model": "prompt_encoder.mask_embed", "KyutaiSpeechToTextForConditionalGeneration": "codec_model"}
# Likewise for models that take images with the text; on meta they run on text alone.
WITH_PICTURES = {
    name for name, (_, fields) in MODELS.items() if fields.keys() & {"image_token_id", "image_token_index"}
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", MODELS)
def test_every_linear_is_seen(name):
    real = name in ON_VALUES | WITH_PICTURES
    model = build(name, "cpu" if real else "meta")
    found = trace(model, example_inputs(model))
    # An embedding that only shares its weight with others never runs.
    missed = {n for n in layers_in(model).keys() - found.keys() if not n.startswith(NOT_RUN.get(name, "-"))}
    assert found.keys() <= layers_in(model).keys()
    assert all(isinstance(model.get_submodule(n), nn.Embedding) for n in missed)


# InstructBLIP does not run without an image.
@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", sorted(WITH_PICTURES - {"InstructBlipForConditionalGeneration"}))
def test_text_alone_on_meta(name):
    model = build(name)
    example = example_inputs(model)
    assert example.keys() == {"input_ids"}
    assert any("language_model" in n or "text_model" in n for n in trace(model, example))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "name", sorted(WITH_PICTURES | {"WhisperForConditionalGeneration", "SiglipModel", "ViTForImageClassification"})
)
def test_inputs_fit_real_weights_in_their_dtype(name):
    model = build(name, "cpu").bfloat16()
    example = example_inputs(model)
    assert all(v.dtype == torch.bfloat16 for v in example.values() if v.is_floating_point())
    with torch.no_grad():
        model(**example)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "kind",
    [
        *("aya_vision", "cohere2_vision", "gemma4", "got_ocr2", "granite_docling", "idefics2", "lfm2_vl"),
        *("lighton_ocr", "llava_next", "llava_onevision", "paddleocr_vl", "qwen2_vl", "video_llama_3"),
    ],
)
def test_a_text_has_a_token_for_each_feature_of_its_image(kind):
    """Otherwise the forward fails. How many there are depends on merging, pooling, tiles, separators ..."""
    model = next(tiny_transformers.small(kind, 10**8))
    example = example_inputs(model)
    assert "pixel_values" in example
    with torch.no_grad():
        model(**example)
    assert any("vision" in name or "visual" in name for name in trace(model, example))


class Own(transformers.PreTrainedModel):
    config_class = transformers.LlamaConfig

    def __init__(self, config, needs="input_ids"):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embed(input_ids))


class Odd(Own):
    def forward(self, input_ids, moon_phase):
        return self.head(self.embed(input_ids)) * moon_phase


class Broken(Own):
    def forward(self, input_ids):
        return self.head(self.embed(input_ids)[..., 1:])


def test_a_class_of_ones_own(caplog):
    """Common argument names suffice; an unknown name or a failing forward gives None and a message."""
    config = transformers.LlamaConfig(**GQA)
    assert trace(Own(config), example_inputs(Own(config))).keys() == {"embed", "head"}
    for model, why in ((Odd, "moon_phase"), (Broken, "Broken")):
        with caplog.at_level("DEBUG", "hfquant"):
            assert example_inputs(model(config)) is None
        assert why in caplog.messages[-1]


def test_a_denoiser_of_ones_own():
    """The linear patch embedding does not reveal that latents are packed; running the forward does."""
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

    class Denoiser(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, in_channels=6, joint_attention_dim=10, pooled_projection_dim=4):
            super().__init__()
            self.x_embedder = nn.Linear(in_channels, 8)
            self.context_embedder = nn.Linear(joint_attention_dim, 8)
            self.pooled = nn.Linear(pooled_projection_dim, 8)
            self.proj_out = nn.Linear(8, in_channels)

        def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep):
            x = torch.cat([self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)], 1)
            return self.proj_out(x + (self.pooled(pooled_projections) * timestep[:, None])[:, None])

    with torch.device("meta"):
        model = Denoiser()
    found = trace(model, example_inputs(model))
    assert found.keys() == {"x_embedder", "context_embedder", "pooled", "proj_out"}
