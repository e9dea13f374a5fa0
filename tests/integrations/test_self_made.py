"""transformers models calibrated on data that they generate themselves."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hfquant
from hfquant import CalibrationError, HfQuantConfig
from hfquant.calibration.self_made import SelfSpec
from hfquant.integrations import self_made as module
from hfquant.integrations.data import transformers_batches
from hfquant.nn.modules import quant_layers
from tests.integrations import small_models, tiny_transformers
from tests.integrations.small_models import assert_same
from tests.integrations.test_transformers_data import word_tokenizer

ASKED = {"source": "self", "samples": 4, "seqlen": 16}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def whisper() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=61, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=40, decoder_ffn_dim=36, num_mel_bins=16, max_source_positions=20,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def masked_bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=15, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=36,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).eval()


def llava() -> nn.Module:
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=63, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def mamba() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    return transformers.MambaForCausalLM(config).eval()


def clip() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        projection_dim=12,
    )
    return transformers.CLIPModel(config).eval()


def wav2vec2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=36, vocab_size=20,
        conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=61, d_model=24, d_kv=8, d_ff=40, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def canine() -> nn.Module:
    """It reads the code points of characters, and has no vocabulary."""
    torch.manual_seed(0)
    config = transformers.CanineConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=36, num_hash_buckets=64,
        local_transformer_stride=16,
    )  # fmt: skip
    return transformers.CanineForSequenceClassification(config).eval()


def other(name: str) -> Callable[[], nn.Module]:
    """Return a maker of a model whose inputs have names or sizes that no other has."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return tiny_transformers.build(name, "cpu")

    return make


OTHERS = (
    "Kosmos2ForConditionalGeneration",
    "IdeficsForVisionText2Text",
    "DepthProModel",
    "DecisionTransformerModel",
    "MusicgenForConditionalGeneration",
    "MusicgenMelodyForConditionalGeneration",
    "MusicgenMelodyForCausalLM",
    "DiaForConditionalGeneration",
    "SpeechEncoderDecoderModel",
    "SpeechT5ForTextToSpeech",
    "SpeechT5ForSpeechToSpeech",
    "XCLIPModel",
    "XCLIPVisionModel",
    "Pix2StructForConditionalGeneration",
    "LxmertForQuestionAnswering",
    "TimesFmModel",
    "TimesFmModelForPrediction",
    "Sam2Model",
    "VoxtralRealtimeForConditionalGeneration",
    "KyutaiSpeechToTextForConditionalGeneration",
)
MODELS = {
    **{n: other(n) for n in OTHERS},
    **{n: small_models.TRANSFORMERS[n] for n in ("llama", "bart", "bert", "clip_text", "vit")},
    **{f.__name__: f for f in (whisper, masked_bert, llava, mamba, clip, wav2vec2, t5, canine)},
}


