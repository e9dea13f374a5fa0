"""Inputs of the commands: the digits pipeline, a tiny Llama with a word-level tokenizer, labels and text."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hfquant.demo import load_digits_pipeline

WORDS = ["</s>", "<unk>", *"abcdefgh"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits")
    load_digits_pipeline().save_pretrained(path)
    return path


def make_llama(path: Path, width: int = 32) -> Path:
    """Write a tiny Llama with a word-level tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width // 2, "vocab_size": len(WORDS)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.parquet"
    datasets.Dataset.from_dict({"label": [i % 10 for i in range(12)]}).to_parquet(path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a b c d e f g h\n\nh g f e\n" * 20)
    return path


def lines(said: str) -> list[str]:
    """Return a command's output lines without its progress bars."""
    return [line for line in re.split(r"[\r\n]+", said) if line.strip() and not re.search(r"\d%\|", line)]
