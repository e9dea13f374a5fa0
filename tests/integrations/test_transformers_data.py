"""transformers end to end with calibration data in the config: batches, loaders, text."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hfquant
from hfquant import HfQuantConfig
from hfquant.integrations.data import transformers_batches
from hfquant.nn.modules import quant_layers
from tests.integrations import small_models, tiny_transformers
from tests.integrations.own_models import own_model, own_tokenizer
from tests.integrations.small_models import assert_same, transformers_inputs


def ids() -> dict[str, torch.Tensor]:
    return transformers_inputs(small_models.llama())


class Recorded(list):
    """A list of batches that can be weakly referenced."""


def test_users_config_is_left_alone_and_the_data_let_go(checkpoint):
    data = Recorded([ids(), ids()])
    config = HfQuantConfig("w8a8", calibration=data, modules_to_not_convert=["q_proj"])
    before = config.to_dict()
    model = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
    wide = LlamaForCausalLM.from_pretrained(checkpoint("llama_of_64"), quantization_config=config)
    assert config.to_dict() == before
    assert config.calibration is data
    assert len(quant_layers(model)) == len(quant_layers(wide)) == 12
    assert model.config.quantization_config is not config
    held = weakref.ref(data)
    del config, data
    gc.collect()
    assert held() is None
    assert model.hf_quantizer.quantization_config.calibration is None


@pytest.mark.parametrize("kind", ["list of dicts", "loader", "tuples"])
def test_static_preset_with_data(kind, checkpoint, tmp_path):
    batches = [
        {"input_ids": torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(i))} for i in range(3)
    ]
    data = {
        "list of dicts": batches,
        "loader": DataLoader([{k: v[0] for k, v in b.items()} for b in batches], batch_size=2),
        "tuples": [(b["input_ids"],) for b in batches],
    }[kind]
    config = HfQuantConfig("w8a8", calibration=data)
    model = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
    assert_same(model, hfquant.quantize(small_models.llama(), data, "w8a8"), ids())
    assert all("input_scale" in dict(layer.named_buffers()) for layer in quant_layers(model).values())
    model.save_pretrained(tmp_path)
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("how", ["quantize", "from_pretrained", "distill"])
def test_a_calibration_set_by_its_path(how, checkpoint, tmp_path):
    model, path = small_models.llama(), str(tmp_path / "set")
    batches = [ids() for _ in range(4)]
    hfquant.generate_calibrate_set(model, hfquant.LanguageModelSampler(), batches, "", path)
    match how:
        case "quantize":
            made = hfquant.quantize(small_models.llama(), path, "w8a8")
        case "from_pretrained":
            config = HfQuantConfig("w8a8", calibration=path)
            made = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
        case _:
            made = hfquant.quantize(small_models.llama(), batches, "w8a8")
            assert len(hfquant.distill(made, model, path, steps=2).losses) == 2
    assert any("input_scale" in dict(layer.named_buffers()) for layer in quant_layers(made).values())


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *"abcdefghij"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.mark.parametrize("how", ["quantize", "from_pretrained", "sampler"])
def test_the_language_modelling_collator(how, checkpoint):
    """Its labels request the logits of every token; padded positions have the label -100."""
    tokenizer = word_tokenizer()
    rows = [tokenizer(text) for text in ("a b c d e", "f g h", "i j a b", "b d f h j a")]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    loader = DataLoader(rows, batch_size=2, collate_fn=collator)
    plain = [{k: v for k, v in batch.items() if k != "labels"} for batch in loader]
    assert len(plain) == 2
    if how == "from_pretrained":
        config = HfQuantConfig("w8a8", calibration=loader)
        model = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
    elif how == "quantize":
        model = hfquant.quantize(small_models.llama(), loader, "w8a8")
    else:
        sampler = hfquant.LanguageModelSampler()
        seen = hfquant.generate_calibrate_set(small_models.llama(), sampler, loader, "")
        assert [sorted(sample) for sample in seen] == [
            ["attention_mask", "input_ids", "labels", "use_cache"] for _ in range(2)
        ]
        model = hfquant.quantize(small_models.llama(), seen.get_dataloader(), "w8a8")
        hfquant.generate_calibrate_set(model, sampler, loader, "model.layers.1.mlp")
    assert_same(model, hfquant.quantize(small_models.llama(), plain, "w8a8"), ids())


def test_text_is_tokenized_by_the_tokenizer_saved_with_the_model(tmp_path):
    tokenizer = word_tokenizer()
    small_models.llama().save_pretrained(tmp_path / "float")
    text = ["a b c d e", "f g h", "i j a b c d e f g"]
    config = HfQuantConfig("w8a8", calibration=text)
    with pytest.raises(ValueError, match="tokenizer"):
        LlamaForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    tokenizer.save_pretrained(tmp_path / "float")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    given = HfQuantConfig("w8a8", calibration={"dataset": text, "tokenizer": tokenizer})
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "float", quantization_config=given), model, ids())
    # The embedding bounds the first layer's inputs: only the texts' tokens were observed.
    first = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        seen = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.arange(13)))
    scale = (seen / first.smooth).abs().amax() / 127
    assert first.input_scale.item() <= scale.item() * (1 + 1e-6)
    model.save_pretrained(tmp_path / "quantized")
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "quantized"), model, ids())


def test_the_empty_tokenizer_of_a_folder_without_one_is_none(tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    empty = transformers.AutoTokenizer.from_pretrained(tmp_path)  # it silently returns an empty one
    assert len(empty) == len(set(empty.all_special_ids))
    load = functools.partial(transformers.Qwen3ForCausalLM.from_pretrained, tmp_path)
    with pytest.raises(hfquant.CalibrationError, match="text needs a tokenizer"):
        load(quantization_config=HfQuantConfig("w8a8", calibration=["a b c"]))
    made = load(quantization_config=HfQuantConfig("w8a8"))  # generates with the model's vocabulary
    assert len(quant_layers(made)) == 7


def test_a_bare_path_is_a_dataset(tmp_path):
    small_models.llama().save_pretrained(tmp_path / "float")
    word_tokenizer().save_pretrained(tmp_path / "float")
    path = tmp_path / "x.parquet"
    datasets.Dataset.from_dict({"text": ["a b c d e", "f g h", "i j a b c d e f g"]}).to_parquet(path)
    made = [
        LlamaForCausalLM.from_pretrained(
            tmp_path / "float", quantization_config=HfQuantConfig("w8a8", calibration=calibration)
        )
        for calibration in (str(path), path, {"dataset": str(path)})
    ]
    assert len(quant_layers(made[0])) > 0
    for model in made[1:]:
        assert_same(model, made[0], ids())


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_is_calibrated_on_text(name, checkpoint, tmp_path):
    cls, inputs = type(model := getattr(small_models, name)()), transformers_inputs(getattr(small_models, name)())
    config = HfQuantConfig("w8a8", calibration={"dataset": ["a b c d e", "f g h"], "tokenizer": word_tokenizer()})
    made = cls.from_pretrained(checkpoint(name), quantization_config=config)
    assert not [layer.name for layer in made.quant_report.layers if layer.fallback]
    assert_same(made, hfquant.quantize(model, config.calibration, "w8a8"), inputs)
    made.save_pretrained(tmp_path)
    assert_same(cls.from_pretrained(tmp_path), made, inputs)


TEXT = ["a b c d e", "f g h", "i j a b c d e f g"]


def cached(cache: Path, revision: str, subfolder: str, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Write a Llama with a tokenizer as huggingface_hub caches a revision of the repository "me/llama"."""
    repository, commit = cache / "models--me--llama", revision[0] * 40
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    for part in (small_models.llama(), tokenizer):
        part.save_pretrained(repository / "snapshots" / commit / subfolder)