def made(model: nn.Module, **asked: Any) -> list[dict[str, Tensor]]:
    return list(transformers_batches(model, {**ASKED, **asked}))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_is_calibrated_without_data(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """No layer lacks statistics: each part of the model runs on the data generated for it."""
    model = MODELS[name]()
    with caplog.at_level(logging.WARNING, "hfquant"):
        hfquant.quantize(model, dict(ASKED), "w8a8")
    assert quant_layers(model)
    assert [r.name for r in model.quant_report.layers if r.fallback or r.guard] == []
    assert "cannot generate text" not in caplog.text
    stored = model.config.quantization_config.to_dict()["calibration"]
    assert (stored["source"], stored["seed"], stored["samples"]) == ("self", 0, 4)


def audio_decoder() -> nn.Module:
    torch.manual_seed(0)
    return transformers.MusicgenForCausalLM(transformers.MusicgenDecoderConfig(**tiny_transformers.CODES)).eval()


def test_a_decoder_of_audio_codes_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Only its layers that read a text, which it lacks, have no statistics."""
    model = audio_decoder()
    with caplog.at_level(logging.WARNING, "hfquant"):
        hfquant.quantize(model, dict(ASKED), "w4a8-gptq")
    quantized = quant_layers(model)
    missed = {r.name for r in model.quant_report.layers if r.fallback}
    assert missed == {name for name in quantized if "encoder_attn" in name} < quantized.keys()
    assert "pattern detection failed" not in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "MusicgenForConditionalGeneration",
        pytest.param("MusicgenMelodyForConditionalGeneration", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("preset", ["w8a8", "w4a8-gptq"])
@pytest.mark.parametrize("data", [ASKED, {"dataset": ["a b c d e", "f g h"], "tokenizer": word_tokenizer()}])
def test_a_decoder_of_audio_codes_is_calibrated_and_comes_back(
    name: str, preset: str, data: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other(name)().save_pretrained(tmp_path / "float")
    cls = getattr(transformers, name)
    config = HfQuantConfig(preset, calibration=data)
    with caplog.at_level(logging.WARNING, "hfquant"):
        model = cls.from_pretrained(tmp_path / "float", quantization_config=config)
    assert not [layer.name for layer in model.quant_report.layers if layer.fallback or layer.guard]
    assert "pattern detection failed" not in caplog.text
    model.save_pretrained(tmp_path / "quantized")
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 1]]), "decoder_input_ids": torch.arange(32).view(8, 4)}
    assert_same(cls.from_pretrained(tmp_path / "quantized"), model, inputs)


def test_audio_codes_that_a_model_makes() -> None:
    """The encoder's text is of its vocabulary, which is larger; codes are of the decoder's."""
    model = other("DiaForConditionalGeneration")()
    first, again, others = made(model), made(model), made(model, seed=1)
    for batch, same, different in zip(first, again, others, strict=True):
        text, codes = batch["input_ids"], batch["decoder_input_ids"]
        assert (text.shape, codes.shape) == ((4, 16), (4, 16, 3))
        assert 36 < text.max() < 50
        assert (codes[:, 0] == 35).all()
        assert (codes[:, 1:] < 33).all()
        assert torch.equal(codes, same["decoder_input_ids"])
        assert not torch.equal(codes, different["decoder_input_ids"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_default_in_from_pretrained(dtype, checkpoint, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hfquant"):
        model = LlamaForCausalLM.from_pretrained(
            checkpoint("llama"), quantization_config=HfQuantConfig("w8a8"), dtype=dtype
        )
    said = [r.message for r in caplog.records if "calibrated on" in r.message]
    assert len(said) == 1
    assert "no calibration data was given" in said[0]
    assert "32 windows of 64 tokens that it generates, about" in said[0]
    assert "pass HfQuantConfig(..., calibration=...)" in said[0]
    assert model.config.quantization_config.calibration == {"source": "self", "seed": 0, "samples": 32, "seqlen": 64}
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert_same(again, model)
    assert again.config.quantization_config == model.config.quantization_config


def test_a_preset_without_data_makes_none(checkpoint, home):
    for calibration in (None, "self"):
        config = HfQuantConfig("w8a8-dynamic", calibration=calibration)
        hfquant.quantize(small_models.llama(), None, config)
        model = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
        assert "calibration" not in model.config.quantization_config.to_dict()
    assert not home.exists()


JOB = """
import sys, torch
torch.set_num_threads(1)
import hfquant
from tests.integrations import small_models, tiny_transformers
model = small_models.llama()
data = {"source": "self", "samples": 4, "seqlen": 16, "seed": int(sys.argv[1])}
hfquant.quantize(model, data, "w8a8").save_pretrained(sys.argv[2])
"""


def test_a_seed_gives_the_same_checkpoint_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run starts with an empty cache."""
    stored = []
    for number, seed in enumerate((5, 5, 6)):
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / f"home{number}"))
        model = hfquant.quantize(small_models.llama(), {**ASKED, "seed": seed}, "w8a8")
        model.save_pretrained(tmp_path / str(number))
        files = [tmp_path / str(number) / file for file in ("model.safetensors", "config.json")]
        stored.append([file.read_bytes() for file in files])
    assert stored[0] == stored[1]
    assert stored[0][0] != stored[2][0]


@pytest.mark.slow
def test_processes_of_their_own_write_the_same(tmp_path: Path) -> None:
    digests = {}
    for number, seed in enumerate((5, 5, 6)):
        folder = tmp_path / str(number)
        environment = {"HF_HOME": str(tmp_path / f"home{number}"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        job = [sys.executable, "-c", JOB, str(seed), str(folder)]
        subprocess.run(job, check=True, env={**os.environ, **environment})
        digests[number] = [
            hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in ("model.safetensors", "config.json")
        ]
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[2][0]


def test_windows_are_kept_and_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_models.llama()
    first = made(model)
    monkeypatch.setattr(module, "_written", lambda *_: pytest.fail("written again"))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, made(model), strict=True))
    for change in ({"seed": 1}, {"samples": 5}, {"seqlen": 15}):
        with pytest.raises(pytest.fail.Exception, match="written again"):
            made(model, **change)
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    with pytest.raises(pytest.fail.Exception, match="written again"):
        made(model)


