"""Calibration data that a model makes itself: what may be asked for, and the drawing of tokens and noise.

What a model was trained on shows in what it writes (arXiv 2410.17170), so tokens are drawn at temperature 1 from all of
the distribution: a lower one, or a cut tail, would repeat a few phrases and leave out the rare tokens whose activations
have to be covered. Each row has a random stream of its own, so a window depends on its seed and its number alone.
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

SELF = "self"
#: Windows kept for checking: of the same seed, and of the one after it.
HELD_OUT = 2

_Positive = Annotated[int, Field(gt=0)]


class SelfSpec(BaseModel):
    """What a model is to make: `"self"`, or `{"source": "self", ...}`.

    Attributes:
        source: always "self".
        seed: of every draw; equal seeds give equal data.
        samples: windows of tokens, pictures or sounds, a pipeline's runs; None for the kind's own default.
        seqlen: tokens a window, capped by the model's limit; None for 512, and where there are none.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    source: Literal["self"] = "self"
    seed: Annotated[int, Field(ge=0)] = 0
    samples: _Positive | None = None
    seqlen: _Positive | None = None

    @classmethod
    def of(cls, calibration: Any) -> SelfSpec | None:
        """Return what ``calibration`` asks a model to make; None where it is data of another source.

        Raises:
            CalibrationError: an unknown key or a wrong value beside ``"source": "self"``.
        """
        if isinstance(calibration, str) and calibration == SELF:
            return cls()
        if not isinstance(calibration, Mapping) or "source" not in calibration:
            return None
        try:
            return cls.model_validate(dict(calibration))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise CalibrationError(
                f"calibration[{key!r}]: {first['msg']}; beside 'source': 'self' there may be seed, samples and seqlen"
            ) from None

    def settled(self, samples: int, seqlen: int | None = None) -> SelfSpec:
        """Return the same with what is really made in place of defaults and limits."""
        return SelfSpec(seed=self.seed, samples=samples, seqlen=seqlen)

    def to_dict(self) -> dict[str, Any]:
        """Return it as a config stores it; :meth:`of` reads it back."""
        return self.model_dump(exclude_none=True)


@dataclass(frozen=True)
class SelfMade(Iterable[Any]):
    """Batches that a model made, to calibrate on and to check on.

    Attributes:
        batches: to calibrate on; a sized iterable that starts anew.
        held_out: other ones, of the same seed and of another.
        spec: what was asked for, defaults filled in: enough to make them again.
    """

    batches: Any
    held_out: Sequence[Any]
    spec: SelfSpec

    @property
    def provenance(self) -> dict[str, Any]:
        """What the data is, as JSON."""
        return self.spec.model_dump(exclude_none=True)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def seed_of(*entropy: int) -> int:
    """Return a seed of 64 bits made of several numbers."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def generator(*entropy: int) -> torch.Generator:
    """Return a random stream of its own for each ``entropy``."""
    return torch.Generator().manual_seed(seed_of(*entropy))


def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw one token a row from softmax(logits), [rows, vocabulary] to [rows] int64, each by its own generator.

    Of exponential waiting times with the probabilities as rates, the shortest is a token's with its probability.
    """
    waits = torch.stack([torch.empty(logits.shape[1]).exponential_(generator=g) for g in generators])
    return (logits.float().cpu().softmax(1) / waits).argmax(1)


def random_ids(ordinary: Tensor, length: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw tokens evenly from ``ordinary`` [tokens], [rows, length] int64."""
    return torch.stack([ordinary[torch.randint(len(ordinary), (length,), generator=g)] for g in generators])


def fill_masks(
    ids: Tensor,
    masked: Tensor,
    predict: Callable[[Tensor], Tensor],
    generators: Sequence[torch.Generator],
    rounds: int = 8,
) -> Tensor:
    """Fill masked tokens in a random order, a share of them a round, each round seeing what those before it filled.

    Args:
        ids: [rows, length] with the mask token where ``masked``.
        masked: [length] bool, the same in all rows.
        predict: ids to logits [rows, length, vocabulary].
        generators: one a row.
        rounds: calls of ``predict``.
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
    """Return Gaussian noise of mean 0 and deviation 1 whose amplitude falls as 1 / frequency, float32 of ``shape``.

    So do the spectra of natural pictures and sounds (Field, Relations between the statistics of natural images and the
    response properties of cortical cells, J. Opt. Soc. Am. A 4, 1987); white noise has no edges and no shapes.

    Args:
        shape: of the result.
        axes: how many of the last dimensions are space or time.
        source: of randomness.
    """
    sizes = tuple(shape[len(shape) - axes :])
    dims = tuple(range(-axes, 0))
    white = torch.fft.fftn(torch.randn(tuple(shape), generator=source), dim=dims)
    grids = torch.meshgrid(*(torch.fft.fftfreq(n) for n in sizes), indexing="ij")
    frequency = torch.stack(grids).square().sum(0).sqrt()
    noise = torch.fft.ifftn(white / frequency.clamp(min=1 / max(sizes)), dim=dims).real
    return (noise - noise.mean(dims, keepdim=True)) / noise.std(dims, correction=0, keepdim=True).clamp(min=1e-6)
