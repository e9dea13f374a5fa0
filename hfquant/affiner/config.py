"""The affiner's config: what to fit, on which runs, and how. It is validated once and stored as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hfquant.schema import Section, validated


class StepperConfig(Section):
    """The runs that the affiner is fitted on.

    Attributes:
        max_timestep: Denoising steps of each run (`num_inference_steps`). None: the pipeline's own default, 50 for a
            bare denoiser.
        sample_size: Number of dataset samples to fit on; None for all (an endless stream needs a number).
        batch_size: Samples per pipeline call.
        recurrent: Fit step t on the latents that the quantized model reaches with the corrections of earlier steps. All
            samples run side by side; their latents and conditioning stay in memory until the end. Otherwise, fit every
            step on the real model's own trajectory, batch after batch.
        noise_target: What to correct: "all" is the guided prediction passed to the scheduler; "uncond" or "text" is
            that half of the denoiser's batch, which requires classifier-free guidance in one batch.
        enable_latent_affine: Also fit and apply a map from the latents after each step to those of the real model's own
            run from the same noise. It removes drift, which a correction of predictions cannot see. This takes one more
            run of the real model and needs `recurrent`.
        enable_timesteps: Indices of the steps to correct, 0 being the first and noisiest; the others keep the identity.
            None for all.
        seed: Seed of the initial noise and of the shuffle.
    """

    max_timestep: int | None = Field(None, ge=1)
    sample_size: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)
    recurrent: bool = True
    noise_target: Literal["all", "uncond", "text"] = "all"
    enable_latent_affine: bool = False
    enable_timesteps: tuple[int, ...] | None = Field(None, strict=False)  # JSON only has lists
    seed: int = Field(0, ge=0)

    @field_validator("enable_timesteps")
    @classmethod
    def _step_numbers(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or min(value) < 0):
            raise ValueError(f"expected None or a non-empty list of step numbers >= 0, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _needs_recurrent(self) -> StepperConfig:
        if self.enable_latent_affine and not self.recurrent:
            raise ValueError("enable_latent_affine=true needs recurrent=true: it corrects the quantized model's drift")
        return self


class SolverConfig(Section):
    """How to fit the maps of type "blockwise"; see :func:`hfquant.affiner.solvers.objective`.

    Attributes:
        type: "mserel", a blend of squared error and relative squared error.
        blocksize: Side, in latent pixels, of the square blocks that share K and b; None for one block per channel.
        alpha: Weight of the absolute error, from 0 to 1; the rest goes to the relative error.
        lambda1: Ridge on (K - 1)^2.
        lambda2: Ridge on b^2.
        sample_mode: "block" for maps constant on blocks; "interpolate" for maps fitted and applied with bilinear
            interpolation between block centers.
        percentile: Threshold for limiting, a percentile of |K - 1| over the blocks of a timestep.
        greater: Limit the blocks above the threshold; if false, limit the others.
        scale: Factor for the distance of a limited block from the identity (K - 1 and b); 1 disables limiting. If
            limited nodes of "interpolate" do worse than no correction, the timestep gets no correction.
    """

    type: Literal["mserel"] = "mserel"
    blocksize: int | None = Field(8, ge=1)
    alpha: float = Field(0.5, ge=0.0, le=1.0)
    lambda1: float = Field(0.1, ge=0.0)
    lambda2: float = Field(0.1, ge=0.0)
    sample_mode: Literal["block", "interpolate"] = "block"
    percentile: float = Field(100.0, ge=0.0, le=100.0)
    greater: bool = True
    scale: float = Field(1.0, ge=0.0, le=1.0)


class BlocksConfig(Section):
    """Alignment of the denoiser's own blocks, fitted before the predictions; see :mod:`hfquant.affiner.blocks`.

    Attributes:
        modules: Globs on module names of the denoiser, such as "transformer_blocks.*". If a glob matches nested
            modules, only the outermost counts.
        timesteps: Number of evenly spread steps of each run whose denoiser calls are used.
        alpha, lambda1, lambda2: As in the solver.
    """

    modules: tuple[str, ...] = Field(min_length=1, strict=False)
    timesteps: int = Field(5, ge=1)
    alpha: float = Field(0.5, ge=0.0, le=1.0)
    lambda1: float = Field(0.01, ge=0.0)
    lambda2: float = Field(0.01, ge=0.0)


class AffinerConfig(Section):
    """The complete config.

    Attributes:
        type: "blockwise"; "ptqd" and "tac" are baselines (see :mod:`hfquant.affiner.maps`). "tac" also corrects the
            mean of the latents after each step if `recurrent` is set.
        stepper: The runs.
        solver: The fit; only for type "blockwise".
        blocks: Block alignment; None for none.
        extra_args: Keyword arguments for every call of the pipeline or bare denoiser.
    """

    type: Literal["blockwise", "ptqd", "tac"] = "blockwise"
    stepper: StepperConfig = StepperConfig()
    solver: SolverConfig = SolverConfig()
    blocks: BlocksConfig | None = None
    extra_args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fields_fit_type(self) -> AffinerConfig:
        if self.type != "blockwise":
            if self.solver != SolverConfig():
                raise ValueError(f'solver has no effect on type "{self.type}"; leave it out or use type "blockwise"')
            if self.stepper.enable_latent_affine:
                raise ValueError(f'stepper.enable_latent_affine needs type "blockwise", not "{self.type}"')
        if self.stepper.max_timestep is not None and "num_inference_steps" in self.extra_args:
            raise ValueError("stepper.max_timestep and extra_args.num_inference_steps are the same; give one")
        return self

    def to_json(self) -> dict[str, Any]:
        """Return the config in JSON types, omitting `extra_args` that JSON cannot represent."""
        dumped = self.model_dump(mode="json", exclude={"extra_args"})
        return dumped | {"extra_args": {k: v for k, v in self.extra_args.items() if _is_json(v)}}


def parse(config: AffinerConfig | Mapping[str, Any]) -> AffinerConfig:
    """Validate a config dict without modifying it.

    Raises:
        ConfigError: Unknown key, bad value or impossible combination; the message names it and the allowed values.
        TypeError: `config` is not a dict.
    """
    if isinstance(config, AffinerConfig):
        return config
    if not isinstance(config, Mapping):
        raise TypeError(f"an affiner's config is a dict, got {type(config).__name__}")
    return validated(AffinerConfig, dict(config), "config")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
