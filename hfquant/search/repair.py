"""End-to-end check of choices: judge them by the model's output on held-out rows, and look for better ones.

Estimates are off by factors that layers in the same role share: errors accumulate along the residual stream, and the
second-order approximation breaks down at some point. The factors are found by trial: scale the harm of a role up or
down, reallocate the budget, and keep the result if the output on held-out rows improves beyond noise.
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

#: Maximum number of choices to judge end to end, beyond those from the estimates.
TRIES = 12
#: Factor by which a role's estimated harm is scaled up or down.
_FACTOR = 3.0
_POWERS = 3
#: Maximum number of sequence positions to compare.
_POSITIONS = 128


@dataclass
class Judge:
    """Compares a model with replaced layers to the original.

    Attributes:
        model: in full precision.
        data: held-out samples.
        expected: the original model's output for each sample.
        is_distribution: whether outputs are logits over tokens or labels.
    """

    model: nn.Module
    data: Sequence[Any]
    expected: list[Tensor]
    is_distribution: bool

    @classmethod
    def of(cls, model: nn.Module, data: Sequence[Any]) -> Judge:
        """Create a judge by running the original model over the data."""
        with evaluating(model):
            expected = [_compared(main_tensor(forward(model, sample))) for sample in data]
        return cls(model, data, expected, is_distribution(model, expected[0]))

    def divergence(self, layers: Mapping[str, nn.Module]) -> Tensor:
        """Return how far ``layers`` shift the output, for each element of the batches, [n] float64.

        This is the mean KL divergence per token (or label) for distributions, and the relative squared error otherwise.
        Neither is negative, except by rounding errors, which are cut off.
        """
        originals = {name: self.model.get_submodule(name) for name in layers}
        try:
            replace_modules(self.model, {originals[name]: layer for name, layer in layers.items()})
            with evaluating(self.model):
                found = [self._apart(sample, before) for sample, before in zip(self.data, self.expected, strict=True)]
        finally:
            replace_modules(self.model, {layer: originals[name] for name, layer in layers.items()})
        return torch.cat(found).double().cpu().clamp(min=0)

    def _apart(self, sample: Any, before: Tensor) -> Tensor:
        output = main_tensor(forward(self.model, sample))
        mask = padding_mask(self.model, sample, output)
        mask = None if mask is None else mask[:, _positions(mask.shape[1])]
        return divergence(_compared(output), before, self.is_distribution, mask)


def _compared(output: Tensor) -> Tensor:
    """Return an output [batch, ...] in float32; long sequences are subsampled."""
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
    """Return a choice that is at least as good on held-out rows as the one from the estimates, and its divergences.

    Args:
        table: options by layer.
        limit: total bytes.
        weigh: returns the estimated harm of a layer's option.
        judged: returns the divergences of a choice on held-out rows.
        tries: maximum number of choices to judge.
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
            # If a factor changes nothing, its square or cube may.
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
                # Continue in the same direction, and do not go back.
                moves = [(names, step), *[m for m in moves if m[0] is not names]]
    return best, least


def groups_of(names: Sequence[str]) -> list[list[str]]:
    """Group layers by their role within a block (the last non-numeric part of the name), and by depth."""
    roles: dict[str, list[str]] = {}
    for name in names:
        role = next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)
        roles.setdefault(role, []).append(name)
    third = -(-len(names) // 3)
    depths = [list(names[:third]), list(names[-third:])] if len(names) > 3 else []
    return [group for group in [*roles.values(), *depths] if len(group) < len(names)]
