"""End to end: what a choice does to the model's output on rows that it was not made on, and what would be better.

Estimates are wrong by factors that layers of one role have in common: errors add up along the residual stream, second
order ends somewhere. A factor is found by trying: the harm of a role is taken for more or less than estimated, the
budget shared out anew, and the result kept where the output on held-out rows is better beyond noise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfquant.calibration.batches import evaluating, forward
from hfquant.console import progress_bar
from hfquant.outputs import better, divergence, is_distribution, main_tensor, padding_mask
from hfquant.replacing import replace_modules
from hfquant.search.knapsack import Table, cheapest

logger = logging.getLogger(__name__)

#: Choices that are tried end to end, beyond those that estimates give.
TRIES = 12
#: By which a role's harm is taken for more or less than estimated.
_FACTOR = 3.0
_POWERS = 3
#: Positions of a sequence that are compared.
_POSITIONS = 128


@dataclass
class Judge:
    """Compares a model with layers replaced to what it was.

    Attributes:
        model: in full precision.
        data: held-out samples.
        expected: the model's output for each.
        is_distribution: whether outputs are logits over tokens or labels.
    """

    model: nn.Module
    data: Sequence[Any]
    expected: list[Tensor]
    is_distribution: bool

    @classmethod
    def of(cls, model: nn.Module, data: Sequence[Any]) -> Judge:
        """Run the model over the data."""
        with evaluating(model):
            expected = [_compared(main_tensor(forward(model, sample))) for sample in data]
        return cls(model, data, expected, is_distribution(model, expected[0]))

    def divergence(self, layers: Mapping[str, nn.Module]) -> Tensor:
        """Return how far the output moves with ``layers`` in place, for each element of the batches, [n] float64.

        Mean KL divergence a token (or label), else the relative squared error.
        """
        originals = {name: self.model.get_submodule(name) for name in layers}
        try:
            replace_modules(self.model, {originals[name]: layer for name, layer in layers.items()})
            with evaluating(self.model):
                found = [self._apart(sample, before) for sample, before in zip(self.data, self.expected, strict=True)]
        finally:
            replace_modules(self.model, {layer: originals[name] for name, layer in layers.items()})
        return torch.cat(found).double().cpu()

    def _apart(self, sample: Any, before: Tensor) -> Tensor:
        output = main_tensor(forward(self.model, sample))
        mask = padding_mask(sample, output)
        mask = None if mask is None else mask[:, _positions(mask.shape[1])]
        return divergence(_compared(output), before, self.is_distribution, mask)


def _compared(output: Tensor) -> Tensor:
    """Return an output [batch, ...] in float32, of long sequences at some positions."""
    values = output.detach().float()
    return values[:, _positions(values.shape[1])] if values.dim() == 3 else values


def _positions(length: int) -> slice:
    return slice(None, None, -(-length // _POSITIONS))


def repaired(
    table: Table,
    limit: int,
    weigh: Callable[[str, Any], float],
    judged: Callable[[Mapping[str, str]], Tensor],
    tries: int = TRIES,
) -> tuple[dict[str, str], Tensor]:
    """Return a choice at least as good on held-out rows as that of the estimates, and its divergences.

    Args:
        table: options by layer.
        limit: bytes of all.
        weigh: estimated harm of a layer's option.
        judged: divergences of a choice on held-out rows.
        tries: how many choices may be judged.
    """
    factor = dict.fromkeys(table, 1.0)
    best = cheapest(table, limit, weigh)
    least = judged(best)
    harm = {name: next(weigh(name, o) for o in table[name] if o.name == best[name]) for name in table}
    roles = sorted(groups_of(list(table)), key=lambda names: -sum(harm[n] for n in names))
    moves = [(names, step) for names in roles for step in (_FACTOR, 1 / _FACTOR)]
    with progress_bar(total=tries, desc="judging choices") as progress:
        while moves and tries > 0:
            names, step = moves.pop(0)
            # A factor that changes nothing yet may do so at its square.
            for power in range(1, _POWERS + 1):
                tried = factor | {name: factor[name] * step**power for name in names}
                choice = cheapest(table, limit, lambda name, option, by=tried: by[name] * weigh(name, option))  # type: ignore[misc]
                if choice != best:
                    break
            else:
                continue
            found = judged(choice)
            tries -= 1
            progress.update()
            if better(found, least):
                best, least, factor = choice, found, tried
                # Further the same way, and not back.
                moves = [(names, step), *[m for m in moves if m[0] is not names]]
    return best, least


def groups_of(names: Sequence[str]) -> list[list[str]]:
    """Return layers by what they are within their block (the last part of the name that is no number), and by depth."""
    roles: dict[str, list[str]] = {}
    for name in names:
        role = next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)
        roles.setdefault(role, []).append(name)
    third = -(-len(names) // 3)
    depths = [list(names[:third]), list(names[-third:])] if len(names) > 3 else []
    return [group for group in [*roles.values(), *depths] if len(group) < len(names)]
