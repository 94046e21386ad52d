"""How long a compiled program takes on its chips, estimated.

The order is a fact: the compiler's schedule. The length of what runs on a chip's core is the compiler's own estimate,
in cycles. Transfers between chips, for which it gives none, take their bytes over the bandwidth of the links that they
use, and transfers between HBM and the core's memory theirs over HBM's. What is asynchronous in the schedule overlaps:
the core waits where it says ``-done``, and only as long as the transfer is not over.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Literal

from rae_xla.preflight.hlo import NAMES, Computation, Instruction, Module
from rae_xla.preflight.links import Links
from rae_xla.topologies import Topology

Lane = Literal["core", "links", "slices", "memory"]

# What costs nothing by itself.
_FREE = (
    *NAMES, "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency", "iota", "send",
)  # fmt: skip
_FREE_CUSTOM_CALLS = ("AllocateBuffer", "ConcatBitcast", "Sharding", "X64")
BETWEEN_SLICES = "between slices"


@dataclass(frozen=True)
class Event:
    """Something that takes time, from ``start`` on, in seconds."""

    lane: Lane
    start: float
    seconds: float
    instruction: Instruction


@dataclass
class Estimate:
    """Seconds of one run. ``waits``: the core for transfers between chips; ``memory_waits``: for its own memory.

    Bytes that a chip sends and seconds on the links are by kind and mesh axis.
    """

    seconds: float = 0.0
    compute: float = 0.0
    waits: float = 0.0
    memory_waits: float = 0.0
    events: list[Event] = field(default_factory=list)
    bytes_by_collective: Counter[str] = field(default_factory=Counter)
    seconds_by_collective: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


class Estimator:
    """Runs a module's schedule, every turn of every loop. ``mesh``: device numbers by data and fsdp."""

    def __init__(self, module: Module, topology: Topology, coordinates: list[list[int]], mesh: list[list[int]]) -> None:
        self._module = module
        self._chip = topology.chip
        self._links = Links(topology, coordinates)
        self._mesh = [set(group) for group in mesh], [set(group) for group in zip(*mesh, strict=True)]
        self._found = Estimate()
        self._free_at: dict[Lane, float] = {"links": 0.0, "slices": 0.0, "memory": 0.0}
        self._core: dict[int, float] = {}
        self._transfers: dict[int, tuple[str, int, float]] = {}

    def estimate(self) -> Estimate:
        """Of one run of the program."""
        self._found.seconds = self._run(self._module.entry, 0.0)
        return self._found

    def _run(self, computation: Computation, now: float) -> float:
        """The time when a computation that starts ``now`` is over."""
        arrives: dict[str, float] = {}
        from_memory: set[str] = set()
        for instruction in computation.instructions:
            opcode = instruction.opcode
            collective = self._module.collective(instruction)
            if opcode == "while":
                for _ in range(self._module.trip_count(instruction, computation)):
                    now = self._run(self._module.computations[instruction.body], now)
            elif opcode in ("call", "conditional"):
                # Of a conditional's branches, the longest.
                now = max(self._run(self._module.computations[name], now) for name in instruction.called)
            elif instruction.name.startswith("async-collective-start") and collective:
                arrives[collective[0].channel] = self._start("links", now, instruction, self._transfer(*collective))
            elif instruction.name.startswith("async-collective-done") and collective:
                now = self._wait(now, arrives.get(collective[0].channel, now))
            elif opcode == "recv":
                arrives[instruction.name] = self._start("slices", now, instruction, self._between_slices(instruction))
            elif opcode in ("recv-done", "send-done"):
                now = self._wait(now, arrives.get(instruction.operands[0], now))
            elif opcode.endswith("-start"):
                if collective:
                    arrives[instruction.name] = self._start("links", now, instruction, self._transfer(*collective))
                else:
                    seconds = self._copied(instruction) / self._chip.hbm_bandwidth
                    arrives[instruction.name] = self._start("memory", now, instruction, seconds)
                    from_memory.add(instruction.name)
            elif opcode.endswith("-done"):
                started = instruction.operands[0]
                now = self._wait(now, arrives.get(started, now), of_memory=started in from_memory)
            elif collective and (opcode != "fusion" or instruction.cycles is None):
                now = self._wait(now, self._start("links", now, instruction, self._transfer(*collective)))
            else:
                seconds = self._core_seconds(instruction, computation)
                if seconds:
                    self._found.events.append(Event("core", now, seconds, instruction))
                    self._found.compute += seconds
                    now += seconds
        return now

    def _start(self, lane: Lane, now: float, instruction: Instruction, seconds: float) -> float:
        """When a transfer is over that follows those before it on its lane."""
        begin = max(now, self._free_at[lane])
        self._free_at[lane] = begin + seconds
        if seconds:
            self._found.events.append(Event(lane, begin, seconds, instruction))
        return begin + seconds

    def _wait(self, now: float, until: float, *, of_memory: bool = False) -> float:
        waited = max(0.0, until - now)
        if of_memory:
            self._found.memory_waits += waited
        else:
            self._found.waits += waited
        return now + waited

    def _core_seconds(self, instruction: Instruction, computation: Computation) -> float:
        key = id(instruction)
        if key not in self._core:
            self._core[key] = self._computed_seconds(instruction, computation)
        return self._core[key]

    def _computed_seconds(self, instruction: Instruction, computation: Computation) -> float:
        if instruction.cycles is not None:
            return instruction.cycles / self._chip.clock
        if instruction.opcode in _FREE:
            return 0.0
        if instruction.opcode == "custom-call" and any(name in instruction.attributes for name in _FREE_CUSTOM_CALLS):
            return 0.0
        # No estimate of the compiler's: what it reads and writes.
        operands = [computation.by_name[name] for name in instruction.operands if name in computation.by_name]
        return sum(self._bytes_in_memory(i) for i in [*operands, instruction]) / self._chip.hbm_bandwidth

    @staticmethod
    def _bytes_in_memory(instruction: Instruction) -> int:
        return sum(array.bytes for array in instruction.arrays if array.memory == 0)

    @staticmethod
    def _copied(instruction: Instruction) -> int:
        # (destination, source, context)
        return min((array.bytes for array in instruction.arrays[:2]), default=0)

    def _between_slices(self, receive: Instruction) -> float:
        num_bytes = receive.arrays[0].bytes
        seconds = num_bytes / self._chip.dcn_bandwidth
        self._found.bytes_by_collective[BETWEEN_SLICES] += num_bytes
        self._found.seconds_by_collective[BETWEEN_SLICES] += seconds
        return seconds

    def _transfer(self, collective: Instruction, computation: Computation) -> float:
        key = id(collective)
        if key not in self._transfers:
            self._transfers[key] = self._priced(collective, computation)
        label, num_bytes, seconds = self._transfers[key]
        self._found.bytes_by_collective[label] += num_bytes
        self._found.seconds_by_collective[label] += seconds
        return seconds

    def _priced(self, collective: Instruction, computation: Computation) -> tuple[str, int, float]:
        """Kind and axis, bytes that a chip sends, seconds."""
        kind = collective.opcode.removesuffix("-start")
        num_bytes = sum(array.bytes for name in collective.operands for array in computation.by_name[name].arrays)
        groups = collective.groups or [sorted(set().union(*self._mesh[0]))]
        if kind == "collective-permute":
            return kind, num_bytes, self._links.permutation_seconds(num_bytes, groups)
        size = len(groups[0])
        if size == 1:
            return kind, 0, 0.0
        if computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        label = f"{kind} over {self._axis(groups[0])}"
        if kind == "all-to-all":
            return label, round(num_bytes * (size - 1) / size), self._links.exchange_seconds(num_bytes, groups[0])
        # What the group has or makes together, and how often it goes round.
        together = num_bytes * size if kind == "all-gather" else num_bytes
        rounds = 2.0 if kind == "all-reduce" else 1.0
        sent = round(rounds * together * (size - 1) / size)
        return label, sent, rounds * self._links.gather_seconds(together, groups[0])

    def _axis(self, group: list[int]) -> str:
        of_fsdp, of_data = self._mesh
        if len(group) == len(of_fsdp) * len(of_data):
            return f"all {len(group)}"
        if set(group) in of_fsdp:
            return f"fsdp {len(group)}"
        if set(group) in of_data:
            return f"data {len(group)}"
        return f"{len(group)} chips"
