"""Number formats and quantization grids. To add a format, add one file and one line to :data:`FORMATS`."""

from __future__ import annotations

import torch

from hfquant.formats.base import MIN_SCALE, NumberFormat
from hfquant.formats.columns import amax_columns, expand_columns, range_columns, split_columns, sum_columns
from hfquant.formats.floating import CastFormat, FloatFormat
from hfquant.formats.grid import Grid, GridRule
from hfquant.formats.inputs import InputRule
from hfquant.formats.integer import IntegerFormat
from hfquant.schema import ConfigError

__all__ = [
    "FORMATS",
    "MIN_SCALE",
    "CastFormat",
    "Grid",
    "GridRule",
    "InputRule",
    "NumberFormat",
    "amax_columns",
    "expand_columns",
    "number_format",
    "range_columns",
    "split_columns",
    "sum_columns",
]

#: All number formats, by their name in configs.
FORMATS: dict[str, NumberFormat] = {
    "int2": IntegerFormat("int2", 2, torch.int8),
    "int3": IntegerFormat("int3", 3, torch.int8),
    "int4": IntegerFormat("int4", 4, torch.int8),
    "int5": IntegerFormat("int5", 5, torch.int8),
    "int6": IntegerFormat("int6", 6, torch.int8),
    "int7": IntegerFormat("int7", 7, torch.int8),
    "int8": IntegerFormat("int8", 8, torch.int8),
    "int16": IntegerFormat("int16", 16, torch.int16),
    "fp8e4m3": FloatFormat("fp8e4m3", 8, torch.int8, torch.float8_e4m3fn),
    "fp8e5m2": FloatFormat("fp8e5m2", 8, torch.int8, torch.float8_e5m2),
    "fp16": CastFormat("fp16", 16, torch.int16, torch.float16),
    "bf16": CastFormat("bf16", 16, torch.int16, torch.bfloat16),
}


def number_format(name: str) -> NumberFormat:
    """Return the format with the given name.

    Raises:
        ConfigError: there is no such format.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise ConfigError(f"unknown number format {name!r}; available: {', '.join(FORMATS)}") from None
