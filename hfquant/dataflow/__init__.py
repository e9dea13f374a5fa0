"""Watch one forward pass of a model to find what feeds each linear and how its output is used."""

from hfquant.dataflow.scaling import Source
from hfquant.dataflow.source import obstacles_in_source
from hfquant.dataflow.trace import LinearTrace, PatternError, failure, trace

__all__ = ["LinearTrace", "PatternError", "Source", "failure", "obstacles_in_source", "trace"]
