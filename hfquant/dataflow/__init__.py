"""Watch one forward of a model and read off what feeds each linear and what its output becomes."""

from hfquant.dataflow.scaling import Source
from hfquant.dataflow.source import obstacles_in_source
from hfquant.dataflow.trace import LinearTrace, PatternError, failure, trace

__all__ = ["LinearTrace", "PatternError", "Source", "failure", "obstacles_in_source", "trace"]