def test_offloaded_weights_are_not_taken_for_others(tmp_path: Path, home: Path) -> None:
    """Offloaded weights cannot enter the cache key, so nothing is cached."""
    from accelerate import cpu_offload

    model = small_models.llama()
    expected = made(model)[0]["input_ids"]
    kept = set(home.rglob("*.safetensors"))
    assert len(kept) == 1
    cpu_offload(model, execution_device="cpu")
    assert torch.equal(made(model)[0]["input_ids"], expected)
    assert set(home.rglob("*.safetensors")) == kept


def test_windows_do_not_depend_on_how_many_there_are():
    few, many = made(small_models.llama(), samples=2), made(small_models.llama(), samples=4)
    assert torch.equal(few[0]["input_ids"], many[0]["input_ids"][:2])


def test_held_out_windows_are_others_of_the_same_seed_and_of_the_next():
    data = transformers_batches(small_models.llama(), ASKED)
    held_out = torch.cat([batch["input_ids"] for batch in data.held_out])
    assert held_out.shape == (4, 16)
    longer = torch.cat([batch["input_ids"] for batch in made(small_models.llama(), samples=6)])
    assert torch.equal(held_out[:2], longer[4:])
    other = torch.cat([batch["input_ids"] for batch in made(small_models.llama(), seed=1)])
    assert torch.equal(held_out[2:], other[:2])


