"""The affiner: per-timestep affine maps that align a quantized denoiser with the real one."""
