"""Reads the text of a compiled HLO module: instructions with shapes, bytes, products, loops and the compiler's cycles.

Facts here are the compiler's: layouts, the schedule (the order of a computation's instructions) and estimated cycles.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

ITEM_BITS = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 8),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 16),
    **dict.fromkeys(("s32", "u32", "f32"), 32),
    **dict.fromkeys(("s64", "u64", "f64"), 64),
    **dict.fromkeys(("s4", "u4"), 4),
    "token": 0,
}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_HEADER = re.compile(r"^(ENTRY )?%([^\s(]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OPERAND = re.compile(r"%([^\s,()]+)")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%([^\s,}]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%([^\s,}]+)")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# As `rae_xla.xla.source_lines` names it; XLA writes the colon as an underscore.
_SOURCE = re.compile(r"(rae_xla/[\w/]+\.py)[:_](\d+)( backward)?")


@dataclass(frozen=True)
class Array:
    """One array of a shape. ``memory`` 0 is HBM, others are on the chip's core."""

    dtype: str
    sizes: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tile: tuple[int, ...]
    memory: int

    @property
    def num_elements(self) -> int:
        """Without padding."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """As it lies in memory: the minor dimensions are padded to whole tiles."""
        sizes = [self.sizes[dim] for dim in self.minor_to_major]  # minor first
        for place, tile in enumerate(reversed(self.tile)):
            if place < len(sizes):
                sizes[place] = -(-sizes[place] // tile) * tile
            else:
                sizes.append(tile)
        return math.prod(sizes) * ITEM_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str

    @cached_property
    def arrays(self) -> list[Array]:
        """What it makes; several for a tuple."""
        return arrays_of(self.shape)

    @property
    def called(self) -> list[str]:
        """The computations that it names: of a fusion, a loop, a reduction, the branches of a conditional."""
        branches = [name for found in _BRANCHES.findall(self.attributes) for name in found if name]
        return _CALLED.findall(self.attributes) + [n.strip().lstrip("%") for b in branches for n in b.split(",")]

    @property
    def body(self) -> str:
        """The computation that a loop repeats."""
        return self._named("body")

    @property
    def condition(self) -> str:
        """The computation that says whether a loop goes on."""
        return self._named("condition")

    def _named(self, what: str) -> str:
        found = re.search(rf"{what}=%([^\s,}}]+)", self.attributes)
        if found is None:
            raise ValueError(f"{self.name}: a {self.opcode} without {what}")
        return found[1]

    @cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate, if it has one."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @property
    def operation(self) -> str:
        """The operation of PyTorch that it comes from, or nothing."""
        return operation_in(self.attributes)

    @property
    def source(self) -> str:
        """``rae_xla/file.py:line`` that it comes from, then `` backward`` if it is of that line's, or nothing."""
        return source_in(self.attributes)

    @property
    def channel(self) -> str:
        """What the parts of one collective have in common; nothing for what is none."""
        found = re.search(r"channel_id=(\d+)", self.attributes)
        return found[1] if found else ""

    @property
    def groups(self) -> list[list[int]]:
        """Devices that a collective joins; pairs of sender and receiver for a permutation."""
        return _groups(self.attributes)


