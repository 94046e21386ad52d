"""Whether a compiled program's batch is split over the chips, and its parameters gathered where they are used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any

from rae_xla.preflight.hlo import NAMES, Instruction, Module

# Of a program's memory: labels, positions and conditions of the whole batch are nothing to a chip, features of every
# image are.
SMALLEST_SHARE = 0.02


@dataclass(frozen=True)
class Layout:
    """What lies how.

    ``unsplit_inputs``: parts of the batch that every chip holds whole. ``whole_batch``: results with a row for every
    image of the batch. ``gathered_elements``: that all-gathers make in one run, ``split_elements`` of parameters that
    lie split. ``results_checked``: false where parameters, or a chip's part of one, have a dimension of the batch's
    size, or on one chip.
    """

    unsplit_inputs: list[str]
    whole_batch: list[Instruction]
    gathered_elements: int
    split_elements: int
    results_checked: bool

    def problems(self) -> list[str]:
        """One line for each thing that is wrong; none if nothing is."""
        lines = [f"{described} is not split: every chip holds all of it" for described in self.unsplit_inputs]
        for instruction in sorted(self.whole_batch, key=_bytes, reverse=True)[:3]:
            lines.append(
                f"every chip makes {instruction.shape.split('{')[0]} for all images of the batch, "
                f"{_bytes(instruction) / 2**30:.3f} GiB ({instruction.operation or 'the compiler'}, "
                f"{instruction.source or 'no source'})"
            )
        # Those of modulation, a quarter of DiT's, are multiplied where they lie.
        if self.gathered_elements < self.split_elements / 2:
            lines.append(
                f"parameters are not gathered: {self.split_elements:,} numbers lie split over the chips, "
                f"{self.gathered_elements:,} are gathered"
            )
        return lines


def layout_of(module: Module, traced: dict[str, Any], sizes: dict[str, int], num_chips: int) -> Layout:
    """``traced``: see `rae_xla.preflight.trace_worker`; ``sizes``: the compiler's, in bytes a chip.

    Results are recognised by a dimension of the batch's size; where parameters have that size too, none is.
    """
    num_images = traced["num_images"]
    # A size that parameters have too, whole or of a part, tells nothing.
    is_telling = num_chips > 1 and not any(
        num_images in (*argument["shape"], *_part(argument))
        for argument in traced["arguments"]
        if not argument["name"].startswith("batch")
    )
    unsplit = [
        f"{argument['name']} ({argument['dtype']} {argument['shape']}, {argument['bytes'] / 2**30:.3f} GiB)"
        for argument in traced["arguments"]
        if argument["name"].startswith("batch") and argument["sharding"] == "{replicated}"
    ]
    split = sum(
        prod(argument["shape"])
        for argument in traced["arguments"]
        if argument["name"].startswith(("state['parameters']", "frozen")) and argument["sharding"] != "{replicated}"
    )
    smallest = SMALLEST_SHARE * (sizes["arguments"] + sizes["temporaries"])
    whole, gathered, seen = [], 0, set()
    for instruction, times in module.runs():
        if is_telling and instruction.opcode not in (*NAMES, "while") and _is_of_all(instruction, num_images, smallest):
            whole.append(instruction)
        found = module.collective(instruction)
        if found and found[0].opcode.startswith("all-gather") and found[0].channel not in seen:
            seen.add(found[0].channel)
            gathered += times * max(array.num_elements for array in found[0].arrays)
    return Layout(unsplit, whole, gathered, split, is_telling)


def _part(argument: dict[str, Any]) -> list[int]:
    """Sizes of what one chip holds of an argument."""
    tiles = re.search(r"devices=\[([\d,]+)\]", argument["sharding"])
    if tiles is None:
        return argument["shape"]
    return [-(-size // int(tile)) for size, tile in zip(argument["shape"], tiles[1].split(","), strict=False)]


def _is_of_all(instruction: Instruction, num_images: int, smallest: float) -> bool:
    return any(num_images in array.sizes and array.bytes >= smallest for array in instruction.arrays)


def _bytes(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays)
