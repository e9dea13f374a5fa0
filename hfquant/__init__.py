"""hfquant: calibrated post-training quantization for Hugging Face models."""
