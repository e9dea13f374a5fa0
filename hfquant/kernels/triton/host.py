"""Host code shared by the Triton kernels."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from hfquant.formats.inputs import segment_of
from hfquant.kernels.base import Operands, Product

#: Input dtypes that device code reads; others are converted to float32 first.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Up to this many tokens, a program multiplies one row with vector instructions: tensor cores would idle on 15 of their
#: 16 rows, and there would be too few tiles to fill a device. Chosen by this reasoning, not measured.
FEW = 4


def missing() -> str:
    """Return what this machine lacks to run Triton kernels; "" if nothing."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "the Triton kernels do not compile for AMD devices"
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"it needs compute capability 8.0, this device has {major}.{minor}"


class Tile(NamedTuple):
    """Shape of an output tile, and launch parameters of the program that computes it.

    Attributes:
        BM, BN, BK: tokens, output rows and columns.
        num_warps, num_stages: warps and pipeline stages of a program.
    """

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


def tile(tokens: int, columns: int, longest: int, light: bool = False) -> Tile:
    """Return the tile shape for a number of tokens.

    Args:
        tokens: rows of the input.
        columns: size of the largest column block.
        longest: upper limit of BK above FEW tokens (shared memory).
        light: whether a program keeps little besides one accumulator per value; others spill registers at 128 x 128
            (seen in the output of ptxas for compute capability 8.0 and 9.0).
    """
    width = _power_of_two(columns, 32)
    if tokens <= FEW:
        return Tile(1, 16, min(width, 256), 4, 4)
    width = min(width, longest)
    if tokens <= 16:
        return Tile(16, 32, width, 4, 4)
    if tokens <= 64:
        return Tile(_power_of_two(tokens, 32), 64, width, 4, 3)
    return Tile(128, 128, width, 8, 3) if light and tokens > 512 else Tile(128, 64, width, 8, 3)


def _power_of_two(number: int, least: int) -> int:
    """Return the smallest power of two that is at least ``number``, but not below ``least``."""
    return max(1 << (number - 1).bit_length(), least)


