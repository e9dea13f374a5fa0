"""Quantized modules, the replacements for float layers."""
