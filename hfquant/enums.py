"""The names that a config accepts, as enums."""

from __future__ import annotations

from enum import Enum, EnumMeta
from typing import TYPE_CHECKING, Any

from hfquant.algorithms import ROUNDINGS, TRANSFORMS
from hfquant.formats import FORMATS


class _TableMeta(EnumMeta):
    if TYPE_CHECKING:  # the members are generated from a table

        def __getattr__(cls, name: str) -> Any: ...


class _NamedEnum(str, Enum, metaclass=_TableMeta):
    """A string enum whose values are its names in lower case; lookup ignores case."""

    @classmethod
    def _missing_(cls, value: object) -> Enum | None:
        return cls.__members__.get(value.upper()) if isinstance(value, str) else None

    def __str__(self) -> str:
        return str(self.value)


class DType(_NamedEnum):
    """Number formats for weights and activations: the names of :data:`hfquant.formats.FORMATS`."""

    _ignore_ = "_name"
    for _name in FORMATS:
        vars()[_name.upper()] = _name


class Optimum(_NamedEnum):
    """How a layer is transformed before quantization: the names of :data:`hfquant.algorithms.TRANSFORMS`."""

    _ignore_ = "_name"
    for _name in TRANSFORMS:
        vars()[_name.upper()] = _name


class Calibrate(_NamedEnum):
    """How weight codes are chosen: the names of :data:`hfquant.algorithms.ROUNDINGS`."""

    _ignore_ = "_name"
    for _name in ROUNDINGS:
        vars()[_name.upper()] = _name


class SegPattern(_NamedEnum):
    """Dataflow patterns around a linear that :mod:`hfquant.dataflow` detects."""

    LINEAR2CHUNK = "linear2chunk"
    LINEAR2SPLIT = "linear2split"
    CONCAT2LINEAR = "concat2linear"
    STACK2LINEAR = "stack2linear"
    RESHAPE2LINEAR = "reshape2linear"
    ACTIVATION2LINEAR = "activation2linear"

    @classmethod
    def all(cls) -> list[SegPattern]:
        """Return all patterns, those for segments and the one for dual scale."""
        return list(cls)

    @classmethod
    def seg(cls) -> list[SegPattern]:
        """Return the patterns that split a layer into segments: all but ACTIVATION2LINEAR."""
        return [p for p in cls if p is not cls.ACTIVATION2LINEAR]
