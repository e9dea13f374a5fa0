"""Calls of the ops with invalid arguments of every kind, in a process of their own, since a call could crash it.

``python -m tests.kernels.fuzz_job OP CALLS SEED`` exits with 0 if each call raised a Python error or gave a correct
result, and prints the number of each.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

import hfquant.kernels.op  # noqa: F401  (the op is registered there)
from hfquant.kernels import cpu
from hfquant.kernels.base import Operands
from tests.kernels.products import Spec, sample

SPECS = [
    Spec(8, (64,)),
    Spec(4, (96,), 32, "token", True, True),
    Spec(6, (30, 31), 16, "tensor", True),
    Spec(8, (70, 58), 0, "static"),
    Spec(4, (64,), 16, "static", dual=3),
    Spec(8, (200,), 64, "float"),
    Spec(4, (128,), 32, "float", True, True),
]
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int64,
    torch.bool, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip
NUMBERS = [
    -(2**63),
    -(2**31),
    -7,
    -5,
    -1,
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    16,
    63,
    64,
    2**16,
    2**31 - 1,
    2**31,
    2**62,
    2**63 - 1,
]


def emptied(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


TENSORS: list[Callable[[Tensor], object]] = [
    lambda t: None,
    lambda t: t.to(random.choice(DTYPES)),
    lambda t: t.view(torch.int8) if t.element_size() == 1 else t,
    lambda t: t[:-1],
    lambda t: t[..., :-1],
    lambda t: t[:0],
    lambda t: t[..., :0],
    lambda t: t[..., :1],
    lambda t: t.repeat(*[2] * max(t.dim(), 1)),
    lambda t: t.repeat(*[1] * max(t.dim() - 1, 0), 2),
    lambda t: t.T if t.dim() == 2 else t.flip(0),
    lambda t: t.T.contiguous().T if t.dim() == 2 else t,
    lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
    lambda t: t[:1].expand_as(t) if t.dim() else t,
    lambda t: torch.as_strided(t, t.shape, [0] * t.dim()),
    lambda t: t.unsqueeze(random.randint(0, t.dim())),
    lambda t: t.flatten(),
    lambda t: t.sum() if t.dtype != torch.float8_e4m3fn else t,
    lambda t: t.new_empty(0),
    lambda t: t.new_empty(0, 0),
    lambda t: t.new_empty(3, 0, 5),
    lambda t: t.to("meta"),
    lambda t: torch._neg_view(t) if t.is_floating_point() else t,
    lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    lambda t: t.to_sparse() if t.dim() and t.numel() else t,
    emptied,
    lambda t: torch.nested.nested_tensor([t.float()]),
    lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: "text",
    lambda t: 3,
    lambda t: [t],
]


def changed(t: Tensor) -> object:
    """Return ``t`` made invalid in some way, or unchanged if torch itself cannot do that to it."""
    try:
        return random.choice(TENSORS)(t)
    except (RuntimeError, NotImplementedError):
        return t


def numbers(spec: Tensor) -> object:
    """Return a spec with another number, or of another length or kind."""
    spec = spec.clone()
    match random.randrange(4):
        case 0:
            return changed(spec)
        case 1:
            return torch.cat([spec.view(-1), torch.tensor([random.choice(NUMBERS)] * random.randint(1, 4))])
        case _:
            for _ in range(random.randint(1, 3)):
                spec[random.randrange(len(spec))] = random.choice(NUMBERS)
            return spec


def text(key: str) -> object:
    at = random.randrange(len(key))
    other = sample(random.choice(SPECS), 1).product.key
    return random.choice(
        [key[:at], key[:at] + random.choice('0123456789,:[]{}"-e') + key[at + 1 :], other, "", None, 5]
    )


def spoiled(arguments: list[object], last: Callable[[object], object]) -> list[object]:
    """Return arguments of which some are invalid; ``last`` changes a text, a spec or a number."""
    arguments = list(arguments)
    for i in random.sample(range(len(arguments)), random.choice([0, 1, 1, 1, 2, 3])):
        value = arguments[i]
        if isinstance(value, Tensor) and value.dtype != torch.int64:
            arguments[i] = changed(value)
        elif value is None:
            arguments[i] = random.choice([torch.zeros(37, 1), torch.zeros(2), torch.zeros(37, 3), torch.zeros(64)])
        else:
            arguments[i] = last(value)
    return arguments


def reference(arguments: list[object]) -> object:
    """Return the float product of the same arguments, or the reason why there is none to compare with."""
    scales = (scale for scale in arguments[5:7] if isinstance(scale, Tensor))
    if not all(bool((scale > 0).all()) for scale in scales):
        return "scales are positive"
    try:
        return torch.ops.hfquant.linear(*arguments[:-1], False)
    except Exception as error:  # noqa: BLE001  (whatever it is, there is nothing to compare with)
        return error


def check(y: Tensor, expected: object) -> None:
    if isinstance(expected, Tensor) and not y.is_meta:
        assert y.shape == expected.shape
        assert y.dtype == expected.dtype
        share = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float8_e4m3fn: 0.2}.get(y.dtype, 1e-3)
        y, expected = y.double(), expected.double()
        size = float(expected.abs().max()) if expected.numel() else 0.0
        # Weight-only products turn Inf into NaN or Inf.
        close = (y - expected).abs() <= share * size + 1e-30
        assert bool((close | ~expected.isfinite()).all()), (y - expected).abs().max()


def packed(_: object) -> object:
    return random.choice([True, False, None, 2, "yes"])


def calls_of_linear() -> list[object]:
    made = sample(random.choice(SPECS), random.choice([1, 2, 9]))
    down, up = (torch.randn(3, made.product.in_features), torch.randn(37, 3)) if random.random() < 0.3 else (None, None)
    return [made.x, *made.operands._replace(down=down, up=up), made.product.key, True]


def calls_of_cpu() -> list[object]:
    made = sample(random.choice(SPECS), random.choice([1, 2, 9]))
    operands: Operands = made.operands
    down, up = (torch.randn(3, made.product.in_features), torch.randn(37, 3)) if random.random() < 0.3 else (None, None)
    operands = operands._replace(down=down, up=up)
    return [made.x, *operands, cpu.spec_of(made.product.key), 0]


def main(name: str, calls: int, seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    here = [k for k in cpu.KERNELS if not k.missing()]
    assert here, "no C++ kernel runs here"
    right, errors = count(), 0
    for i in range(calls):
        if name == "linear":
            arguments = spoiled(calls_of_linear(), lambda v: text(v) if isinstance(v, str) else packed(v))
            op, expected = torch.ops.hfquant.linear, reference
        else:
            valid = calls_of_cpu()
            valid[-1] = random.choice([number for number, k in enumerate(reversed(cpu.KERNELS)) if not k.missing()])
            arguments = spoiled(
                valid, lambda v: numbers(v) if isinstance(v, Tensor) else random.choice([*NUMBERS, None])
            )
            op, expected = torch.ops.hfquant_cpu.linear, lambda a: None
        sys.stderr.write(f"{i}\n")  # the last line names the call that crashed
        try:
            y = op(*arguments)
        except Exception:  # noqa: BLE001  (any Python error is what is wanted)
            errors += 1
            continue
        assert isinstance(y, Tensor)
        check(y, expected(arguments))
        next(right)
    sys.stdout.write(f"{next(right)} right, {errors} errors\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
