"""Peers that hfquant is compared with: torchao, optimum-quanto and sdnq, as far as each runs on a CPU.

Every peer is a function ``(model, batches) -> model`` that quantizes the linears of
:func:`benchmarks.models.quantizable_linears` in place, with the peer's own code and storage format; ``batches`` are
calibration batches, which most do not need. :data:`PEERS` names them ``<kind>/<peer>``, where the kind is the number
format: w4a16 is 4-bit weights and float activations.

Not available on this CPU and therefore left out: torchao's packed formats for GPUs and Arm, its GPTQ (needs a GPU
library for int4) and its scaled float8 product. torchao's w4a8 keeps each 4-bit code in a byte until the model is
exported, and is counted as stored: 8.6 bits, which packing would reduce to 4.6.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from benchmarks.models import quantizable_linears

Batches = Iterable[dict[str, Any]]
Peer = Callable[[nn.Module, Batches], nn.Module]

GROUP_SIZE = 64


@torch.no_grad()
def linearized(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Replace weight-only linears by their float32 weight matrices, obtained by applying each to the identity.

    Some kernels are a hundred times slower than a float product on this CPU or run only in bfloat16; neither affects
    the quality of the codes. The peer's own code still unpacks and scales them.
    """
    for name in names:
        module = model.get_submodule(name)
        weight = module.weight
        identity = torch.eye(module.in_features, dtype=weight.dtype if weight.is_floating_point() else torch.float32)
        bias, module.bias = module.bias, None
        plain = nn.Linear(module.in_features, module.out_features, bias is not None)
        plain.weight.copy_(module(identity).T)
        if bias is not None:
            plain.bias.copy_(bias)
        model.set_submodule(name, plain)
    return model


def _torchao(make_config: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Peer:
    """Return a torchao peer. Linears are cast to ``dtype`` first: torchao's 4-bit kernels are meant for bfloat16."""

    def apply(model: nn.Module, batches: Batches) -> nn.Module:
        from torchao.quantization import quantize_

        chosen = quantizable_linears(model)
        for linear in chosen.values():
            linear.to(dtype)
        quantize_(model, make_config(), filter_fn=lambda _, name: name in chosen)
        return model

    return apply


def _torchao_int8(activations: bool) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    return (Int8DynamicActivationInt8WeightConfig if activations else Int8WeightOnlyConfig)(set_inductor_config=False)


def _torchao_fp8() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig(set_inductor_config=False)


def _torchao_int4(algorithm: str) -> Any:
    """Return torchao's asymmetric CPU format. "tinygemm" rounds to nearest, "hqq" minimizes a p-norm of the error."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(GROUP_SIZE, int4_choose_qparams_algorithm=algorithm, set_inductor_config=False)


def _torchao_w4a8() -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

    return Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(GROUP_SIZE))


def _torchao_awq(model: nn.Module, batches: Batches) -> nn.Module:
    """Apply activation-aware scaling (arXiv 2306.00978) to torchao's int4, searching 20 strengths per layer.

    It keeps the inputs of all layers (0.7 MB per token on SmolLM2) and multiplies them 40 times, so it is calibrated on
    every eighth batch only.
    """
    from torchao.prototype.awq import AWQConfig
    from torchao.quantization import quantize_

    names = quantizable_linears(model).keys()
    quantize_(model, AWQConfig(_torchao_int4("tinygemm"), step="prepare"), filter_fn=lambda _, name: name in names)
    with torch.no_grad():
        for batch in list(batches)[::8]:
            model(**batch)
    for name in names:
        observed = model.get_submodule(name).to(torch.bfloat16)
        observer = observed.act_obs
        observer.weight, observer.inputs = observed.weight, [x.bfloat16() for x in observer.inputs]
    quantize_(model, AWQConfig(_torchao_int4("tinygemm"), step="convert"), filter_fn=lambda _, name: name in names)
    return model


def _quanto(weights: str, activations: str | None = None) -> Peer:
    def apply(model: nn.Module, batches: Batches) -> nn.Module:
        from optimum import quanto

        quanto.quantize(model, weights=weights, activations=activations, include=list(quantizable_linears(model)))
        if activations is not None:
            with torch.no_grad(), quanto.Calibration():
                for batch in batches:
                    model(**batch)
        quanto.freeze(model)
        return model

    return apply


def _sdnq(dtype: str, **options: Any) -> Peer:
    def apply(model: nn.Module, batches: Batches) -> nn.Module:
        # sdnq reads this when imported. Compiling would take minutes and changes no result.
        os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
        from sdnq import sdnq_post_load_quant

        chosen = quantizable_linears(model)
        others = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in chosen]
        return sdnq_post_load_quant(
            model,
            weights_dtype=dtype,
            group_size=0 if dtype.endswith("8") else GROUP_SIZE,
            modules_to_not_convert=others,
            add_skip_keys=False,
            minimum_allowed_numel=0,
            **options,
        )

    return apply


PEERS: dict[str, Peer] = {
    "w8a16/torchao": _torchao(lambda: _torchao_int8(activations=False)),
    "w8a16/quanto": _quanto("qint8"),
    "w8a16/sdnq": _sdnq("int8"),
    "w8a8/torchao": _torchao(lambda: _torchao_int8(activations=True)),
    "w8a8/sdnq": _sdnq("int8", use_quantized_matmul=True),
    "w8a8/quanto-static": _quanto("qint8", "qint8"),
    "fp8a16/torchao": _torchao(_torchao_fp8),
    "fp8a16/quanto": _quanto("qfloat8"),
    "w4a16/torchao": _torchao(lambda: _torchao_int4("tinygemm"), torch.bfloat16),
    "w4a16/torchao-hqq": _torchao(lambda: _torchao_int4("hqq"), torch.bfloat16),
    "w4a16/torchao-awq": _torchao_awq,
    "w4a16/quanto": _quanto("qint4"),
    "w4a16/sdnq": _sdnq("int4"),
    "w4a16/sdnq-asym": _sdnq("uint4"),
    "w4a16/sdnq-hadamard": _sdnq("int4", use_hadamard=True),
    "w4a16/sdnq-asym-hadamard": _sdnq("uint4", use_hadamard=True),
    "w4a16/sdnq-svd": _sdnq("int4", use_svd=True),
    "w4a16/sdnq-asym-svd": _sdnq("uint4", use_svd=True),
    "w4a16/sdnq-asym-svd-hadamard": _sdnq("uint4", use_svd=True, use_hadamard=True),
    "w4a8/torchao": _torchao(_torchao_w4a8),
    "w4a8/sdnq": _sdnq("int4", use_quantized_matmul=True),
    "w4a8/sdnq-svd-hadamard": _sdnq("int4", use_quantized_matmul=True, use_svd=True, use_hadamard=True),
}
