"""Kernels for CUDA devices in Triton: host code here, what runs on the device in :mod:`.programs`.

``programs`` imports triton, which not every machine has and which takes a while: host code imports it when it runs.
"""
