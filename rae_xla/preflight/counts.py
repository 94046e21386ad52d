"""What a compiled program does: its products' FLOPs, what it moves, where in the code its operations come from."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Literal

import numpy as np

from rae_xla.preflight.hlo import ITEM_BITS, NAMES, PRODUCTS, Array, Instruction, Module, numbers_in

Kind = Literal["products", "moves", "other"]
# What moves values without computing any.
_MOVES = (
    "copy", "reshape", "transpose", "pad", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "broadcast",
)  # fmt: skip


def total_flops(module: Module) -> int:
    """Of the whole program on one chip; see `flops_of`."""
    counted: dict[int, int] = {}
    total = 0
    for instruction, times in module.runs():
        key = id(instruction)
        if key not in counted:
            counted[key] = flops_of(module, instruction)
        total += times * counted[key]
    return total


def flops_of(module: Module, instruction: Instruction) -> int:
    """Of the products in an instruction, two a multiply-add; those that padding wastes are not counted."""
    inside = module.fused(instruction) if instruction.opcode == "fusion" else [instruction]
    total = 0
    for product in inside:
        if product.opcode in PRODUCTS:
            left, right = [module.within(product).by_name[name].arrays[0] for name in product.operands[:2]]
            count = _convolution_flops if product.opcode == "convolution" else _dot_flops
            total += count(product, left, right)
    return total


def kind_of(module: Module, instruction: Instruction) -> Kind:
    """``moves``: copies, transposes, padding, where nothing is computed."""
    inside = list(module.fused(instruction)) if instruction.opcode == "fusion" else [instruction]
    if any(i.opcode in PRODUCTS for i in inside):
        return "products"
    return "moves" if all(i.opcode in (*_MOVES, *NAMES) for i in inside) else "other"


def origin(module: Module, instruction: Instruction) -> tuple[str, str]:
    """Source and operation; of a fusion those of its product, or else of most of it."""
    if instruction.opcode != "fusion":
        return instruction.source, instruction.operation
    inside = [i for i in module.fused(instruction) if i.source]
    product = next((i for i in inside if i.opcode in PRODUCTS), None)
    if product is not None:
        return product.source, product.operation
    if instruction.source:
        return instruction.source, instruction.operation
    named = Counter((i.source, i.operation) for i in inside)
    return named.most_common(1)[0][0] if named else ("", instruction.operation)


def padding_share(module: Module) -> float:
    """Of the bytes that the program writes to HBM, those that fill tiles."""
    written, needed = 0, 0
    for instruction, times in module.runs():
        # A fusion that writes a part in place would count with all of it.
        in_place = "output_to_operand_aliasing" in instruction.attributes or "dynamic-update" in instruction.name
        if instruction.opcode in ("fusion", "copy", "convolution") and not in_place:
            for array in instruction.arrays:
                if array.memory == 0:
                    written += times * array.bytes
                    needed += times * array.num_elements * ITEM_BITS[array.dtype] // 8
    return 1 - needed / written if written else 0.0


def argument_bytes(module: Module) -> int:
    """What the arguments take of HBM."""
    parameters = [i for i in module.entry.instructions if i.opcode == "parameter"]
    return sum(array.bytes for parameter in parameters for array in parameter.arrays)


def _dot_flops(dot: Instruction, left: Array, _: Array) -> int:
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    contracted = math.prod(left.sizes[dim] for dim in numbers_in(dims[1] if dims else ""))
    return 2 * dot.arrays[0].num_elements * contracted


def _convolution_flops(convolution: Instruction, left: Array, kernel: Array) -> int:
    """Pairs of an output and a kernel position that meet an input; TPUs write batched products with dilation."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels is not None, convolution
    lhs, rhs, out = labels.groups()
    output = convolution.arrays[0]
    spatial = sorted(label for label in lhs if label.isdigit())
    window = _window(convolution.attributes, len(spatial))
    valid = 1
    for place, label in enumerate(spatial):
        valid *= _valid_positions(
            left.sizes[lhs.index(label)], output.sizes[out.index(label)], *[values[place] for values in window]
        )
    batch_groups = re.search(r"batch_group_count=(\d+)", convolution.attributes)
    inputs = kernel.sizes[rhs.index("i")]  # of one group, if there are groups of features
    batch = left.sizes[lhs.index("b")] // (int(batch_groups[1]) if batch_groups else 1)
    return 2 * inputs * output.sizes[out.index("f")] * batch * valid


def _window(attributes: str, num_dims: int) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """For each spatial dimension: kernel size, stride, padding before, dilation of the input, of the kernel."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    parts = dict(part.split("=") for part in found[1].split()) if found else {}

    def values(key: str) -> list[int]:
        return [int(v.split("_")[0]) for v in parts[key].split("x")] if key in parts else []

    ones = [1] * num_dims
    return (
        values("size") or ones,
        values("stride") or ones,
        values("pad") or [0] * num_dims,
        values("lhs_dilate") or ones,
        values("rhs_dilate") or ones,
    )


def _valid_positions(
    num_inputs: int, num_outputs: int, size: int, stride: int, pad: int, input_dilation: int, kernel_dilation: int
) -> int:
    outputs, positions = np.arange(num_outputs)[:, None], np.arange(size)
    at = outputs * stride - pad + positions * kernel_dilation
    return int(((at >= 0) & (at <= (num_inputs - 1) * input_dilation) & (at % input_dilation == 0)).sum())
