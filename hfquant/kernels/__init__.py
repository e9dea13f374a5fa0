"""Products on codes and scales: the op that runs a quantized layer, the table of kernels, and the kernels."""
