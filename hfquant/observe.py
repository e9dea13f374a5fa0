"""Collect the statistics of some layers' inputs in one pass over the calibration data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfquant.calibration.batches import CalibrationError, decoder_side, device_of, evaluating, forward, mask_of, samples
from hfquant.console import progress_bar
from hfquant.experts import UnfusedExperts
from hfquant.memory import release_free_memory
from hfquant.nn.kinds import kind_of
from hfquant.outputs import main_tensor
from hfquant.statistics import Collector, LayerStats


class _AllSeen(Exception):
    """Every observed layer has run as often as it does, so the rest of the forward is not needed."""


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    data: Iterable[Any],
    needs: Mapping[str, Collection[str]] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    stop_early: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, LayerStats]:
    """Run ``model`` over the data once and collect the statistics of the inputs of ``layers``.

    A layer's kind defines the rows of its input (:mod:`hfquant.nn.kinds`). Rows that a sample's 2-D
    ``attention_mask`` masks out (padding) do not count, nor do those of a decoder that its own mask does.

    Args:
        model: run as is, in eval mode.
        layers: name -> module (of ``model``).
        data: batches, iterated once.
        needs: name -> statistics that it needs beyond those always collected; default: none.
        options: keyword arguments to add to a sample of keyword arguments that lacks them.
        stop_early: stop each forward but the first once all ``layers`` have run as often as in the first.
        shard: (rank, size): of every ``size`` batches, only the one at index ``rank`` is run.

    Returns:
        name -> statistics; layers that never ran (or saw no rows) are missing.

    Raises:
        CalibrationError: NaN or Inf reached a layer, or a sample cannot be used.
    """
    collector = Collector(needs or dict.fromkeys(layers, ()))
    padding = _Padding(model)
    batch = 0
    seen: Counter[str] = Counter()
    calls: Counter[str] | None = None

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        kind = kind_of(module)

        def see(x: Tensor) -> None:
            rows, left_out = kind.rows(module, x, collector.seed)
            if bad := collector.add(name, rows, padding.counted(module, x, rows), left_out):
                raise CalibrationError(
                    f"layer {name!r}: {bad} of {rows.numel()} inputs are NaN or Inf in calibration batch {batch}"
                )
            seen[name] += 1
            if stop_early and calls is not None and len(calls) == len(layers) and seen >= calls:
                raise _AllSeen

        return kind.watch(module, see)

    experts = [module for module in model.modules() if isinstance(module, UnfusedExperts)]
    handles = [*padding.handles, *(watch(n, m) for n, m in layers.items())]
    try:
        with evaluating(model):
            for batch, number, sample in _share(data, *shard):
                padding.start(sample)
                for module in experts:
                    module.real = padding.real(module)
                seen.clear()
                collector.start(batch + 1_000_003 * number)
                with suppress(_AllSeen):
                    forward(model, sample, options)
                calls = calls or seen.copy()  # a layer may run several times per sample
    finally:
        for handle in handles:
            handle.remove()
        for module in experts:
            module.real = None
    return collector.stats


class _Padding:
    """Which tokens of the current sample are real.

    An encoder-decoder has two masks. That of the encoder also holds for the encoder's output as the decoder reads it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.device = model, device_of(model)
        self._decodes = decoder_side(model)
        self._first: Tensor | None = None
        self._second: Tensor | None = None
        self._encoded: Tensor | None = None
        get: Any = getattr(model, "get_encoder", None)
        encoder = get() if get and self._decodes else None
        self.handles = [encoder.register_forward_hook(self._keep)] if isinstance(encoder, nn.Module) else []

    def start(self, sample: Any) -> None:
        """Go on to another sample."""
        self._first, self._second = (
            self._real(mask_of(self.model, sample, name)) for name in ("attention_mask", "decoder_attention_mask")
        )
        self._encoded = None

    def _real(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None or bool((mask != 0).all()) else (mask != 0).to(self.device)

    def _keep(self, _module: nn.Module, _args: Any, output: Any) -> None:
        with suppress(ValueError):
            self._encoded = main_tensor(output)

    def real(self, module: nn.Module) -> Tensor | None:
        """Return which tokens of a module's input are real, [batch, tokens] bool; None if all are, or if unknown."""
        return self._second if module in self._decodes else self._first

    def counted(self, module: nn.Module, x: Tensor, rows: Tensor) -> Tensor | None:
        """Return which rows of an input are real, [batch, tokens, ..., in] or [batch * tokens, in]; None as above.

        Args:
            module: the layer.
            x: its input.
            rows: the rows that it reads of it.
        """
        encoded = self._encoded is not None and x.data_ptr() == self._encoded.data_ptr()
        mask = self._first if encoded else self.real(module)
        if mask is None or rows.dim() < 2:
            return None
        if rows.dim() == 2:
            return mask.flatten().to(rows.device) if len(rows) == mask.numel() else None
        return mask.to(rows.device) if rows.shape[:2] == mask.shape else None


def _share(data: Iterable[Any], rank: int, size: int) -> Iterator[tuple[int, int, Any]]:
    """Yield (batch index, index in the batch, sample) for one process's share of the batches."""
    for index, batch in enumerate(progress_bar(data, "calibrating", shown=rank == 0)):
        if index % size == rank:
            for number, sample in enumerate(samples(batch)):
                yield index, number, sample
            release_free_memory()
