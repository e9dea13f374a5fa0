"""Triton device code. All of it also runs in Triton's interpreter (``TRITON_INTERPRET=1``, on CPU tensors).

It therefore uses no libdevice. Exact divisions use ``tl.div_rn``: ``/`` is approximate on CUDA.
"""
