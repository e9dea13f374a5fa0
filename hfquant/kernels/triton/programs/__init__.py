"""Device code in Triton. All of it runs in Triton's interpreter too (``TRITON_INTERPRET=1``, on CPU tensors).

So it uses no libdevice. Where a result is to be exact it divides by ``tl.div_rn``: ``/`` is an approximation on CUDA.
"""
