"""Texts of numbered words, and the tokenizer that reads them."""

import itertools

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(200)]


def make_tokenizer(*, bert: bool = False, limit: int = 10**30) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word: w7 is token 7 + 4."""
    vocab = {word: i for i, word in enumerate(["<unk>", "<eos>", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>"}
    if bert:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        special = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=limit, **special)


TEXTS = [" ".join(WORDS[i : i + 1 + i % 5]) for i in range(0, 180, 3)]


def ids_of(texts) -> list[int]:
    return [token for text in texts for token in [*(int(word[1:]) + 4 for word in text.split()), 1]]


def flat(batches) -> list[int]:
    parts = itertools.chain.from_iterable(batch if isinstance(batch, list) else [batch] for batch in batches)
    return [token for part in parts for token in part["input_ids"].flatten().tolist()]