@dataclass
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Instructions by their names."""
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return self.instructions[self._root]

    _root: int = -1


class Module:
    """A compiled program."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        current: Computation | None = None
        for line in text.splitlines():
            if current is None:
                header = _HEADER.match(line)
                if header:
                    current = self.computations[header[2]] = Computation(header[2])
                    if header[1]:
                        self.entry = current
            elif line.startswith("}"):
                current = None
            else:
                parsed = _parsed(line)
                if parsed is not None:
                    is_root, instruction = parsed
                    if is_root:
                        current._root = len(current.instructions)
                    current.instructions.append(instruction)
        first_line = text.split("\n", 1)[0]
        aliases = re.search(r"input_output_alias=\{(.*?)\s\}, ", first_line)
        self.aliased = {int(p) for p in re.findall(r": \((\d+),", aliases[1])} if aliases else set()

    def trip_count(self, loop: Instruction, within: Computation) -> int:
        """How often the body of a while-loop runs: from its counter's start, step and bound.

        Raises:
            ValueError: they are not constants that can be read.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition, body = self.computations[loop.condition], self.computations[loop.body]
        compare = condition.root
        if compare.opcode == "fusion":
            # The comparison was fused with its constant, which is then in it.
            inner = self.computations[compare.called[0]]
            bounds = [c for c in map(_constant, inner.instructions + condition.instructions) if c is not None]
            indices = [_index(i) for i in condition.instructions if i.opcode == "get-tuple-element"]
        else:
            operands = [condition.by_name[name] for name in compare.operands]
            bounds = [c for c in map(_constant, operands) if c is not None]
            indices = [_index(i) for i in operands if i.opcode == "get-tuple-element"]
        if len(bounds) != 1 or len(indices) != 1:
            raise ValueError(f"{loop.name}: the number of its turns cannot be read from {condition.name}")
        index = indices[0]
        start = self._constant_at(within, within.by_name[loop.operands[0]], index)
        step = self._step(body, index)
        if start is None or step is None:
            raise ValueError(f"{loop.name}: its counter's start or step cannot be read")
        return max(0, -(-(bounds[0] - start) // step))

    def _constant_at(self, computation: Computation, made: Instruction, index: int) -> int | None:
        if made.opcode != "tuple":
            return None
        element = computation.by_name[made.operands[index]]
        while element.opcode in ("copy", "bitcast", "convert"):
            element = computation.by_name[element.operands[0]]
        return _constant(element)

    def _step(self, body: Computation, index: int) -> int | None:
        if body.root.opcode != "tuple":
            return None
        new = body.by_name[body.root.operands[index]]
        while new.opcode in ("copy", "bitcast"):
            new = body.by_name[new.operands[0]]
        if new.opcode != "add":
            return None
        added = [_constant(body.by_name[name]) for name in new.operands]
        return next((value for value in added if value), None)

    def runs(self, computation: Computation | None = None, times: int = 1) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that runs by itself, and how often: loop bodies repeated, fusions as one."""
        computation = computation or self.entry
        for instruction in computation.instructions:
            yield instruction, times
            if instruction.opcode == "while":
                trips = self.trip_count(instruction, computation)
                yield from self.runs(self.computations[instruction.body], times * trips)
            elif instruction.opcode in ("call", "conditional", "async-start"):
                for name in instruction.called:
                    yield from self.runs(self.computations[name], times)

    def flops(self, instruction: Instruction, within: Computation) -> int:
        """Of the products in an instruction, two a multiply-add; those that padding wastes are not counted."""
        if instruction.opcode in ("convolution", "dot"):
            operands = [within.by_name[name].arrays[0] for name in instruction.operands[:2]]
            count = _convolution_flops if instruction.opcode == "convolution" else _dot_flops
            return count(instruction, operands[0], operands[1])
        if instruction.opcode == "fusion":
            return self._flops_of(instruction.called[0])
        return 0

    def _flops_of(self, name: str) -> int:
        if name not in self._fused_flops:
            computation = self.computations[name]
            self._fused_flops[name] = sum(self.flops(i, computation) for i in computation.instructions)
        return self._fused_flops[name]

    @cached_property
    def _fused_flops(self) -> dict[str, int]:
        return {}

    def total_flops(self) -> int:
        """Of the whole program on one chip."""
        return sum(times * self.flops(instruction, self._home[id(instruction)]) for instruction, times in self.runs())

    def collective(self, instruction: Instruction) -> tuple[Instruction, Computation] | None:
        """The transfer between chips that an instruction is, or starts, carries on or ends, and where it stands."""
        if instruction.opcode.removesuffix("-start") in COLLECTIVES:
            return instruction, self._home[id(instruction)]
        if instruction.opcode not in ("fusion", "async-start"):
            return None
        name = instruction.called[0]
        if name not in self._collectives:
            computation = self.computations[name]
            inner = next((i for i in computation.instructions if i.opcode in COLLECTIVES), None)
            self._collectives[name] = None if inner is None else (inner, computation)
        return self._collectives[name]

    @cached_property
    def _collectives(self) -> dict[str, tuple[Instruction, Computation] | None]:
        return {}

    @cached_property
    def _home(self) -> dict[int, Computation]:
        return {id(i): computation for computation in self.computations.values() for i in computation.instructions}

    def origin(self, instruction: Instruction) -> tuple[str, str]:
        """Source and operation; of a fusion those of its product, or else of most of it."""
        if instruction.opcode != "fusion":
            return instruction.source, instruction.operation
        inner = list(self._fused(instruction.called[0]))
        products = [i for i in inner if i.opcode in ("convolution", "dot") and i.source]
        if products:
            return products[0].source, products[0].operation
        if instruction.source:
            return instruction.source, instruction.operation
        named = Counter((i.source, i.operation) for i in inner if i.source)
        return named.most_common(1)[0][0] if named else ("", instruction.operation)

    def _fused(self, name: str) -> Iterator[Instruction]:
        for instruction in self.computations[name].instructions:
            yield instruction
            if instruction.opcode == "fusion":
                yield from self._fused(instruction.called[0])

    def has_products(self, name: str) -> bool:
        """Whether a computation, or one it calls, multiplies matrices."""
        instructions = self.computations[name].instructions
        return any(
            i.opcode in ("convolution", "dot") or (i.opcode == "fusion" and self.has_products(i.called[0]))
            for i in instructions
        )

    def only(self, name: str, opcodes: tuple[str, ...]) -> bool:
        """Whether a computation, and those it calls, has these instructions only, and names for what is there."""
        return all(
            self.only(i.called[0], opcodes)
            if i.opcode == "fusion"
            else i.opcode in opcodes or i.opcode in ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")
            for i in self.computations[name].instructions
        )

    def padding_share(self) -> float:
        """Of the bytes that the program writes to HBM, those that fill tiles."""
        written, needed = 0, 0
        for instruction, times in self.runs():
            # A fusion that writes a part in place would count with all of it.
            in_place = "output_to_operand_aliasing" in instruction.attributes or "dynamic-update" in instruction.name
            if instruction.opcode in ("fusion", "copy", "convolution") and not in_place:
                for array in instruction.arrays:
                    if array.memory == 0:
                        written += times * array.bytes
                        needed += times * array.num_elements * ITEM_BITS[array.dtype] // 8
        return 1 - needed / written if written else 0.0

    @property
    def argument_bytes(self) -> int:
        """What the arguments take of HBM."""
        parameters = [i for i in self.entry.instructions if i.opcode == "parameter"]
        return sum(array.bytes for parameter in parameters for array in parameter.arrays)


