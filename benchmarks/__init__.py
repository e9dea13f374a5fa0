"""Benchmarks of quality, memory and speed, next to peer libraries; run each as ``python -m benchmarks.NAME``."""