@pytest.mark.parametrize("subfolder", ["", "llm"])
@pytest.mark.parametrize("place", ["hub", "folder"])
def test_the_tokenizer_next_to_the_weights_goes_first(place, subfolder, tmp_path):
    other = word_tokenizer()
    other.add_tokens(["a b", "d e"])
    if place == "hub":
        cached(tmp_path, "main", subfolder, other)
        cached(tmp_path, "branch", subfolder, word_tokenizer())
        name, options = "me/llama", {"cache_dir": tmp_path, "revision": "branch", "subfolder": subfolder}
    else:
        other.save_pretrained(tmp_path)
        for part in (small_models.llama(), word_tokenizer()):
            part.save_pretrained(tmp_path / subfolder)
        name, options = str(tmp_path), {"subfolder": subfolder}
    made = [
        LlamaForCausalLM.from_pretrained(
            name, **options, quantization_config=HfQuantConfig("w8a8", calibration=calibration)
        )
        for calibration in (TEXT, {"dataset": TEXT, "tokenizer": word_tokenizer()})
    ]
    assert_same(*made, ids())


def test_the_tokenizer_of_a_model_in_memory_is_that_of_its_revision(monkeypatch):
    model, asked = small_models.llama(), []
    model.name_or_path, model.config._commit_hash = "me/llama", "b" * 40

    def load(name, **options):
        asked.append((name, options))
        return word_tokenizer()

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    hfquant.quantize(model, TEXT, "w8a8")
    assert asked == [("me/llama", {"trust_remote_code": False, "revision": "b" * 40})]


