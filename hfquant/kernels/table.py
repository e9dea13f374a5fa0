"""Kernel table and dispatch: the first kernel that this machine can run, that is exact and that pays."""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from hfquant.kernels import cpu, dequantize, int_mm, reference, scaled_mm
from hfquant.kernels.base import Kernel, Product, product_of
from hfquant.kernels.triton import integer, weight_only

#: Every kernel, in order of preference; the last two compute every product.
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        integer.KERNEL,
        weight_only.KERNEL,
        scaled_mm.KERNEL,
        int_mm.CUDA,
        *cpu.KERNELS,
        int_mm.KERNEL,
        dequantize.KERNEL,
        reference.KERNEL,
    )
}
#: Environment variable that forces a kernel.
VARIABLE = "HFQUANT_KERNEL"


def pick(product: Product, device: str, dtype: torch.dtype, tokens: int, out: int) -> Kernel:
    """Return the kernel for a product of ``tokens`` input rows of ``dtype`` and ``out`` weight rows.

    Raises:
        ValueError: ``HFQUANT_KERNEL`` names no kernel, or one that cannot run here or cannot compute the product.
    """
    return _pick(product.key, device, dtype, tokens, out, os.environ.get(VARIABLE, ""))


@lru_cache(maxsize=4096)
def _pick(key: str, device: str, dtype: torch.dtype, tokens: int, out: int, forced: str) -> Kernel:
    product = product_of(key)
    if forced:
        return _forced(product, device, forced)
    return next(
        kernel
        for kernel in KERNELS.values()
        if not obstacle(kernel, product, device) and kernel.pays(product, dtype, tokens, out)
    )


def obstacle(kernel: Kernel, product: Product, device: str) -> str:
    """Return why ``kernel`` cannot compute a product on a device type of this machine; "" if it can."""
    if kernel.device not in ("", device):
        return f"it runs on {kernel.device}, not {device}"
    return kernel.missing() or kernel.refuses(product)


def _forced(product: Product, device: str, name: str) -> Kernel:
    if name not in KERNELS:
        raise ValueError(f"{VARIABLE}={name}: unknown kernel; available: {', '.join(KERNELS)}")
    kernel = KERNELS[name]
    if why := obstacle(kernel, product, device):
        raise ValueError(f"{VARIABLE}={name} cannot compute {product.key} here: {why}")
    return kernel
