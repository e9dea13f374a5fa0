"""Measure how far a quantized model is from another, for `hfquant compare` and the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfquant.calibration.batches import device_of, evaluating, forward
from hfquant.outputs import decibels


class NothingToCompare(ValueError):
    """Models or pipelines that return nothing for which there is a metric."""


class MissingArguments(NothingToCompare):
    """Pipelines that do not run on the given arguments because they require others."""


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: name of the metric, in words.
        value: its value.
        error: standard error over windows or images; None if it has none.
        unit: "dB", "nats", "%", or "".
        better: "higher" or "lower".
    """

    name: str
    value: float
    error: float | None = None
    unit: str = ""
    better: str = "higher"

    def __str__(self) -> str:
        error = "" if self.error is None or not math.isfinite(self.error) else f" ± {self.error:.2g}"
        return f"{self.value:.4g}{error} {self.unit}".rstrip()


@dataclass(frozen=True)
class TokenChange:
    """A position in the text at which the two models rank different tokens first.

    Attributes:
        context: the last words of the text before it.
        reference: the token that the reference ranks first, and its probability.
        other: the same for the other model.
    """

    context: str
    reference: tuple[str, float]
    other: tuple[str, float]


@dataclass(frozen=True)
class ModelComparison:
    """Two models compared on the same inputs: figures, and where a language model's next tokens differ most."""

    figures: tuple[Figure, ...]
    changes: tuple[TokenChange, ...] = ()


def builtin_text() -> list[str]:
    """Return about 460 kB of English prose that ships with every Python: its own language reference."""
    from pydoc_data.topics import topics

    return ["\n\n".join(topics[name] for name in sorted(topics))]


@torch.inference_mode()
def compare_models(
    reference: nn.Module, other: nn.Module, batches: Iterable[Any], decode: Callable[[Tensor], str] | None = None
) -> ModelComparison:
    """Compare two transformers models on batches of inputs.

    Causal language models are compared by perplexity, KL divergence and top-1 agreement, over all tokens except the
    first of each window; models with other logits by KL divergence and top-1 agreement; all others by the
    signal-to-noise ratio and cosine similarity of their hidden states.

    Args:
        reference: the model to compare against.
        other: the model to compare.
        batches: batches of model inputs, each a sample as in calibration.
        decode: converts token ids [n] to text, for a table of next tokens that differ; None for no table.

    Raises:
        ValueError: there are no batches, or the outputs of the models differ in shape.
        NothingToCompare: the models return neither logits nor hidden states.
        FloatingPointError: the other model's output contains NaN or Inf.
    """
    scores: list[dict[str, Tensor]] = []
    changes: list[tuple[float, TokenChange]] = []
    with evaluating(reference, other):
        for batch in batches:
            outputs = [forward(model, batch) for model in (reference, other)]
            name = next((n for n in ("logits", "last_hidden_state") if getattr(outputs[0], n, None) is not None), None)
            if name is None:
                raise NothingToCompare(f"{type(reference).__name__} returns neither logits nor a last hidden state")
            p, q = (getattr(output, name).float().to(device_of(reference)) for output in outputs)
            if p.shape != q.shape:
                raise ValueError(f"the outputs differ in shape: {list(p.shape)} vs. {list(q.shape)}")
            for model, output in ((reference, p), (other, q)):
                if not output.isfinite().all():
                    raise FloatingPointError(f"{type(model).__name__}: the output contains NaN or Inf")
            tokens: Any = batch.get("input_ids") if isinstance(batch, Mapping) else None
            causal = _is_causal(reference) and tokens is not None and p.shape[:2] == tokens.shape
            if name == "last_hidden_state":
                scores.append(_signal_scores(p, q))
                continue
            if causal:
                mask = batch.get("attention_mask")
                kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
                p, q = p[:, :-1], q[:, :-1]
                scores.append(_token_scores(p, q, tokens[:, 1:].to(p.device), kept[:, 1:].to(p.device)))
                if decode is not None:
                    changes += _changes(p, q, tokens, decode)
            else:
                scores.append(_logit_scores(p, q))
    if not scores:
        raise ValueError("nothing to compare: no batches given")
    worst = sorted(changes, key=lambda item: -item[0])[:20]
    return ModelComparison(_figures(scores), tuple(change for _, change in worst))