@pytest.mark.parametrize("column", [None, "input_ids", {"input_ids": "input_ids"}])
def test_tokens_need_no_tokenizer(column, tmp_path):
    small_models.llama().save_pretrained(tmp_path)
    rows = datasets.Dataset.from_dict({"input_ids": [[3, 4, 5, 6]] * 4})
    config = HfQuantConfig("w8a8", calibration={"dataset": rows, "column": column})
    assert quant_layers(LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config))


def test_pixels_need_no_processor(checkpoint):
    pixels = transformers_inputs(small_models.vit())["pixel_values"]
    rows = datasets.Dataset.from_dict({"pixel_values": pixels.tolist()}).with_format("torch")
    config = HfQuantConfig("w8a8", calibration={"dataset": rows, "column": {"pixel_values": "pixel_values"}})
    model = transformers.ViTForImageClassification.from_pretrained(checkpoint("vit"), quantization_config=config)
    assert quant_layers(model)


@functools.cache
def calibrated_on(names: tuple[str, ...], tokens: int) -> LlamaForCausalLM:
    """Return a model calibrated on the named tensors of one batch with the first tokens of a text of five."""
    encoded = word_tokenizer()("a b c d e", padding="max_length", max_length=8)
    batch = {name: torch.tensor([encoded[name][:tokens]]) for name in names}
    return hfquant.quantize(small_models.llama(), [batch], "w8a8")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("how", ["quantize", "from_pretrained", "sampler"])
@pytest.mark.parametrize("kind", ["lists", "arrays", "tensors", "alone", "tuple"])
def test_token_ids_of_a_single_text_get_a_batch_dimension(kind, how, checkpoint):
    encoded = word_tokenizer()("a b c d e", padding="max_length", max_length=8)
    if kind in ("alone", "tuple"):
        encoded = {"input_ids": encoded["input_ids"]}
    data: list[Any] = {
        "lists": lambda: [encoded],
        "arrays": lambda: [{name: np.array(values) for name, values in encoded.items()}],
        "tensors": lambda: [{name: torch.tensor(values) for name, values in encoded.items()}],
        "alone": lambda: [torch.tensor(encoded["input_ids"])],
        "tuple": lambda: [(torch.tensor(encoded["input_ids"]),)],
    }[kind]()
    if how == "quantize":
        model = hfquant.quantize(small_models.llama(), data, "w8a8")
    elif how == "from_pretrained":
        config = HfQuantConfig("w8a8", calibration=data)
        model = LlamaForCausalLM.from_pretrained(checkpoint("llama"), quantization_config=config)
    else:
        seen = hfquant.generate_calibrate_set(small_models.llama(), hfquant.LanguageModelSampler(), data, "")
        model = hfquant.quantize(small_models.llama(), seen.get_dataloader(), "w8a8")
    assert_same(model, calibrated_on(tuple(encoded), 8), ids())
    if len(encoded) > 1:  # padding does not count
        short = calibrated_on(tuple(encoded), 5)
        for name, layer in quant_layers(model).items():
            torch.testing.assert_close(layer.input_scale, short.get_submodule(name).input_scale)


def test_what_the_decoder_reads_gets_a_batch_dimension_too():
    model = small_models.bart()
    single = {"input_ids": [4, 5, 6, 7], "decoder_input_ids": [2, 4, 5], "decoder_attention_mask": [1, 1, 1]}
    whole = {name: torch.tensor([values]) for name, values in single.items()}
    made = [hfquant.quantize(copy.deepcopy(model), [sample], "w8a8") for sample in (single, whole)]
    with torch.no_grad():
        assert torch.equal(*(quantized(**whole).logits for quantized in made))


def test_token_ids_that_are_none():
    for data, found in (
        ([torch.rand(10)], r"torch.float32 \[10\]"),
        ([{"input_ids": np.ones((2, 3))}], r"float64 \[2, 3\]"),
        ([(torch.tensor(3),)], r"torch.int64 \[\]"),
    ):
        with pytest.raises(
            hfquant.CalibrationError, match=r"LlamaForCausalLM reads .* integers \[batch, length\], got " + found
        ):
            hfquant.quantize(small_models.llama(), data, "w8a8")


