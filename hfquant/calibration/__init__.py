"""Calibration data: samplers that run a model, recorded layer inputs, and streams of model inputs."""

from hfquant.calibration.calibset import BaseCalibSet, load_calibrate_set
from hfquant.calibration.generate import generate_calibrate_set
from hfquant.calibration.samplers import BaseSampler, LanguageModelSampler, NormalSampler, UniformSampler
from hfquant.calibration.storage import CalibSetError
from hfquant.calibration.streams import calibration_batches

__all__ = [
    "BaseCalibSet",
    "BaseSampler",
    "CalibSetError",
    "LanguageModelSampler",
    "NormalSampler",
    "UniformSampler",
    "calibration_batches",
    "generate_calibrate_set",
    "load_calibrate_set",
]