def operation_in(text: str) -> str:
    """The operation of PyTorch that is named in what the compiler writes, or nothing."""
    found = re.search(r'op_name="(?:[^"]*/)?(aten__\w+|xla__\w+)"', text)
    return found[1] if found else ""


def source_in(text: str) -> str:
    """The line that is named, see `Instruction.source`."""
    found = _SOURCE.search(text)
    return f"{found[1]}:{found[2]}{found[3] or ''}" if found else ""


def arrays_of(shape: str) -> list[Array]:
    """The arrays in a shape's text."""
    arrays = []
    for dtype, sizes, order, layout in _ARRAY.findall(shape):
        if dtype not in ITEM_BITS:
            raise ValueError(f"{shape}: arrays of {dtype} are not known")
        tile = re.match(r"T\(([\d,]*)\)", layout)
        memory = re.search(r"S\((\d+)\)", layout)
        numbers = _numbers(sizes)
        arrays.append(
            Array(
                dtype,
                numbers,
                _numbers(order) or tuple(reversed(range(len(numbers)))),
                _numbers(tile[1]) if tile else (),
                int(memory[1]) if memory else 0,
            )
        )
    return arrays


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _parsed(line: str) -> tuple[bool, Instruction] | None:
    start = _INSTRUCTION.match(line)
    if start is None:
        return None
    at = start.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opcode = _OPCODE.match(line, end)
    assert opcode is not None, line[:200]
    last = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : last]
    # What a constant or a parameter has in its brackets are numbers.
    operands = tuple(_OPERAND.findall(inside)) if "%" in inside else ()
    attributes = line[last + 1 :] if operands or opcode[1] not in ("constant", "parameter") else inside + line[last:]
    return bool(start[1]), Instruction(start[2], opcode[1], line[at:end], operands, attributes)


def _closing(line: str, at: int) -> int:
    depth = 0
    for index in range(at, len(line)):
        if line[index] == "(":
            depth += 1
        elif line[index] == ")":
            depth -= 1
            if depth == 0:
                return index
    raise ValueError(f"brackets do not close: {line[:200]}")


def _constant(instruction: Instruction) -> int | None:
    if instruction.opcode != "constant":
        return None
    found = re.match(r"-?\d+(?=\))", instruction.attributes)
    return int(found[0]) if found else None


def _index(instruction: Instruction) -> int:
    return int(re.search(r"index=(\d+)", instruction.attributes)[1])  # type: ignore[index]


def _groups(attributes: str) -> list[list[int]]:
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}", attributes)
    if listed:
        return [list(_numbers(group)) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if counted is None:
        return []
    shape, dims, order = (_numbers(part or "") for part in counted.groups())
    import numpy as np

    devices = np.arange(math.prod(dims)).reshape(dims)
    arranged = devices.transpose(order) if order else devices
    groups: list[list[int]] = arranged.reshape(shape).tolist()
    return groups


def _dot_flops(dot: Instruction, left: Array, _: Array) -> int:
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    contracted = math.prod(left.sizes[dim] for dim in _numbers(dims[1] if dims else ""))
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
    if (
        stride == 1
        and pad == 0
        and input_dilation == 1
        and kernel_dilation == 1
        and num_outputs + size - 1 == num_inputs
    ):
        return num_outputs * size
    last = (num_inputs - 1) * input_dilation
    count = 0
    for position in range(size):
        for output in range(num_outputs):
            at = output * stride - pad + position * kernel_dilation
            count += 0 <= at <= last and at % input_dilation == 0
    return count