def compare_signals(pairs: Iterable[tuple[Tensor, Tensor]], what: str) -> tuple[Figure, ...]:
    """Compare (reference, other) signals such as audio by signal-to-noise ratio and cosine similarity.

    Args:
        pairs: signals of any shape, which may differ from pair to pair.
        what: what they are, in words.
    """
    return _figures([_signal_scores(p[None], q[None]) for p, q in pairs], what)


def _is_causal(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    names = " ".join(getattr(config, "architectures", None) or [type(model).__name__])
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    return not encoder_decoder and any(
        word in names for word in ("CausalLM", "LMHeadModel", "ForConditionalGeneration")
    )


def _token_scores(p: Tensor, q: Tensor, targets: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Return sums per window, [batch], and the number of tokens in each."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    losses = [-log.gather(-1, targets.unsqueeze(-1)).squeeze(-1) for log in (log_p, log_q)]
    agree = (p.argmax(-1) == q.argmax(-1)).float()
    sums = {"kl": divergence, "loss": losses[0], "other loss": losses[1], "agree": agree}
    return {name: (value.double() * kept).sum(-1) for name, value in sums.items()} | {"tokens": kept.sum(-1).double()}


def _logit_scores(p: Tensor, q: Tensor) -> dict[str, Tensor]:
    divergence = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    agree = (p.argmax(-1) == q.argmax(-1)).float()
    rows = {"kl": divergence, "agree": agree, "tokens": torch.ones_like(agree)}
    return {
        name: value.double().flatten(1).sum(1) if value.dim() > 1 else value.double() for name, value in rows.items()
    }


def _signal_scores(p: Tensor, q: Tensor) -> dict[str, Tensor]:
    p, q = p.double().flatten(1), q.double().flatten(1)
    noise = (p - q).square().sum(1)
    return {
        "signal": p.square().sum(1),
        "noise": noise,
        "cosine": F.cosine_similarity(p, q, dim=1).where(noise != 0, 1.0),
    }


def _figures(scores: Sequence[Mapping[str, Tensor]], what: str = "hidden states") -> tuple[Figure, ...]:
    total = {name: torch.cat([score[name] for score in scores]) for name in scores[0]}
    if "signal" in total:
        ratio = decibels(total["signal"].sum(), total["noise"].sum())
        each = decibels(total["signal"], total["noise"])
        cosine = total["cosine"]
        return (
            Figure(f"SQNR of {what}", ratio.item(), standard_error(each), "dB"),
            Figure(f"cosine similarity of {what}", cosine.mean().item(), standard_error(cosine)),
        )
    tokens = total["tokens"]
    figures = []
    if "loss" in total:
        for name, key in (("perplexity, reference", "loss"), ("perplexity", "other loss")):
            figures.append(Figure(name, math.exp(total[key].sum() / tokens.sum()), better="lower"))
    kl, kl_error = _ratio(total["kl"], tokens)
    agree, agree_error = _ratio(100 * total["agree"], tokens)
    figures.append(Figure("KL divergence", kl, kl_error, "nats", "lower"))
    figures.append(Figure("top-1 agreement", agree, agree_error, "%"))
    return tuple(figures)


def _ratio(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """Return the ratio of two sums over windows, and its standard error (ratio estimator)."""
    mean = sums.sum() / counts.sum()
    residual = (sums - mean * counts).square().sum()
    n = len(sums)
    error = (residual * n / max(n - 1, 1)).sqrt() / counts.sum() if n > 1 else torch.tensor(math.nan)
    return mean.item(), error.item()


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of independent values [n]; NaN for a single value."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan


def _changes(
    p: Tensor, q: Tensor, tokens: Tensor, decode: Callable[[Tensor], str], context: int = 12
) -> list[tuple[float, TokenChange]]:
    """Return where the top-1 tokens differ, with the probability that the reference loses by the change."""
    found = []
    for row, position in (p.argmax(-1) != q.argmax(-1)).nonzero().tolist():
        before, after = p[row, position].softmax(-1), q[row, position].softmax(-1)
        first, second = before.argmax(), after.argmax()
        text = decode(tokens[row, max(0, position + 1 - context) : position + 1])
        words = [
            (decode(token.view(1)), probability[token].item())
            for token, probability in ((first, before), (second, after))
        ]
        found.append(((before[first] - before[second]).item(), TokenChange(text, words[0], words[1])))
    return sorted(found, key=lambda item: -item[0])[:20]
