"""From values of datasets to model inputs: tokens, padding, chats, images, the decoder's tokens."""

import datasets
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

from hfquant.calibration import calibration_batches
from hfquant.calibration.batches import CalibrationError
from hfquant.calibration.model_inputs import _packed, codes_of, paragraphs, with_decoder_inputs
from tests.calibration.tiny_models import tiny_llama
from tests.calibration.word_texts import TEXTS, flat, ids_of, make_tokenizer
from tests.integrations import small_models, tiny_transformers


def test_sequences_for_an_encoder_are_not_packed_or_padded():
    batches = list(calibration_batches(TEXTS[:4], tokenizer=make_tokenizer(bert=True, limit=4), batch_size=4))
    parts = batches[0]
    assert sum(len(part["input_ids"]) for part in parts) == 4
    for part in parts:
        assert (part["input_ids"][:, 0] == 2).all()
        assert (part["input_ids"][:, -1] == 3).all()
        assert part["input_ids"].shape[1] <= 4
    tiny = calibration_batches(["w1 w2", "w3 w4"], tokenizer=make_tokenizer(bert=True), batch_size=2)
    assert next(iter(tiny))["input_ids"].tolist() == [[2, 5, 6, 3], [2, 7, 8, 3]]


@given(st.lists(st.lists(st.integers(2, 99), max_size=12), max_size=12), st.integers(1, 9))
def test_packing(documents, seqlen):
    packed = list(_packed(documents, 1, seqlen))
    assert [t for sequence in packed for t in sequence] == [t for d in documents if d for t in [*d, 1]]
    assert all(len(sequence) == seqlen for sequence in packed[:-1])
    assert not packed or 0 < len(packed[-1]) <= seqlen


def test_paragraphs():
    lines = ["", "a\n", "b", " ", "", "c" * 70000, "d", "e"]
    assert list(paragraphs(lines)) == ["a\nb", "c" * 70000, "d\ne"]


@pytest.mark.parametrize("form", ["lists", "tensors", "stream"])
def test_padding_of_tokenized_rows_is_left_out(form):
    padded = {"input_ids": [[1, 2, 3, 0], [0, 0, 0, 4], [5, 6, 0, 0]]}
    masks = {"attention_mask": [[1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]]}
    data = datasets.Dataset.from_dict({**padded, **masks, "label": [0, 1, 2]})
    data = {"lists": data, "tensors": data.with_format("torch"), "stream": data.to_iterable_dataset()}[form]
    spec = {"dataset": data, "seed": None, "batch_size": 3}
    (packed,) = calibration_batches(spec, tokenizer=make_tokenizer())
    assert packed["input_ids"].tolist() == [[1, 2, 3, 1, 4, 1, 5, 6, 1]]
    assert packed["attention_mask"].all()
    (apart,) = calibration_batches({**spec, "pack": False})
    assert [part["input_ids"].tolist() for part in apart] == [[[1, 2, 3]], [[4]], [[5, 6]]]
    # Columns chosen one by one are model inputs as they are.
    (chosen,) = calibration_batches({**spec, "column": {"input_ids": "input_ids", "mask": "attention_mask"}})
    assert {name: value.tolist() for name, value in chosen.items()} == {
        "input_ids": padded["input_ids"],
        "mask": masks["attention_mask"],
    }


class FakeProcessor:
    """The interface of an image processor."""

    def __call__(self, images, return_tensors):
        assert return_tensors == "pt"
        return {"pixel_values": torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])}


def test_images(tmp_path):
    for i in range(5):
        Image.new("L", (4, 3), color=i * 10).save(tmp_path / f"{i}.png")
    spec = {"dataset": str(tmp_path), "batch_size": 2, "seed": None}
    pixels = [batch["pixel_values"] for batch in calibration_batches(spec, processor=FakeProcessor())]
    assert [tuple(batch.shape) for batch in pixels] == [(2, 3, 3, 4), (2, 3, 3, 4), (1, 3, 3, 4)]
    assert [int(image[0, 0, 0]) for batch in pixels for image in batch] == [0, 10, 20, 30, 40]
    plain = list(calibration_batches(spec))
    assert [image.size for image in plain[0]["image"]] == [(4, 3)] * 2
    images = [image for batch in plain for image in batch["image"]]
    assert torch.equal(
        torch.cat([b["pixel_values"] for b in calibration_batches(images, processor=FakeProcessor())]),
        torch.cat(pixels),
    )


def chat_tokenizer(template: str | None = "{% for m in messages %}{{ m['content'] }} {% endfor %}"):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


CHATS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "w9 w8"}] for text in ("w1 w2", "w3")]