def test_tokens_follow_the_models_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's next token depends only on the last one, so each pair's frequency must match its softmax."""
    model = small_models.llama()
    table = 2 * torch.randn(101, 101, generator=torch.Generator().manual_seed(0))

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=table[input_ids])

    monkeypatch.setattr(model, "forward", forward)
    ids = torch.cat([batch["input_ids"] for batch in made(model, samples=400, seqlen=33)])
    assert ids.shape == (400, 33)
    counts = torch.zeros(101, 101, dtype=torch.float64)
    for row in ids:
        counts.index_put_((row[:-1], row[1:]), torch.ones(32, dtype=torch.float64), accumulate=True)
    seen = counts.sum(1)
    expected = table.double().softmax(1) * seen[:, None]
    chi = ((counts - expected).square() / expected.clamp(min=1e-9))[expected > 5].sum()
    cells = int((expected > 5).sum())
    assert cells > 200
    assert float(chi) < cells + 5 * (2 * cells) ** 0.5


CHAT = (
    "{% for message in messages %}c {{ message['role'] }} {{ message['content'] }} d {% endfor %}"
    "{% if add_generation_prompt %}e{% endif %}"
)


def test_windows_begin_with_texts_and_chats_where_the_tokenizer_has_them(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    small_models.llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = torch.cat([batch["input_ids"] for batch in made(model, samples=8)])
    chat = tokenizer("c user", add_special_tokens=False)["input_ids"]
    assert ids[1, :2].tolist() == ids[5, :2].tolist() == chat
    assert ids[3, 0] == ids[7, 0] == tokenizer.bos_token_id
    ordinary = set(range(3, 13))
    assert {int(ids[i, 0]) for i in (0, 2, 4, 6)} <= ordinary


def test_a_template_that_fails_is_done_without(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no user here') }}"
    small_models.llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert made(LlamaForCausalLM.from_pretrained(tmp_path))[0]["input_ids"].shape == (4, 16)


def bert_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, **{f"{name}_token": token for name, token in names.items()}
    )


def test_an_encoder_that_fills_masks_fills_half_of_the_windows(tmp_path: Path) -> None:
    model = masked_bert()
    with torch.no_grad():
        model.cls.predictions.bias[7] += 20  # it then fills in token 7 only, special tokens aside
    model.save_pretrained(tmp_path)
    bert_tokenizer(tmp_path).save_pretrained(tmp_path)
    ids = made(transformers.BertForMaskedLM.from_pretrained(tmp_path))[0]["input_ids"]
    assert ids[:, 0].eq(2).all()
    assert ids[:, -1].eq(3).all()
    inner = ids[:, 1:-1]
    assert inner[::2].eq(7).all()
    assert inner[1::2].unique().numel() > 5
    assert inner.min() >= 5


def test_pictures_have_their_processors_statistics(tmp_path: Path) -> None:
    model = small_models.vit()
    model.save_pretrained(tmp_path)
    statistics = {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.5, 0.25, 0.1]}
    transformers.ViTImageProcessor(size={"height": 12, "width": 12}, **statistics).save_pretrained(tmp_path)
    batches = made(transformers.ViTForImageClassification.from_pretrained(tmp_path), samples=32)
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    assert pixels.shape == (32, 3, 12, 12)
    std = torch.tensor(statistics["image_std"])
    mean = (0.5 - torch.tensor(statistics["image_mean"])) / std
    assert torch.allclose(pixels.mean((0, 2, 3)), mean, atol=0.1)
    assert torch.allclose(pixels.std((0, 2, 3)) * std, torch.full((3,), 0.25), rtol=0.15)


def test_sounds_go_through_the_models_extractor(tmp_path: Path) -> None:
    model = whisper()
    model.save_pretrained(tmp_path)
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1, hop_length=400)
    extractor.save_pretrained(tmp_path)
    loaded = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path)
    plain, extracted = made(model)[0], made(loaded)[0]
    assert plain["input_features"].shape == extracted["input_features"].shape == (2, 16, 40)
    # The extractor's log-mel features span at most 2; noise in their place does not.
    span = extracted["input_features"].amax((1, 2)) - extracted["input_features"].amin((1, 2))
    assert (span <= 2.01).all()
    assert extracted["decoder_input_ids"].shape == (2, 12)
    assert extracted["decoder_input_ids"][:, 0].eq(3).all()


def test_both_sides_of_an_encoder_and_decoder():
    batch = made(small_models.bart())[0]
    assert batch["input_ids"].shape == (4, 16)
    assert batch["decoder_input_ids"].shape == (4, 16)
    assert batch["decoder_input_ids"][:, 0].eq(1).all()


@pytest.mark.parametrize("kind", ["Roberta", "IBert"])
def test_a_model_whose_positions_begin_after_the_padding_token_has_fewer_of_them(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=24
    )
    model = getattr(transformers, f"{kind}ForMaskedLM")(config)
    batch = made(model, seqlen=64)[0]
    assert batch["input_ids"].shape == (4, 22)
    model(**batch)


def test_a_model_that_cannot_write_reads_random_tokens(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("its cache")

    monkeypatch.setattr(transformers.GenerationMixin, "generate", failing)
    with caplog.at_level(logging.WARNING, "hfquant"):
        assert made(small_models.llama())[0]["input_ids"].shape == (4, 16)
    assert "LlamaForCausalLM cannot generate text (NotImplementedError: its cache): using random tokens" in caplog.text


def test_inputs_without_elements_get_no_noise() -> None:
    """Time series may lack static features: [batch, 0]."""
    torch.manual_seed(0)
    config = transformers.AutoformerConfig(
        prediction_length=4, context_length=8, lags_sequence=[1, 2], moving_average=3, d_model=16, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
    )  # fmt: skip
    model = transformers.AutoformerForPrediction(config).eval()
    hfquant.quantize(model, "self", "w4a16-gptq")
    assert quant_layers(model)


def test_wrong_wishes_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(CalibrationError, match=r"calibration.samples"):
        HfQuantConfig("w8a8", calibration={"source": "self", "samples": -1})


def test_the_stored_wish_makes_the_same_again(checkpoint):
    model = LlamaForCausalLM.from_pretrained(
        checkpoint("llama"), quantization_config=HfQuantConfig("w8a8", calibration={**ASKED, "seed": 9})
    )
    stored = model.config.quantization_config.to_dict()
    assert SelfSpec.of(stored["calibration"]) == SelfSpec(seed=9, samples=4, seqlen=16)
    again = HfQuantConfig(stored["config"], calibration=stored["calibration"])
    assert_same(LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=again), model)


@pytest.mark.slow
def test_smollm2_writes_text_and_chats():
    from benchmarks.models import smollm2_folder

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder())
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder())
    batches = made(model, samples=4, seqlen=64)
    texts = [tokenizer.decode(ids) for batch in batches for ids in batch["input_ids"]]
    assert texts[1].startswith("<|im_start|>")
    assert "user\n" in texts[1]
    # The model assigns its own text a far higher likelihood than random tokens.
    with torch.no_grad():
        losses = [model(**b, labels=b["input_ids"]).loss.item() for b in batches]
        random = torch.randint(1000, 40000, (4, 64), generator=torch.Generator().manual_seed(0))
        assert max(losses) < 6 < model(input_ids=random, labels=random).loss.item()
