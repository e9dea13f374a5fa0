"""Self-generated calibration data: the user's request, and the sampling of tokens and noise.

A model's own output reflects its training data (arXiv 2410.17170), so tokens are sampled at temperature 1 from the full
distribution. A lower temperature or a truncated tail would repeat a few phrases and leave out rare tokens, whose
activations calibration must cover. Each row has its own random stream, so a window depends only on its seed and number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from hfquant.calibration.batches import CalibrationError
from hfquant.schema import explained

SELF = "self"
#: Windows held out for checks: this many from the same seed, and this many from the next seed.
HELD_OUT = 2

_Positive = Annotated[int, Field(gt=0)]


class SelfSpec(BaseModel):
    """A request for self-generated data: `"self"`, or `{"source": "self", ...}`.

    Attributes:
        source: always "self".
        seed: seed of every draw; equal seeds give equal data.
        samples: number of token windows, images, sounds or pipeline runs; None for the default of the kind.
        seqlen: tokens per window, capped by the model's limit; None for 512, or if the data has no tokens.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    source: Literal["self"] = "self"
    seed: Annotated[int, Field(ge=0)] = 0
    samples: _Positive | None = None
    seqlen: _Positive | None = None

    @classmethod
    def of(cls, calibration: Any) -> SelfSpec | None:
        """Return the request that ``calibration`` makes; None if it is data from another source.

        Raises:
            CalibrationError: an unknown key or an invalid value next to ``"source": "self"``.
        """
        if isinstance(calibration, str) and calibration == SELF:
            return cls()
        if not isinstance(calibration, Mapping) or "source" not in calibration:
            return None
        try:
            return cls.model_validate(dict(calibration))
        except ValidationError as error:
            raise CalibrationError(explained(error, cls, "calibration")) from None

    def settled(self, samples: int, seqlen: int | None = None) -> SelfSpec:
        """Return a copy with the actual values in place of defaults and limits."""
        return SelfSpec(seed=self.seed, samples=samples, seqlen=seqlen)

    def to_dict(self) -> dict[str, Any]:
        """Return the form stored in a config; :meth:`of` reads it back."""
        return self.model_dump(exclude_none=True)


@dataclass(frozen=True)
class SelfMade(Iterable[Any]):
    """Batches that a model generated, for calibration and for checks.

    Attributes:
        batches: for calibration; a sized iterable that can be iterated repeatedly.
        held_out: other batches, of the same seed and of another.
        spec: the request with defaults filled in, enough to generate the batches again.
    """

    batches: Any
    held_out: Sequence[Any]
    spec: SelfSpec

    @property
    def provenance(self) -> dict[str, Any]:
        """Description of the data, as JSON."""
        return self.spec.model_dump(exclude_none=True)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def seed_of(*entropy: int) -> int:
    """Return a 64-bit seed derived from several numbers."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def generator(*entropy: int) -> torch.Generator:
    """Return a separate random stream for each ``entropy``."""
    return torch.Generator().manual_seed(seed_of(*entropy))


def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw one token per row from softmax(logits), [rows, vocabulary] to [rows] int64, each with its own generator.

    Each token waits for an exponentially distributed time whose rate is its probability; the probability that it is the
    first to arrive is that probability too.
    """
    waits = torch.stack([torch.empty(logits.shape[1]).exponential_(generator=g) for g in generators])
    return (logits.float().cpu().softmax(1) / waits).argmax(1)


def random_ids(ordinary: Tensor, length: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw tokens uniformly from ``ordinary`` [tokens], [rows, length] int64."""
    return torch.stack([ordinary[torch.randint(len(ordinary), (length,), generator=g)] for g in generators])


def fill_masks(
    ids: Tensor,
    masked: Tensor,
    predict: Callable[[Tensor], Tensor],
    generators: Sequence[torch.Generator],
    rounds: int = 8,
) -> Tensor:
    """Fill masked tokens in random order, a fraction per round; each round sees the tokens filled in earlier rounds.

    Args:
        ids: [rows, length], with the mask token where ``masked``.
        masked: [length] bool, the same for all rows.
        predict: maps ids to logits [rows, length, vocabulary].
        generators: one per row.
        rounds: number of calls of ``predict``.
    """
    ids = ids.clone()
    places = masked.nonzero()[:, 0]
    orders = torch.stack([places[torch.randperm(len(places), generator=g)] for g in generators])
    for columns in orders.chunk(rounds, dim=1):
        logits = predict(ids)
        for column in columns.unbind(1):
            rows = torch.arange(len(ids))
            ids[rows, column] = draw(logits[rows.to(logits.device), column.to(logits.device)], generators)
    return ids


def pink_noise(shape: Sequence[int], axes: int, source: torch.Generator) -> Tensor:
    """Return Gaussian noise with mean 0 and std 1 whose amplitude falls as 1 / frequency, float32 of ``shape``.

    Natural images and sounds have such spectra (Field, Relations between the statistics of natural images and the
    response properties of cortical cells, J. Opt. Soc. Am. A 4, 1987); white noise has no edges and no shapes.

    Args:
        shape: shape of the result.
        axes: number of trailing dimensions that are space or time.
        source: random generator.
    """
    sizes = tuple(shape[len(shape) - axes :])
    dims = tuple(range(-axes, 0))
    white = torch.fft.fftn(torch.randn(tuple(shape), generator=source), dim=dims)
    grids = torch.meshgrid(*(torch.fft.fftfreq(n) for n in sizes), indexing="ij")
    frequency = torch.stack(grids).square().sum(0).sqrt()
    noise = torch.fft.ifftn(white / frequency.clamp(min=1 / max(sizes)), dim=dims).real
    return (noise - noise.mean(dims, keepdim=True)) / noise.std(dims, correction=0, keepdim=True).clamp(min=1e-6)
