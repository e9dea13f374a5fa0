"""What quantization did, for people to read."""

from hfquant.report.layers import LayerReport, QuantReport

__all__ = ["LayerReport", "QuantReport"]
