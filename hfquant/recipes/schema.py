"""The strict schema of a recipe, from which recipes/recipe.schema.json is generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from hfquant.affiner.config import AffinerConfig
from hfquant.affiner.config import parse as parse_affiner
from hfquant.calibration import BaseSampler, LanguageModelSampler, NormalSampler, UniformSampler
from hfquant.calibration.streams import holds_set, parse_spec
from hfquant.config import QuantRules, parse
from hfquant.integrations.config import HfQuantConfig
from hfquant.integrations.skeleton import MODEL
from hfquant.schema import ConfigError, Section, validated

SAMPLERS: dict[str, type[BaseSampler]] = {
    "uniform": UniformSampler,
    "normal": NormalSampler,
    "base": BaseSampler,
    "language": LanguageModelSampler,
}
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def _bytes(value: Any) -> Any:
    """Turn "6.9 GB" into bytes."""
    number, _, unit = value.partition(" ") if isinstance(value, str) else ("", "", "")
    try:
        return round(float(number) * _UNITS[unit])
    except (ValueError, KeyError):
        raise ValueError(f'expected a size such as "6.9 GB" ({", ".join(_UNITS)}), got {value!r}') from None


class Expected(Section):
    """Expected result of quantizing a component, by the published config.

    Attributes:
        size: bytes of the component's tensors, written as "6.9 GB".
        share: quantized fraction of the parameters in matrices, excluding embeddings and output head.
    """

    size: Annotated[int, BeforeValidator(_bytes)]
    share: float = Field(gt=0, le=1)


class ComponentRecipe(Section):
    """How one component is quantized.

    Attributes:
        config: name of a preset, or a config dict.
        override: config entries by glob, applied after those of `config`.
        skip: globs of layers that stay in full precision, each with a reason.
        per_layer_mode: solve layers in order, each on the outputs of the quantized layers before it.
        expected: expected result for the first of the recipe's models.
    """

    config: str | dict[str, Any]
    override: dict[str, dict[str, Any]] = Field(default_factory=dict)
    skip: dict[str, str] = Field(default_factory=dict)
    per_layer_mode: bool = False
    expected: Expected | None = None

    @model_validator(mode="after")
    def _usable(self) -> ComponentRecipe:
        self.rules()
        return self

    def rules(self) -> QuantRules:
        """Return the validated config, overrides and skipped layers included."""
        off = {glob: {"enable": False} for glob in self.skip}
        return QuantRules({**parse(self.config).raw, **self.override, **off})

    def quant_config(self) -> HfQuantConfig:
        """Return the config object that `quantize` and `from_pretrained` accept."""
        return HfQuantConfig(self.rules().raw, per_layer_mode=self.per_layer_mode)


class SamplerRecipe(Section):
    """Selects which steps of a pipeline's runs become samples; see :mod:`hfquant.calibration.samplers`."""

    type: Literal["uniform", "normal", "base"] = "uniform"
    timesteps: int | None = Field(10, ge=1)
    mean: float | None = None
    std: float | None = None
    seed: int = Field(0, ge=0)

    def sampler(self) -> BaseSampler:
        """Return the sampler."""
        options = self.model_dump(exclude={"type"}, exclude_none=True) | {"timesteps": self.timesteps}
        return SAMPLERS[self.type](**options)

    @model_validator(mode="after")
    def _options_fit(self) -> SamplerRecipe:
        if self.type != "normal" and (self.mean, self.std) != (None, None):
            raise ValueError(f"mean and std belong to the normal sampler, not to {self.type}")
        self.sampler()
        return self


class CalibrationRecipe(Section):
    """The calibration data.

    Attributes:
        data: a dataset, with the fields of :class:`~hfquant.calibration.streams.StreamSpec`; None if the model or
            pipeline makes its own.
        sampler: sampler of timesteps, for pipelines.
        call: arguments of each call of a pipeline.
    """

    data: dict[str, Any] | None = None
    sampler: SamplerRecipe = SamplerRecipe()
    call: dict[str, Any] = Field(default_factory=dict)

    @field_validator("data")
    @classmethod
    def _is_stream(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            parse_spec(value)
        return value

    @property
    def recorded(self) -> str | None:
        """The path of the calibration set that `data` names; None if it names anything else."""
        dataset = (self.data or {}).get("dataset")
        return dataset if isinstance(dataset, str) and holds_set(dataset) else None


class Recipe(Section):
    """One recipe.

    Attributes:
        title: one-line description.
        models: hub ids that the recipe is meant for, starting with the one that `expected` describes.
        loads: class that they load as, a pipeline or a model.
        components: components by name; a model that is not a pipeline has only "model".
        calibration: the calibration data; None if no component needs any.
        affiner: config of an affiner to fit afterwards; for pipelines.
    """

    title: str
    models: tuple[str, ...] = Field(min_length=1, strict=False)
    loads: str
    components: dict[str, ComponentRecipe] = Field(min_length=1)
    calibration: CalibrationRecipe | None = None
    affiner: dict[str, Any] | None = None

    @field_validator("affiner")
    @classmethod
    def _is_affiner(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            parse_affiner(value)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        pipeline = self.is_pipeline
        if not pipeline and list(self.components) != [MODEL]:
            raise ValueError(f'{self.loads} is not a pipeline: its only component is "{MODEL}"')
        if not pipeline and self.affiner is not None:
            raise ValueError(f"affiner: {self.loads} is not a diffusion pipeline")
        if pipeline and self.calibration is not None and self.calibration.recorded is not None:
            raise ValueError(
                f"{self.calibration.recorded} is a calibration set, but a pipeline is calibrated on prompts or other "
                "arguments of its call: name those, or pass the set and the component to hfquant.quantize in Python"
            )
        if self.affiner is not None and (self.calibration is None or self.calibration.data is None):
            raise ValueError("affiner: fitting one needs calibration data")
        return self

    @property
    def is_pipeline(self) -> bool:
        """Whether its models are diffusion pipelines."""
        return self.loads.endswith("Pipeline")

    def affiner_config(self) -> AffinerConfig | None:
        """Return the validated affiner config."""
        return None if self.affiner is None else parse_affiner(self.affiner)


def parsed(content: Any, where: str = "recipe") -> Recipe:
    """Validate a recipe's content.

    Raises:
        ConfigError: the content is invalid; the message names the key, the value and what is allowed.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: expected a mapping with {', '.join(Recipe.model_fields)}")
    return validated(Recipe, dict(content), where)
