"""The tokens that a transformers model writes and reads, and how its texts begin."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from hfquant.calibration.model_inputs import text_config, text_positions
from hfquant.calibration.self_made import random_ids

logger = logging.getLogger(__name__)


class Words:
    """The tokens of a model and how its texts begin.

    Attributes:
        ordinary: tokens that are not special, [tokens] int64.
        frame: special tokens before and after a text.
        mask: the mask token; None if there is none.
        start: the token that the decoder of an encoder-decoder model starts with.
        limit: maximum tokens of a text.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        config, size = text_config(model), vocabulary(model)
        known = {name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "decoder_start")}
        special = {token for token in known.values() if isinstance(token, int)}
        self.start: int = next((t for t in (known["decoder_start"], known["bos"]) if isinstance(t, int)), 0)
        self.frame: tuple[list[int], list[int]] = ([], [])
        self.mask: int | None = None
        self._chat: list[int] = []
        limits = [text_positions(model), getattr(config, "n_positions", None)]
        if tokenizer is not None:
            size, special = min(size, len(tokenizer)), set(tokenizer.all_special_ids)
            self.mask = getattr(tokenizer, "mask_token_id", None)
            self.frame = _frame(tokenizer, special)
            self._chat = _chat_start(tokenizer)
            limits.append(getattr(tokenizer, "model_max_length", None))
        self.ordinary = torch.tensor([i for i in range(size) if i not in special])
        self.limit = int(min([1 << 20, *(n for n in limits if isinstance(n, (int, float)) and n > 0)]))
        bos = known["bos"] if tokenizer is None else tokenizer.bos_token_id
        self._bos = [bos] if isinstance(bos, int) and 0 <= bos < size else []

    def prompt(self, number: int, source: torch.Generator) -> list[int]:
        """Return the start of a window by its number: usually the tokens that begin each text, then a random token.

        One in four starts like a text, and one in four like a chat, if the model knows how these start.
        """
        begun = {1: self._chat, 3: self._bos}.get(number % 4)
        return begun or [*self.frame[0], int(random_ids(self.ordinary, 1, [source]))]

    def framed(self, ids: Tensor) -> Tensor:
        """Return texts [rows, length] with special tokens around them, at the same length."""
        before, after = self.frame
        inner = ids[:, len(before) : ids.shape[1] - len(after)]
        sides = [torch.tensor(side, dtype=torch.long).expand(len(ids), -1) for side in self.frame]
        return torch.cat([sides[0], inner, sides[1]], 1)


def vocabulary(model: Any) -> int:
    """Return the size of a model's vocabulary; of one that hashes characters, the number of different hashes."""
    config = text_config(model)
    return int(config.vocab_size if hasattr(config, "vocab_size") else config.num_hash_buckets)


def _frame(tokenizer: Any, special: set[int]) -> tuple[list[int], list[int]]:
    ids = list(tokenizer("a")["input_ids"])
    inner = [i for i, token in enumerate(ids) if token not in special] or [len(ids) - 1]
    return ids[: inner[0]], ids[inner[-1] + 1 :]


def _chat_start(tokenizer: Any) -> list[int]:
    """Return a chat's tokens up to the user's message, which the model then writes along with its answer."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    words = "what the user says"
    try:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": words}], tokenize=False)
    except Exception as error:  # noqa: BLE001 (a template is code by the model's author)
        logger.debug("the chat template does not take a user's message: %s", error)
        return []
    before, found, _ = chat.partition(words)
    return list(tokenizer(before, add_special_tokens=False)["input_ids"]) if found else []
