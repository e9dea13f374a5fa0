"""Quantization algorithms: pure functions on tensors. Nothing here knows of modules, hooks or Hugging Face."""
