"""Triton kernels for CUDA devices: host code here, device code in :mod:`.programs`.

``programs`` imports triton, which is slow to import and not always installed: host code imports it only when it runs.
"""
