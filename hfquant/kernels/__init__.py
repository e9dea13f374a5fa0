"""Matrix products on quantized codes: the op behind a quantized layer, the kernel table and the kernels."""