def test_a_column_of_chats():
    data = datasets.Dataset.from_dict({"prompt": ["x", "y"], "messages": CHATS})
    spec = {"dataset": data, "seed": None, "samples": None}
    batches = list(calibration_batches(spec, tokenizer=chat_tokenizer()))
    assert flat(batches) == ids_of(["w1 w2 w9 w8", "w3 w9 w8"])
    named = list(calibration_batches({**spec, "column": "messages", "pack": False}, tokenizer=chat_tokenizer()))
    assert [batch["input_ids"].tolist() for batch in named] == [[[5, 6, 13, 12]], [[7, 13, 12]]]
    assert list(calibration_batches(spec, batch_size=2)) == [["x", "y"]], "without a tokenizer the prompts are wanted"


@pytest.mark.parametrize(
    ("column", "tokenizer", "message"),
    [
        (CHATS, chat_tokenizer(None), "column 'messages' holds chats, but the tokenizer has no chat template"),
        (CHATS, None, "column 'messages' holds chats, but there is no tokenizer"),
        (
            [[{"from": "a", "value": "b"}]],
            chat_tokenizer(),
            r"holds lists of dicts with keys \['from', 'value'\], .*'role'",
        ),
    ],
)
def test_chats_that_cannot_be_read(column, tokenizer, message):
    data = datasets.Dataset.from_dict({"messages": column})
    with pytest.raises(CalibrationError, match=message):
        list(calibration_batches(data, tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("column", "message"),
    [([[1, 2], [3]], "column 'x': the rows cannot be stacked"), ([{"a": 1}], None), ([None, None], "empty")],
)
def test_rows_that_make_no_tensor(column, message):
    batches = calibration_batches({"dataset": datasets.Dataset.from_dict({"x": column}), "batch_size": 2, "seed": None})
    if message is None:
        assert list(batches) == [column]
        return
    with pytest.raises(CalibrationError, match=message):
        list(batches)


def test_text_for_a_model_needs_a_tokenizer():
    for source in ({"dataset": ["a b"]}, ["a b"], datasets.Dataset.from_dict({"text": ["a b"]})):
        with pytest.raises(CalibrationError, match=r"text needs a tokenizer; .*'tokenizer': tokenizer"):
            list(calibration_batches(source, model=tiny_llama()))


def test_images_for_a_model_need_a_processor():
    data = datasets.Dataset.from_dict({"image": [Image.new("RGB", (2, 2))]})
    with pytest.raises(CalibrationError, match=r"images need a processor; .*'processor': processor"):
        list(calibration_batches(data, model=tiny_llama()))


def decoder_inputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, list[list[int]]]:
    """Return what was added to a model's inputs."""
    data = datasets.Dataset.from_dict({name: value.tolist() for name, value in inputs.items()})
    spec = {"dataset": data, "column": {name: name for name in inputs}, "seed": None, "batch_size": 2}
    (batch,) = calibration_batches(spec, model=model)
    return {name: value.tolist() for name, value in batch.items() if name not in inputs}


def test_the_decoder_of_an_encoder_decoder_reads_the_same_tokens():
    model, ids = small_models.t5(), torch.tensor([[5, 6, 7], [8, 9, 0]])
    shifted = {"decoder_input_ids": [[3, 5, 6], [3, 8, 9]]}  # 3 is the start token
    assert decoder_inputs(model, {"input_ids": ids}) == shifted
    masked = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    assert decoder_inputs(model, masked) == {**shifted, "decoder_attention_mask": [[1, 1, 1], [1, 1, 1]]}
    for name in ("decoder_input_ids", "labels"):
        assert decoder_inputs(model, {"input_ids": ids, name: ids}) == {}
    for other in (small_models.t5_encoder(), tiny_llama()):
        assert decoder_inputs(other, masked) == {}
    del model.config.decoder_start_token_id
    assert decoder_inputs(model, {"input_ids": ids}) == {"decoder_input_ids": [[0, 5, 6], [0, 8, 9]]}


@torch.no_grad()
def test_decoder_inputs_are_those_that_bart_derives_itself():
    model = small_models.bart()
    (batch,) = calibration_batches(["w1 w2 w3 w4"], tokenizer=make_tokenizer(), model=model)
    assert batch.keys() == {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
    derived = model(batch["input_ids"], batch["attention_mask"])
    assert torch.equal(model(**batch).logits, derived.logits)


@pytest.mark.parametrize("mask", [np.tril(np.ones((1, 4, 4))).tolist(), np.eye(4).tolist(), 1, [1, 1, 0]])
def test_masks_that_are_not_of_tokens_are_ignored(mask):
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 2, "attention_mask": [mask] * 2})
    found = list(calibration_batches({"dataset": rows, "samples": 2, "seed": None, "pack": False}))
    assert [batch["input_ids"].tolist() for batch in found] == [[[1, 2, 3, 4]]] * 2


