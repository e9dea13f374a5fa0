"""The modules that quantized layers become."""
