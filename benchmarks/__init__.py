"""Benchmarks of quality, memory and speed, side by side with peers; run each one as ``python -m benchmarks.NAME``."""
