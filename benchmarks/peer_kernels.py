"""The peers in speed benchmarks: their dtypes, and two peers that are measured for speed only.

These two are auto-round-lib (ARK) and zentorch, with weights rounded to nearest. Each replaces the linears of
:func:`benchmarks.models.quantizable_linears` by modules that call the library's own op on weights packed by the library
itself. ARK's products take float32 (its own module casts other dtypes to it). zentorch's 4-bit product takes only
bfloat16. A zentorch release works with only one minor version of torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import quantizable_linears
from benchmarks.peers import GROUP_SIZE, PEERS, Batches, Peer


def _rounded(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, int]:
    """Return codes [out, in] int8, scales [out, groups] float32, and the width of a group."""
    rows, columns = weight.shape
    group = columns if bits == 8 else GROUP_SIZE
    blocks = weight.detach().float().view(rows, -1, group)
    scale = blocks.abs().amax(-1) / (2 ** (bits - 1) - 1)
    codes = (blocks / scale.unsqueeze(-1)).round().to(torch.int8)
    return codes.view(rows, columns), scale, group


class ArkLinear(nn.Module):
    """A linear on ARK's weight-only product, which quantizes activations if it computes in int8."""

    def __init__(self, linear: nn.Linear, bits: int, compute: str) -> None:
        import auto_round_kernel

        super().__init__()
        codes, scale, group = _rounded(linear.weight, bits)
        layout = (group, compute, f"int{bits}", "fp32", False)
        zero_point = torch.empty(0, dtype=torch.int8)
        packed = auto_round_kernel.repack_quantized_weight(
            codes.T.contiguous(), scale.T.contiguous(), zero_point, *layout
        )
        self.register_buffer("packed", packed)
        self.register_buffer("bias", torch.empty(0) if linear.bias is None else linear.bias.detach().float())
        self.product, self.layout = auto_round_kernel.woqgemm, (linear.out_features, linear.in_features, *layout)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] to [..., out] of the same dtype."""
        y = self.product(x.reshape(-1, x.shape[-1]).float(), self.packed, self.bias, *self.layout)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


class ZenLinear(nn.Module):
    """A linear on zentorch's ops: int8 weights with per-token dynamic activations, or int4 weights in bfloat16."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        import zentorch  # noqa: F401

        super().__init__()
        ops: Any = torch.ops.zentorch
        codes, scale, _ = _rounded(linear.weight, bits)
        if bits == 8:
            packed, scale = ops.zentorch_weight_prepack_for_dynamic_qlinear(codes), scale.squeeze(1)
        else:
            packed = ops.zentorch_woq_repack_weight(codes).T
            scale = scale.T.contiguous().to(linear.weight.dtype)
        self.bits, self.ops = bits, ops
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] to [..., out] of the same dtype."""
        rows = x.reshape(-1, x.shape[-1])
        if self.bits == 8:
            y = self.ops.zentorch_dynamic_qlinear(rows, self.packed, self.scale, self.bias, is_weight_prepacked=True)
        else:
            y = self.ops.zentorch_woq_linear(rows, self.packed, self.scale, None, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])


def _replacing(make: Any, *options: Any) -> Peer:
    @torch.no_grad()
    def apply(model: nn.Module, batches: Batches) -> nn.Module:
        for name, linear in quantizable_linears(model).items():
            model.set_submodule(name, make(linear, *options))
        return model

    return apply


#: By ``<kind>/<peer>``, as in :data:`benchmarks.peers.PEERS`. Rounded to nearest, so quality tables leave them out.
PEER_KERNELS: dict[str, Peer] = {
    "w8a8/ark": _replacing(ArkLinear, 8, "int8"),
    "w8a16/ark": _replacing(ArkLinear, 8, "fp32"),
    "w4a8/ark": _replacing(ArkLinear, 4, "int8"),
    "w4a16/ark": _replacing(ArkLinear, 4, "fp32"),
    "w4a16/ark-bf16": _replacing(ArkLinear, 4, "bf16"),
    "w8a8/zentorch": _replacing(ZenLinear, 8),
    "w4a16/zentorch": _replacing(ZenLinear, 4),
}
ALL_PEERS = {**PEERS, **PEER_KERNELS}

#: Model dtypes in which a peer's speed is measured: those that it supports and is meant for.
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "w8a8/torchao": (torch.float32, torch.bfloat16),
    "w8a16/torchao": (torch.float32, torch.bfloat16),
    "w4a16/torchao": (torch.bfloat16,),
    "w8a16/quanto": (torch.float32, torch.bfloat16),
    "w4a16/quanto": (torch.bfloat16,),
    "w8a8/sdnq": (torch.float32, torch.bfloat16),
    "w4a8/sdnq": (torch.float32, torch.bfloat16),
    "w8a8/ark": (torch.float32,),
    "w4a8/ark": (torch.float32,),
    "w8a16/ark": (torch.float32,),
    "w4a16/ark": (torch.float32,),
    "w4a16/ark-bf16": (torch.float32,),
    "w8a8/zentorch": (torch.float32, torch.bfloat16),
    "w4a16/zentorch": (torch.bfloat16,),
}
_PACKAGES = {
    "torchao": "torchao",
    "quanto": "optimum.quanto",
    "sdnq": "sdnq",
    "ark": "auto_round_kernel",
    "zentorch": "zentorch",
}


def peer_rows() -> dict[str, tuple[str, torch.dtype]]:
    """Return the peers' rows in speed tables: row name -> name of the peer and dtype of the model."""
    rows = {}
    for name, dtypes in _DTYPES.items():
        kind, _, peer = name.partition("/")
        for dtype in dtypes:
            rows[f"{peer} {kind.upper()}{', bf16' if dtype == torch.bfloat16 else ''}"] = (name, dtype)
    return rows


def missing(row: str) -> str:
    """Return what a row needs that this machine lacks, else ""."""
    package = _PACKAGES.get(row.partition(" ")[0].partition("-")[0], "torch")
    if package == "zentorch" and not torch.cpu._is_vnni_supported():
        return "zentorch cannot run: this CPU has no AVX512-VNNI"  # without it, zentorch exits the process
    try:
        return "" if find_spec(package) else f"{package} is not installed"
    except ModuleNotFoundError:  # the parent package is missing
        return f"{package} is not installed"


@contextmanager
def compiling() -> Iterator[None]:
    """Compile peers built and first called in the block as their authors advise: weights are constants of the graph.

    The number of threads is restored at the end.
    """
    # sdnq reads this when imported; uncompiled it is several times slower.
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "1")
    threads = torch.get_num_threads()
    try:
        with torch._inductor.config.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=1 << 10):
            yield
    finally:
        torch.set_num_threads(threads)  # importing ARK sets it to all of the machine's
