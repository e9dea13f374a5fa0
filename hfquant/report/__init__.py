"""Human-readable reports of what quantization did."""

from hfquant.report.layers import LayerReport, QuantReport

__all__ = ["LayerReport", "QuantReport"]