def test_a_decoder_of_another_vocabulary_needs_its_own_tokens():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    decoder = BertConfig(**sizes, vocab_size=10, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**sizes, vocab_size=20), decoder)
    rows = datasets.Dataset.from_dict({"input_ids": [[11, 12, 13]] * 2})
    with pytest.raises(CalibrationError, match="the decoder has another vocabulary"):
        next(iter(calibration_batches({"dataset": rows}, model=EncoderDecoderModel(config))))


#: Models that read audio codes with a text: the shape of their codes for two texts, and the start token.
CODES = {
    "MusicgenForConditionalGeneration": ((2, 4, 64), 32),  # its tables have 64 positions
    "MusicgenMelodyForConditionalGeneration": ((2, 4, 64), 32),
    "DiaForConditionalGeneration": ((2, 128, 3), 35),
}


@pytest.mark.parametrize("name", CODES)
@torch.no_grad()
def test_a_decoder_of_audio_codes_reads_random_ones(name):
    model, (shape, start) = tiny_transformers.build(name, "cpu"), CODES[name]
    spec = {"dataset": ["w1 w2", "w3 w4"], "batch_size": 2, "pack": False}
    batches = calibration_batches(spec, tokenizer=make_tokenizer(), model=model)
    (batch,), (again,) = batches, batches
    codes = batch["decoder_input_ids"]
    assert codes.shape == shape
    assert torch.equal(codes, again["decoder_input_ids"])
    assert not torch.equal(*codes), "a text has its own"
    steps = codes if name != "DiaForConditionalGeneration" else codes.transpose(1, 2)
    assert (steps[..., 0] == start).all()
    assert set(steps[..., 1:].flatten().tolist()) <= set(range(33)), "codes, without special tokens"
    assert model(**batch).logits.isfinite().all()


def test_codes_that_are_given_stay():
    model = tiny_transformers.build("MusicgenForConditionalGeneration", "cpu")
    for codes in (torch.ones(2, 4, 3), torch.ones(8, 3)):
        batch = {"input_ids": torch.ones(2, 3), "decoder_input_ids": codes}
        assert with_decoder_inputs(batch, model) is batch


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("MusicgenMelodyForCausalLM", r"\[batch, 4, length\]"),
        ("KyutaiSpeechToTextForConditionalGeneration", r"\[batch, length, 4\]"),
    ],
)
def test_a_decoder_of_audio_codes_alone_reads_no_text(name, shape):
    model = tiny_transformers.build(name, "cpu")
    with pytest.raises(CalibrationError, match=f"{name} reads audio codes, not text .*'input_ids' {shape}"):
        next(iter(calibration_batches(["w1 w2"], tokenizer=make_tokenizer(), model=model)))


def test_text_tokens_next_to_codes_share_their_range():
    """All are rows of one table, in which a larger code would be one of the next codebook's, or none."""
    model = tiny_transformers.build("KyutaiSpeechToTextForConditionalGeneration", "cpu")
    made = codes_of(model).random([torch.Generator().manual_seed(i) for i in range(2)], 100)
    assert made.shape == (2, 100, 4)
    assert (made[:, 0] == 19).all()
    special = (2, 3, 19)
    assert made[:, 1:].unique().tolist() == [i for i in range(20) if i not in special]


@pytest.mark.parametrize("name", ["Mimi", "Moshi"])
def test_other_models_with_codebooks_read_no_codes_alone(name):
    """A codec reads sounds; Moshi reads text next to codes."""
    kind = {"Mimi": transformers.MimiModel, "Moshi": transformers.MoshiModel}[name]
    with torch.device("meta"):
        model = kind(kind.config_class(num_hidden_layers=1))
    assert model.config.num_codebooks
    assert codes_of(model) is None


@pytest.mark.parametrize(
    ("name", "kind"), [("WhisperForConditionalGeneration", "sounds"), ("ViTForImageClassification", "images")]
)
def test_text_for_a_model_that_reads_none(name, kind):
    model = tiny_transformers.build(name)
    with pytest.raises(CalibrationError, match=f"{name} reads {kind}, not text; .* '{model.main_input_name}'"):
        list(calibration_batches(["w1 w2"], tokenizer=make_tokenizer(), model=model))


def test_a_decoder_of_sounds_reads_its_start_token():
    model = tiny_transformers.build("WhisperForConditionalGeneration")
    inputs = {"input_features": torch.zeros(2, 8, 20)}
    start = model.config.decoder_start_token_id
    assert with_decoder_inputs(inputs, model)["decoder_input_ids"].tolist() == [[start], [start]]
    for whole in ({**inputs, "labels": torch.ones(2, 3)}, {"encoder_outputs": inputs}):
        assert with_decoder_inputs(whole, model) is whole
    hears_only = tiny_transformers.build("WhisperForAudioClassification")
    assert with_decoder_inputs(inputs, hears_only) is inputs
