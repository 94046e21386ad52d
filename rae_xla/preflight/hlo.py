"""Reads the text of a compiled HLO module: instructions with shapes and bytes, loops, transfers, the compiler's cycles.

Facts here are the compiler's: layouts, the schedule (the order of a computation's instructions) and estimated cycles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

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
# Names for what is there already.
NAMES = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
PRODUCTS = ("convolution", "dot")
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

    def collective(self, instruction: Instruction) -> tuple[Instruction, Computation] | None:
        """The transfer between chips that an instruction is, or starts, carries on or ends, and where it stands."""
        if instruction.opcode.removesuffix("-start") in COLLECTIVES:
            return instruction, self.within(instruction)
        if instruction.opcode not in ("fusion", "async-start", "call-start"):
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

    def within(self, instruction: Instruction) -> Computation:
        """Where an instruction stands."""
        return self._home[id(instruction)]

    @cached_property
    def _home(self) -> dict[int, Computation]:
        return {id(i): computation for computation in self.computations.values() for i in computation.instructions}

    def fused(self, fusion: Instruction) -> Iterator[Instruction]:
        """What a fusion does, those inside it included, but not the fusions themselves."""
        for instruction in self.computations[fusion.called[0]].instructions:
            if instruction.opcode == "fusion":
                yield from self.fused(instruction)
            else:
                yield instruction


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
        numbers = numbers_in(sizes)
        arrays.append(
            Array(
                dtype,
                numbers,
                numbers_in(order) or tuple(reversed(range(len(numbers)))),
                numbers_in(tile[1]) if tile else (),
                int(memory[1]) if memory else 0,
            )
        )
    return arrays


def numbers_in(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
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
        return [list(numbers_in(group)) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if counted is None:
        return []
    shape, dims, order = (numbers_in(part or "") for part in counted.groups())
    devices = np.arange(math.prod(dims)).reshape(dims)
    arranged = devices.transpose(order) if order else devices
    groups: list[list[int]] = arranged.reshape(shape).tolist()
    return groups