def test_rows_and_columns_of_text(tmp_path):
    small_models.llama().save_pretrained(tmp_path / "float")
    word_tokenizer().save_pretrained(tmp_path / "float")
    column = datasets.Dataset.from_dict({"text": TEXT})["text"]
    made = []
    for data in (TEXT, column, [{"text": text} for text in TEXT], [*TEXT, None]):
        config = HfQuantConfig("w8a8", calibration=data)
        made.append(LlamaForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config))
        model = LlamaForCausalLM.from_pretrained(tmp_path / "float")
        made.append(hfquant.quantize(model, data, "w8a8"))
    for model in made[1:]:
        assert_same(model, made[0], ids())


def test_a_tokenizer_with_code_of_its_own_is_trusted_if_the_model_is(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asks whether to run the code"))
    model = small_models.llama_of_64()
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    own_tokenizer(tmp_path)
    config = HfQuantConfig("w8a8", calibration=["a b c d", "b c a", "d a d a"])
    named = r"text needs a tokenizer, and that of .* has code of its own.* pass --trust-remote-code .* 'tokenizer': tok"
    with pytest.raises(hfquant.CalibrationError, match=named):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)

    own_model(tmp_path)
    trusted = {"trust_remote_code": True}
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, **trusted)
    assert type(quantized).__name__ == "OwnModel"
    assert quant_layers(quantized)
    quantized.save_pretrained(tmp_path / "quantized")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", **trusted), quantized, ids())


@pytest.mark.parametrize("kind", ["text", "rows", "images"])
def test_what_reads_the_data_has_code_of_its_own(kind, tmp_path):
    """A dataset may not need it, so it is asked for when it is read."""
    model = small_models.llama()
    model.save_pretrained(tmp_path)
    model.name_or_path = str(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    own_tokenizer(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"auto_map": {"AutoImageProcessor": "own_images.OwnImages"}}')
    rows = {
        "text": datasets.Dataset.from_dict({"text": ["a b c", "d e f"]}),
        "rows": datasets.Dataset.from_dict({"input_ids": [[3, 4, 5], [6, 7, 8]]}),
        "images": datasets.Dataset.from_dict({"image": [Image.new("RGB", (2, 2))] * 2}),
    }[kind]
    batches = transformers_batches(model, rows)
    if kind == "rows":
        assert len(list(batches)) == 1
        return
    reader = {"text": "text needs a tokenizer", "images": "images need a processor"}[kind]
    with pytest.raises(hfquant.CalibrationError, match=f"{reader}, and that of {tmp_path} has code of its own"):
        next(iter(batches))
    (tmp_path / "tokenizer_config.json").write_text("no JSON")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(hfquant.CalibrationError, match=f"{reader}; none was given or found with the model"):
        next(iter(transformers_batches(model, rows)))


def test_a_quantized_model_s_config_loads_its_checkpoint(tmp_path):
    quantized = hfquant.quantize(small_models.llama(), None, "w8a16")
    quantized.save_pretrained(tmp_path)
    before = quantized.config.quantization_config
    assert_same(LlamaForCausalLM.from_pretrained(tmp_path, config=quantized.config), quantized)
    assert quantized.config.quantization_config is before


@pytest.mark.parametrize("kind", ["rows", "list of features", "column of features"])
def test_a_model_of_sounds_is_calibrated_with_what_is_saved_beside_it(kind, tmp_path):
    tiny_transformers.build("WhisperForConditionalGeneration", "cpu").save_pretrained(tmp_path)
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1, n_fft=64, hop_length=800)
    extractor.save_pretrained(tmp_path)
    waves = np.random.default_rng(0).standard_normal((2, 320)).astype(np.float32)
    features = [extractor(wave, sampling_rate=16000, return_tensors="pt")["input_features"] for wave in waves]
    data = {
        "rows": [{"audio": {"array": wave.tolist(), "sampling_rate": 16000}} for wave in waves],
        "list of features": [{"input_features": feature} for feature in features],
        "column of features": datasets.Dataset.from_dict({"input_features": [f[0].tolist() for f in features]}),
    }[kind]
    config = HfQuantConfig("w8a8", calibration=data)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config)
    assert all("input_scale" in dict(layer.named_buffers()) for layer in quant_layers(model).values())


def test_features_of_sounds_need_no_start_token():
    model = tiny_transformers.build("WhisperForConditionalGeneration", "cpu")
    features = torch.randn(1, 8, 2 * model.config.max_source_positions)
    hfquant.quantize(model, [{"input_features": features}], "w8a8")
    assert quant_layers(model)
