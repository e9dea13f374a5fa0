"""`hfquant kernels`: list the kernels that can run quantized layers on this machine, and time them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from hfquant.cli import options
from hfquant.cli.errors import command

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from hfquant.kernels.base import Product
    from hfquant.nn.linear import QuantLinear

_TOKEN, _CHANNEL = {"dynamic": True, "axis": -1}, {"axis": -1}
#: Products by their common name, each with the config of its weights and inputs.
PRODUCTS: dict[str, dict[str, object]] = {
    "W8A8": {"weight_quant": {"type": "int8", **_CHANNEL}, "input_quant": {"type": "int8", **_TOKEN}},
    "W4A8": {"weight_quant": {"type": "int4", "group_size": 64}, "input_quant": {"type": "int8", **_TOKEN}},
    "W8A16": {"weight_quant": {"type": "int8", **_CHANNEL}, "input_quant": None},
    "W6A16": {"weight_quant": {"type": "int6", "group_size": 64}, "input_quant": None},
    "W4A16": {"weight_quant": {"type": "int4", "group_size": 64}, "input_quant": None},
    "FP8": {"weight_quant": {"type": "fp8e4m3", **_CHANNEL}, "input_quant": {"type": "fp8e4m3", **_TOKEN}},
    "INT16": {"weight_quant": {"type": "int16", **_CHANNEL}, "input_quant": {"type": "int16", **_TOKEN}},
}
SHAPES = ("1x1024x4096", "64x1152x4608", "256x1152x1152")


def kernels(
    device: Annotated[str | None, typer.Option(help="Device; default: cuda if available, else cpu.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the model, such as bfloat16.")] = "float32",
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="MxKxN", help="Tokens x inputs x outputs to time; repeatable; default: three shapes."),
    ] = None,
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Time the shapes against F.linear.")] = True,
    debug: options.Debug = False,
) -> None:
    """List the kernels, show which products each can compute on this machine or why it cannot, and time them.

    W4A8: 4-bit weights, 8-bit inputs; A16: float inputs. Weights below 8 bits use groups of 64. HFQUANT_KERNEL=name
    forces one kernel for all layers, here too.
    """
    shapes = [_shape(text) for text in shape or SHAPES]
    import torch
    from rich.console import Console

    number = getattr(torch, dtype, None)
    if not (isinstance(number, torch.dtype) and number.is_floating_point):
        raise typer.BadParameter(f"{dtype!r} is not a floating-point dtype of torch", param_hint="--dtype")
    place = torch.device(options.usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    console = Console(markup=False, highlight=False, soft_wrap=True)
    with command(debug):
        _print_kernels(console, place.type)
        if timed:
            _print_times(console, place, number, shapes)


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"{text!r} is not TOKENSxINPUTSxOUTPUTS, such as {SHAPES[0]}", param_hint="--shape")
    tokens, inputs, outputs = map(int, parts)
    return tokens, inputs, outputs


def _layer(name: str, inputs: int, outputs: int) -> QuantLinear:
    """Return an empty layer that computes the product on codes."""
    from hfquant.layer_config import LayerConfig
    from hfquant.layer_plan import LayerPlan
    from hfquant.nn.linear import QuantLinear

    config = LayerConfig.model_validate({**PRODUCTS[name], "real_quant": True, "opt": {"type": "default"}})
    plan = LayerPlan(config, inputs, outputs, (inputs,), (outputs,), (False,))
    return QuantLinear(plan, bias=True, device="meta")


def _print_kernels(console: Console, device: str) -> None:
    from rich.table import Table

    from hfquant.kernels.table import KERNELS, obstacle

    products = {name: _layer(name, 4096, 4096).product for name in PRODUCTS}
    title = f"Kernels for {device}, the preferred ones first"
    table = Table("kernel", *PRODUCTS, title=title, title_justify="left", box=None)
    # Kernels of one kind give the same reasons.
    notes: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for kernel in KERNELS.values():
        why = {name: obstacle(kernel, product, device) for name, product in products.items()}
        table.add_row(kernel.name, *("-" if reason else "yes" for reason in why.values()))
        for name, reason in why.items():
            if reason:
                who, what = notes.setdefault(reason, ({}, {}))
                who[kernel.name] = what[name] = None
    console.print(table)
    for reason, (who, what) in notes.items():
        some = "" if len(what) == len(products) else f" ({', '.join(what)})"
        console.print(f"- {', '.join(who)}{some}: {reason}")


def _print_times(
    console: Console, device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]
) -> None:
    import torch
    from rich.table import Table

    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    title = f"How many times as fast as F.linear in {str(dtype).removeprefix('torch.')}, and by which kernel{threads}"
    headings = ["x".join(map(str, shape)) for shape in shapes]
    table = Table("product", *headings, title=title, title_justify="left", box=None)
    columns = [_times(device, dtype, *shape) for shape in shapes]
    for name, cells in zip(["F.linear", *PRODUCTS], zip(*columns, strict=True), strict=True):
        table.add_row(name, *cells)
    console.print()
    console.print(table)


def _times(device: torch.device, dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> list[str]:
    """Return the table's column for one shape: F.linear first, then one line per product."""
    import torch

    x = torch.randn(tokens, inputs, device=device, dtype=dtype)
    weight, bias = torch.randn(outputs, inputs).to(x), torch.randn(outputs).to(x)
    layers = [_filled(_layer(name, inputs, outputs), device, dtype) for name in PRODUCTS]
    picked = [_picked(layer.product, x, outputs) for layer in layers]
    run = [partial(layer, x) for layer, name in zip(layers, picked, strict=True) if name]
    plain, *others = _seconds([partial(torch.nn.functional.linear, x, weight, bias), *run], device)
    times = iter(others)
    return [f"{plain * 1e6:.0f} us", *(f"{plain / next(times):.2f} {name}" if name else "-" for name in picked)]


def _picked(product: Product, x: torch.Tensor, outputs: int) -> str:
    """Return the name of the kernel for a product; "" if a forced kernel cannot compute it."""
    from hfquant.kernels.table import KERNELS, VARIABLE, obstacle, pick

    forced = KERNELS.get(os.environ.get(VARIABLE, ""))
    if forced and obstacle(forced, product, x.device.type):
        return ""
    return pick(product, x.device.type, x.dtype, len(x), outputs).name


def _filled(layer: QuantLinear, device: torch.device, dtype: torch.dtype) -> QuantLinear:
    """Return the layer with random codes and scales of a typical size."""
    import torch

    layer = layer.to_empty(device=device).to(dtype)
    for name, tensor in layer.solved_tensors().items():
        if name == "weight":
            tensor.view(torch.uint8).random_(0, 120)
        elif tensor.dtype == torch.uint8:
            tensor.fill_(200)
        else:
            tensor.fill_(0.01)
    assert layer.bias is not None
    layer.bias.data.zero_()
    return layer


def _seconds(calls: Sequence[Callable[[], object]], device: torch.device, budget: float = 0.3) -> list[float]:
    """Return the median seconds of each call. Calls run in rounds, so a slowdown of the machine affects them all."""
    import torch

    def timed(call: Callable[[], object]) -> float:
        call()  # warm up: the caches hold what another call left
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    with torch.inference_mode():
        rounds: list[list[float]] = []
        end = time.perf_counter() + budget * len(calls)
        while len(rounds) < 3 or (time.perf_counter() < end and len(rounds) < 100):
            rounds.append([timed(call) for call in calls])
    return [median(times) for times in zip(*rounds, strict=True)]