class Layout(NamedTuple):
    """Layout of the column blocks of a product.

    Attributes:
        blocks: [3, G] int32 on the device: first column, end column (exclusive), input segment; None with ``group``.
        group: the block size if all blocks, and all input segments, have the same, else 0.
        in_segment: with ``group``, number of blocks in an input segment.
        longest: size of the largest block.
        aligned: whether all blocks start and end at multiples of 16.
        sets: whether each block starts with a set of codes that fill whole bytes.
        several: whether there are several equal blocks.
    """

    blocks: Tensor | None
    group: int
    in_segment: int
    longest: int
    aligned: bool
    sets: bool
    several: bool

    def steps(self, width: int) -> int:
        """Return STEPS of the programs :mod:`.integer` and :mod:`.weight_only` with BK = ``width``."""
        if self.longest <= width:
            return 1
        return -(-self.group // width) if self.several else 0


@lru_cache(maxsize=1024)
def layout(product: Product, device: torch.device) -> Layout:
    """Return the layout of a product's column blocks; cached."""
    sizes, bits = product.columns, product.weight.bits
    alike = len(set(sizes)) == len(set(product.segments)) == 1
    blocks = None
    if not alike:
        # The programs compute the bounds of equal blocks: a CUDA graph must not own a tensor that is kept.
        rows = [*_bounds(sizes), segment_of(sizes, product.segments)]
        blocks = torch.tensor(rows, dtype=torch.int32, device=device)
    aligned = all(size % 16 == 0 for size in sizes)
    sets = all(size % codes_per_set(bits) == 0 for size in sizes[:-1])
    group, in_segment = (sizes[0], len(sizes) // len(product.segments)) if alike else (0, 1)
    return Layout(blocks, group, in_segment, max(sizes), aligned, sets, alike and len(sizes) > 1)


def codes_per_set(bits: int) -> int:
    """Return the fewest codes of ``bits`` bits that fill whole bytes."""
    return 8 // gcd(bits, 8)


@lru_cache(maxsize=1024)
def in_groups(product: Product) -> bool:
    """Return whether ``programs.few`` can compute the product: equal groups, a power of two, in one segment."""
    size = product.columns[0]
    same = len(set(product.columns)) == 1 and len(product.segments) == 1
    return same and 2 <= size <= 256 and size & (size - 1) == 0


class Segments(NamedTuple):
    """Layout of the input segments of a product.

    Attributes:
        bounds: [3, S] int32 on the device: first column, end column (exclusive), largest dual-scale exponent; None if
            all segments have the same size and exponent.
        size, most: these two, if so.
        aligned: whether all segments start and end at multiples of 16.
    """

    bounds: Tensor | None
    size: int
    most: int
    aligned: bool


@lru_cache(maxsize=1024)
def segments_of(product: Product, device: torch.device) -> Segments:
    """Return the layout of a product's input segments; cached."""
    rule, sizes = product.input, product.segments
    assert rule is not None
    most = [rule.format.max_dual_exponent if dual else 0 for dual in rule.dual]
    aligned = all(size % 16 == 0 for size in sizes)
    if len(set(sizes)) == len(set(most)) == 1:
        return Segments(None, sizes[0], most[0], aligned)
    return Segments(torch.tensor([*_bounds(sizes), most], dtype=torch.int32, device=device), 0, 0, aligned)


def _bounds(sizes: tuple[int, ...]) -> tuple[list[int], list[int]]:
    ends = list(accumulate(sizes))
    return [end - size for end, size in zip(ends, sizes, strict=True)], ends


class NarrowBranch(NamedTuple):
    """The low-rank branch, as the epilogue of a product takes it.

    Attributes:
        narrow: [tokens, rank] float32, the raw input times ``down^T``.
        up: [out, rank], any float dtype.
        rank: rank of the branch.
    """

    narrow: Tensor | None
    up: Tensor | None
    rank: int


def branch(x: Tensor, operands: Operands) -> NarrowBranch:
    """Return the low-rank branch for ``x`` [tokens, in]."""
    down, up = operands.down, operands.up
    if down is None or up is None or not len(down):
        return NarrowBranch(None, None, 0)
    if x.is_cuda and x.dtype == down.dtype != torch.float32:
        narrow = torch.mm(x, down.T, out_dtype=torch.float32)
    else:
        narrow = x.float() @ down.float().T
    return NarrowBranch(narrow, rows_contiguous(up), len(down))


def rows_contiguous(tensor: Tensor) -> Tensor:
    """Return a matrix with contiguous rows; the stride between rows may be larger."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def stride(tensor: Tensor | None) -> int:
    """Return the stride between rows (between planes for codes in planes); 0 for None."""
    return 0 if tensor is None else tensor.stride(0)


def few_tokens(
    x: Tensor,
    input_scale: Tensor | None,
    divisor: Tensor | None,
    operands: Operands,
    low: NarrowBranch,
    y: Tensor,
    product: Product,
) -> None:
    """Run ``programs.few``, writing to ``y`` [tokens, out].

    Args:
        x: codes [planes, tokens, in] int8, or [tokens, in] float.
        input_scale, divisor: see ``programs.few``.
        operands: the weight's tensors and the bias.
        low: the low-rank branch.
        y: the output.
        product: one that :func:`in_groups` accepts.
    """
    from hfquant.kernels.triton.programs.few import few_tokens_product

    tokens, out = y.shape
    group, width, rows = product.columns[0], product.in_features, 16
    # At least a set of codes, and at most what gives each of 128 threads 4 bytes of the input: less is not pipelined.
    step = min(_power_of_two(width, max(group, 8)), 512 if x.dim() == 3 else 256)
    with torch.cuda.device_of(x):
        few_tokens_product[(-(-out // rows) * tokens,)](
            x, input_scale, divisor, operands.weight, operands.scale, operands.scale_row, operands.zero_point,
            low.narrow, low.up, operands.bias, y, tokens, out, width, len(product.columns), x.stride(-2), stride(x),
            stride(operands.weight), stride(operands.scale), stride(operands.zero_point), stride(low.up), low.rank,
            BITS=product.weight.bits, PLANES=len(x) if x.dim() == 3 else 1, GROUP=group,
            BN=rows, BK=step, STAGES=4, num_warps=4,
        )  # fmt: skip
