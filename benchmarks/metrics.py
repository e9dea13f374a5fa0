"""Metrics of a quantized model: perplexity, KL divergence to and agreement with full precision, PSNR, SQNR, bits."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Reference(NamedTuple):
    """Full precision's output on the evaluation windows, kept as last hidden states.

    Log-probabilities over a vocabulary of 49 thousand would take eighty times the memory. Multiplying the states by the
    head again gives the same values, since no benchmark row quantizes the head.
    """

    windows: list[Tensor]  # [1, tokens] int64 each
    states: list[Tensor]  # [tokens - 1, hidden] float32 each: the positions that predict a token
    head: Tensor  # [vocabulary, hidden]
    perplexity: float


class LanguageScores(NamedTuple):
    """Scores over every token of every window except its first, which has no context to be predicted from."""

    perplexity: float  # exp of the mean negative log-likelihood
    kl: float  # mean KL(full precision || model) in nats per token
    kl_error: float  # its standard error over tokens
    top1: float  # share of tokens for which both models rank the same token first
    tokens: int


def evaluation_windows(tokenizer: Any, texts: Iterable[str], seqlen: int = 512, full: bool = False) -> list[Tensor]:
    """Return non-overlapping windows of at most ``seqlen`` tokens, ``[1, tokens]`` int64 each; none spans two texts.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: What to evaluate on.
        seqlen: Most tokens per window.
        full: Return every window of each text instead of its first. Windows of a single token have nothing to score and
            are dropped.
    """
    windows = []
    for text in texts:
        cut = torch.tensor(tokenizer(text, verbose=False)["input_ids"]).unsqueeze(0).split(seqlen, dim=1)
        windows += [w for w in cut[: None if full else 1] if w.shape[1] > 1]
    return windows


@torch.inference_mode()
def reference(model: nn.Module, windows: list[Tensor]) -> Reference:
    """Run the full-precision causal language model once and keep what :func:`language_scores` compares with."""
    head = model.get_output_embeddings().weight.detach()
    states = [model.base_model(input_ids=w).last_hidden_state[0, :-1].float() for w in windows]
    loss = sum(
        nn.functional.cross_entropy(_logits(s, head), w[0, 1:], reduction="sum").item()
        for s, w in zip(states, windows, strict=True)
    )
    return Reference(windows, states, head, math.exp(loss / sum(map(len, states))))


@torch.inference_mode()
def language_scores(model: nn.Module, ref: Reference) -> LanguageScores:
    """Return perplexity, KL divergence and top-1 agreement in one pass over the reference's windows.

    Raises:
        FloatingPointError: A logit of the model is not finite.
    """
    loss, agree, divergences = 0.0, 0, []
    for window, states in zip(ref.windows, ref.states, strict=True):
        logits = model(input_ids=window).logits[0, :-1].float()
        if not logits.isfinite().all():
            raise FloatingPointError("the model's logits contain NaN or infinity")
        log_q, log_p = logits.log_softmax(-1), _logits(states, ref.head).log_softmax(-1)
        loss += nn.functional.nll_loss(log_q, window[0, 1:], reduction="sum").item()
        divergences.append(nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double())
        agree += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
    kl = torch.cat(divergences)
    error = kl.std() / math.sqrt(len(kl))
    return LanguageScores(math.exp(loss / len(kl)), kl.mean().item(), error.item(), agree / len(kl), len(kl))


def sqnr(signal: Tensor, quantized: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in dB over all elements; infinite if both are equal."""
    signal, noise = signal.double(), quantized.double() - signal.double()
    return 10 * (signal.square().sum() / noise.square().sum()).log10().item()


def psnr(images: Tensor, others: Tensor, value_range: float) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each image: ``[images, ...]`` twice to ``[images]`` float64.

    Args:
        images: Images of full precision.
        others: Images of the quantized model from equal noise.
        value_range: Largest minus smallest value an image can take, 2 for [-1, 1].
    """
    error = (images.double() - others.double()).square().flatten(1).mean(1)
    return 10 * (value_range**2 / error).log10()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of independent values and its standard error."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def bits_per_weight(model: nn.Module, weights: dict[str, int], left: Collection[str] = ()) -> float:
    """Return the stored bits per weight of the named linears, from the bytes of every tensor in their state dicts.

    Codes, scales, zero points, smoothing vectors, low-rank branches and biases all count. Tensor subclasses are counted
    as the plain tensors that they hold.

    Args:
        model: The quantized model.
        weights: Number of weights in full precision, by the linear's name.
        left: Names of linears that a config leaves in full precision; they count as stored.

    Raises:
        ValueError: Another linear still has weights of 16 bits or more: it was skipped, so the row would flatter.
    """
    tensors = {name: _plain_tensors(model.get_submodule(name).state_dict().values()) for name in weights}
    if skipped := [
        n for n, held in tensors.items() if n not in left and any(_is_float_weight(t, weights[n]) for t in held)
    ]:
        raise ValueError(f"{len(skipped)} of {len(weights)} linears were not quantized, the first is {skipped[0]}")
    return 8 * sum(_bytes(t) for held in tensors.values() for t in held) / sum(weights.values())


def _logits(states: Tensor, head: Tensor) -> Tensor:
    return nn.functional.linear(states, head.float())


def _plain_tensors(tensors: Iterable[Any]) -> list[Tensor]:
    plain: list[Tensor] = []
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            plain += _plain_tensors(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        elif isinstance(tensor, Tensor):  # a module's extra state need not be one
            plain.append(tensor)
    return plain


def _is_float_weight(tensor: Tensor, weights: int) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() >= weights


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
