"""Compile the Triton kernels for devices that need not be present, one output line each. Run by test_compile.py."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hfquant.kernels.triton.programs import few, integer, quantize, weight_only

TILE = {"BM": 128, "BN": 64, "BK": 64, "STAGES": 3, "num_warps": 8, "num_stages": 3}
#: At run time, the compiler treats a size of 1 as a constant.
FEW = {"BM": 1, "BN": 16, "STAGES": 4, "num_warps": 4, "M": 1, "S": 1}
STRIDES = ("x", "plane", "weight", "scale", "zero", "up")
ONES = dict.fromkeys(("N", "K", "G", "rank", *(f"stride_{of}" for of in STRIDES)), 1)
WEIGHT = {
    "weight": "*i8", "scale": "*u8", "scale_row": "*fp32", "zero_point": "*i8", "narrow": "*fp32", "up": "*bf16",
    "bias": "*bf16", "y": "*bf16", "blocks": None, "divisor": None,
}  # fmt: skip
CODES = WEIGHT | {"codes": "*i8", "input_scale": "*fp32"}
CHANNEL = CODES | {"scale": "*fp32", "scale_row": None, "zero_point": None}
UNEVEN = CHANNEL | {"blocks": "*i32"}
FLOATS = WEIGHT | {"x": "*bf16"}
#: Without these, a load of single bytes can only be one of weights.
NO_BYTES = {"scale": "*fp32", "scale_row": None, "zero_point": None}
ROWS = {
    "x": "*bf16", "divisor": "*fp32", "given": None, "given_neg": None, "codes": "*i8", "scales": "*fp32",
    "segments": None, "low_out": "*fp32", "high_out": "*fp32",
}  # fmt: skip
W8 = {
    "BITS": 8, "PLANES": 1, "WIDE": False, "GROUP": 4096, "IN_SEGMENT": 1, "ALIGNED": True, "SETS": True, "STEPS": 0,
    **TILE,
}  # fmt: skip
W4 = W8 | {"BITS": 4, "GROUP": 64, "IN_SEGMENT": 64, "STEPS": 1, "FLOAT32": False}
CODE = {
    "QMAX": 127.0, "LIMIT": 3.4e38, "DUAL": False, "MOST": 0, "ALIGNED": True, "MANTISSA": 0, "ROWS": 2, "BLOCK": 1024,
    "ONE": True, "num_warps": 4, "num_stages": 3,
}  # fmt: skip
#: Name: program, pointer types, constants and options.
PROGRAMS = {
    "w8a8": (integer.integer_product, CHANNEL, W8 | {"BN": 128, "BK": 128}),
    "w8a8 dual": (integer.integer_product, UNEVEN, W8 | {"GROUP": 0, "PLANES": 2, "WIDE": True, "BK": 128}),
    "w8a8 one token": (integer.integer_product, CHANNEL, W8 | FEW | {"BK": 256, "G": 1}),
    "w8a8 segments": (integer.integer_product, CHANNEL, W8 | {"GROUP": 512, "STEPS": 4, "BK": 128}),
    "w6a8": (integer.integer_product, CODES, W8 | {"BITS": 6}),
    "w4a8 uneven": (integer.integer_product, UNEVEN, W4 | {"GROUP": 0, "STEPS": 0, "SETS": False}),
    "w4a8": (integer.integer_product, CODES, W4),
    "w4a8 one token": (few.few_tokens_product, CODES | {"x": "*i8"}, W4 | FEW | {"BK": 512}),
    "w4a16": (weight_only.weight_only_product, FLOATS, W4),
    "w4a16 in float32": (weight_only.weight_only_product, FLOATS | {"x": "*fp32"}, W4 | {"FLOAT32": True, "BK": 32}),
    "w8a16": (weight_only.weight_only_product, FLOATS | {"x": "*fp16"}, W8 | {"FLOAT32": False}),
    "w4a16 one token": (few.few_tokens_product, FLOATS | {"input_scale": None}, W4 | FEW | {"BK": 256}),
    "wide w2a16": (weight_only.weight_only_product, FLOATS | NO_BYTES, W4 | {"BITS": 2}),
    "wide w4a16": (weight_only.weight_only_product, FLOATS | NO_BYTES, W4),
    "wide w4a16 in steps": (weight_only.weight_only_product, FLOATS | NO_BYTES, W4 | {"GROUP": 128, "STEPS": 2}),
    "wide w4a8": (integer.integer_product, CODES | NO_BYTES, W4),
    "wide w4a8 one token": (few.few_tokens_product, CODES | NO_BYTES | {"x": "*i8"}, W4 | FEW | {"BK": 512}),
    "wide w4a16 one token": (few.few_tokens_product, FLOATS | NO_BYTES | {"input_scale": None}, W4 | FEW | {"BK": 256}),
    "wide w8a16 one token": (weight_only.weight_only_product, FLOATS | NO_BYTES, W8 | FEW | {"FLOAT32": False}),
    "int8 codes": (quantize.quantize, ROWS, CODE),
    "int8 codes of one token": (quantize.quantize, ROWS, CODE | {"M": 1, "S": 1, "DUAL": True, "MOST": 8}),
    "ranges of one token": (quantize.ranges, ROWS, CODE | {"M": 1, "S": 1}),
    "dual one token": (integer.integer_product, UNEVEN, W8 | FEW | {"GROUP": 0, "PLANES": 2, "WIDE": True, "K": 1}),
    "w4a8 dual one token": (few.few_tokens_product, CODES | {"x": "*i8"}, W4 | FEW | {"BK": 512, "PLANES": 2}),
    "all sizes one token": (integer.integer_product, CHANNEL, W8 | FEW | {"GROUP": 1} | ONES),
    "weight all sizes one token": (weight_only.weight_only_product, FLOATS, W4 | FEW | {"GROUP": 1} | ONES),
    "codes all sizes": (quantize.quantize, ROWS, CODE | {"BLOCK": 16, "M": 1, "S": 1} | ONES),
    "dual codes": (quantize.quantize, ROWS | {"segments": "*i32"}, CODE | {"DUAL": True, "ONE": False}),
    "fp8 codes": (quantize.quantize, ROWS, CODE | {"MANTISSA": 3, "QMAX": 448.0}),
    "ranges": (quantize.ranges, ROWS, CODE),
}


def compile_one(program, pointers: dict, constants: dict, capability: int) -> tuple[str, str]:
    """Return the PTX, and the registers, stack and shared memory that the machine code uses."""
    names = program.arg_names
    values = {name: constants[name] if name in constants else pointers.get(name, "i32") for name in names}
    constant = {name for name in names if name in constants or values[name] is None}
    signature = {name: "constexpr" if name in constant else values[name] for name in names}
    # As at run time: pointers and sizes divisible by 16 are compiled as such.
    odd = constant | {"G", "S", "rank"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in odd}
    source = ASTSource(program, signature, {(names.index(name),): values[name] for name in constant}, aligned)
    options = {name: constants[name] for name in ("num_warps", "num_stages")}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return built.asm["ptx"], " ".join([*re.findall(r"(?:REG|STACK):\d+", usage)[:2], f"SHARED:{built.metadata.shared}"])


for name, (program, pointers, constants) in PROGRAMS.items():
    for capability in map(int, sys.argv[1:]):
        ptx, usage = compile_one(program, pointers, constants, capability)
        units = sorted({m.removesuffix(".sync") for m in re.findall(r"wgmma|(?<!wg)mma\.sync|tcgen05\.mma", ptx)})
        counted = {"BYTES": r"ld\.global\S*\.[bsu]8\s", "ASYNC": r"cp\.async\.c[ag]", "SHUFFLES": r"shfl\.sync"}
        counts = " ".join(f"{what}:{len(re.findall(pattern, ptx))}" for what, pattern in counted.items())
        sys.stdout.write(f"{name}, {capability}: {usage} {counts} {' '.join(units)}\n")
