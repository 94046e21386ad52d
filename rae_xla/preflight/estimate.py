"""How long a compiled program takes on its chips, estimated.

The order is a fact: the compiler's schedule. The length of what runs on a chip's core is the compiler's own estimate,
in cycles. Transfers between chips, for which it gives none, take their bytes over the bandwidth of the links that they
use, and transfers between HBM and the core's memory theirs over HBM's. What is asynchronous in the schedule overlaps:
the core waits where it says ``-done``, and only as long as the transfer is not over.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Literal

from rae_xla.preflight.hlo import Computation, Instruction, Module
from rae_xla.preflight.topologies import Topology

Lane = Literal["core", "links", "memory"]

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# Names for what is there already, and what costs nothing by itself.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "add-dependency", "iota", "while", "call", "conditional",
)  # fmt: skip
_FREE_CUSTOM_CALLS = ("AllocateBuffer", "ConcatBitcast", "Sharding", "X64")
SECONDS_A_HOP = 1e-6
# A loop's turns beyond these are one block of the timeline.
TURNS_SHOWN = 4


@dataclass(frozen=True)
class Event:
    """Something that takes time, from ``start`` on, in seconds."""

    name: str
    lane: Lane
    start: float
    seconds: float
    instruction: Instruction | None = None


@dataclass
class Estimate:
    """Seconds of one run. ``waits``: the core for transfers between chips; ``memory_waits``: for its own memory."""

    seconds: float = 0.0
    compute: float = 0.0
    waits: float = 0.0
    memory_waits: float = 0.0
    events: list[Event] = field(default_factory=list)
    bytes_by_collective: Counter[str] = field(default_factory=Counter)
    seconds_by_collective: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


class _Transfers:
    """A lane on which one transfer follows another."""

    def __init__(self) -> None:
        self.free_at = 0.0

    def start(self, now: float, seconds: float) -> tuple[float, float]:
        begin = max(now, self.free_at)
        self.free_at = begin + seconds
        return begin, self.free_at


class Estimator:
    """Runs a module's schedule."""

    def __init__(self, module: Module, topology: Topology, coordinates: list[list[int]]) -> None:
        self._module = module
        self._topology = topology
        self._coordinates = [tuple(c) for c in coordinates]
        self._found = Estimate()
        self._links, self._memory = _Transfers(), _Transfers()

    def estimate(self) -> Estimate:
        """Of one run of the program."""
        self._found.seconds = self._run(self._module.entry, 0.0, 1, show=True)
        return self._found

    def _run(self, computation: Computation, now: float, times: int, *, show: bool) -> float:
        """The time when a computation that starts ``now`` is over; it counts as ``times`` runs."""
        arrives: dict[str, float] = {}
        for instruction in computation.instructions:
            opcode = instruction.opcode
            if opcode == "while":
                now = self._loop(instruction, computation, now, times, show=show)
            elif opcode == "call":
                for name in instruction.called:
                    now = self._run(self._module.computations[name], now, times, show=show)
            elif self._is_fused(instruction, "async-collective-start"):
                arrives[self._channel(instruction)] = self._start_fused(instruction, now, times, show=show)
            elif self._is_fused(instruction, "async-collective-done"):
                waited = max(0.0, arrives.get(self._channel(instruction), now) - now)
                self._found.waits += waited * times
                now += waited
            elif opcode.endswith("-start"):
                arrives[instruction.name] = self._start(instruction, computation, now, times, show=show)
            elif opcode.endswith("-done"):
                now = self._await(instruction, arrives, now, times)
            elif opcode.removesuffix("-start") in COLLECTIVES:
                seconds = self._collective_seconds(instruction, computation, times)
                begin, end = self._links.start(now, seconds)
                self._show(instruction, "links", begin, seconds, show)
                self._found.waits += (end - now) * times
                now = end
            else:
                seconds = self._core_seconds(instruction, computation)
                if seconds:
                    self._show(instruction, "core", now, seconds, show)
                    self._found.compute += seconds * times
                    now += seconds
        return now

    def _loop(self, loop: Instruction, within: Computation, now: float, times: int, *, show: bool) -> float:
        trips = self._module.trip_count(loop, within)
        body = self._module.computations[next(n for n in loop.called if f"body=%{n}" in loop.attributes)]
        shown = min(trips, TURNS_SHOWN)
        start = now
        for turn in range(shown):
            # The last turn that is run stands for all that are left.
            left = trips - shown if turn == shown - 1 else 0
            before = now
            now = self._run(body, now, times * (1 + left), show=show)
            if left:
                rest = (now - before) * left
                self._show(loop, "core", now, rest, show)
                now += rest
        del start
        return now

    def _start(
        self, instruction: Instruction, computation: Computation, now: float, times: int, *, show: bool
    ) -> float:
        kind = instruction.opcode.removesuffix("-start")
        if kind == "async":
            inner = [i for name in instruction.called for i in self._module.computations[name].instructions]
            wrapped = next((i for i in inner if i.opcode in COLLECTIVES), None)
            if wrapped is not None:
                seconds = self._collective_seconds(wrapped, self._module.computations[instruction.called[0]], times)
            else:
                seconds = self._bytes_in_memory(instruction) / self._topology.chip.hbm_bandwidth
            lane: Lane = "links" if wrapped is not None else "memory"
        elif kind in COLLECTIVES:
            seconds, lane = self._collective_seconds(instruction, computation, times), "links"
        else:
            # copy-start and slice-start: (destination, source, context)
            seconds, lane = self._copied(instruction) / self._topology.chip.hbm_bandwidth, "memory"
        transfers = self._links if lane == "links" else self._memory
        begin, end = transfers.start(now, seconds)
        self._show(instruction, lane, begin, seconds, show)
        return end

    @staticmethod
    def _is_fused(instruction: Instruction, name: str) -> bool:
        return instruction.opcode == "fusion" and instruction.name.startswith(name)

    def _inner(self, fusion: Instruction) -> tuple[Instruction, Computation]:
        """The collective that is started, carried on or ended by a fusion, which computes something else meanwhile."""
        computation = self._module.computations[fusion.called[0]]
        return next(i for i in computation.instructions if i.opcode in COLLECTIVES), computation

    def _channel(self, fusion: Instruction) -> str:
        return self._inner(fusion)[0].channel

    def _start_fused(self, fusion: Instruction, now: float, times: int, *, show: bool) -> float:
        seconds = self._collective_seconds(*self._inner(fusion), times)
        begin, end = self._links.start(now, seconds)
        self._show(fusion, "links", begin, seconds, show)
        return end

    def _await(self, instruction: Instruction, arrives: dict[str, float], now: float, times: int) -> float:
        started = instruction.operands[0]
        waited = max(0.0, arrives.get(started, now) - now)
        if any(instruction.opcode.startswith(kind) for kind in COLLECTIVES) or instruction.opcode == "async-done":
            self._found.waits += waited * times
        else:
            self._found.memory_waits += waited * times
        return now + waited

    def _show(self, instruction: Instruction, lane: Lane, start: float, seconds: float, show: bool) -> None:
        if show and seconds:
            self._found.events.append(Event(instruction.name, lane, start, seconds, instruction))

    def _core_seconds(self, instruction: Instruction, computation: Computation) -> float:
        cycles = instruction.cycles
        if cycles is not None:
            return cycles / self._topology.chip.clock
        if instruction.opcode in _FREE:
            return 0.0
        if instruction.opcode == "custom-call" and any(name in instruction.attributes for name in _FREE_CUSTOM_CALLS):
            return 0.0
        # No estimate of the compiler's: what it reads and writes.
        read = sum(
            array.bytes
            for name in instruction.operands
            if name in computation.by_name
            for array in computation.by_name[name].arrays
            if array.memory == 0
        )
        return (read + self._bytes_in_memory(instruction)) / self._topology.chip.hbm_bandwidth

    @staticmethod
    def _bytes_in_memory(instruction: Instruction) -> int:
        return sum(array.bytes for array in instruction.arrays if array.memory == 0)

    @staticmethod
    def _copied(instruction: Instruction) -> int:
        arrays = instruction.arrays
        return min((array.bytes for array in arrays[:2]), default=0)

    def _collective_seconds(self, instruction: Instruction, computation: Computation, times: int) -> float:
        kind = instruction.opcode.removesuffix("-start")
        operands = [a for n in instruction.operands for a in computation.by_name[n].arrays]
        num_bytes = sum(array.bytes for array in operands)
        groups = instruction.groups or [list(range(len(self._coordinates)))]
        if kind == "collective-permute":
            seconds = self._permutation_seconds(num_bytes, groups)
            label, moved = kind, num_bytes
        else:
            size = len(groups[0])
            label = f"{kind} over {size}"
            # The array that the group has or makes together.
            whole = num_bytes * size if kind in ("all-gather", "all-to-all") else num_bytes
            factor = {"all-reduce": 2.0, "all-to-all": 0.25}.get(kind, 1.0)
            moved = round(factor * whole * (size - 1) / max(size, 1))
            seconds = factor * self._gather_seconds(whole, groups[0]) if size > 1 else 0.0
        self._found.bytes_by_collective[label] += moved * times
        self._found.seconds_by_collective[label] += seconds * times
        return seconds

    def _gather_seconds(self, num_bytes: int, group: list[int]) -> float:
        """Of an all-gather that makes so many bytes; the axes that the group spans are used together."""
        chip, topology = self._topology.chip, self._topology
        places = [self._coordinates[device] for device in group]
        per_slice = topology.chips_per_slice
        num_slices = len({device // per_slice for device in group})
        spans = [len({place[axis] for place in places}) for axis in range(len(topology.shape))]
        speed, hops = 0.0, 0.0
        for span, side, wraps in zip(spans, topology.shape, topology.wraps, strict=True):
            if span > 1:
                ring = wraps and span == side
                speed += chip.link_bandwidth * (2 if ring else 1)
                hops += span / 2 if ring else span - 1
        size = len(group) // num_slices
        seconds = hops * SECONDS_A_HOP
        if speed:
            seconds += num_bytes / num_slices * (size - 1) / size / speed
        if num_slices > 1:
            seconds += num_bytes * (num_slices - 1) / num_slices / size / chip.dcn_bandwidth
        return seconds

    def _permutation_seconds(self, num_bytes: int, pairs: list[list[int]]) -> float:
        """The busiest link's load, each message going along one axis after the other."""
        load: Counter[tuple[tuple[int, ...], int, int]] = Counter()
        most_hops, crosses = 0, False
        for sender, receiver in pairs:
            if sender // self._topology.chips_per_slice != receiver // self._topology.chips_per_slice:
                crosses = True
                continue
            place, target = list(self._coordinates[sender]), self._coordinates[receiver]
            hops = 0
            for axis, (side, wraps) in enumerate(zip(self._topology.shape, self._topology.wraps, strict=True)):
                ahead = target[axis] - place[axis]
                if wraps and abs(ahead) > side / 2:
                    ahead -= int(math.copysign(side, ahead))
                direction = 1 if ahead > 0 else -1
                for _ in range(abs(ahead)):
                    load[tuple(place), axis, direction] += 1
                    place[axis] = (place[axis] + direction) % side
                    hops += 1
            most_hops = max(most_hops, hops)
        seconds = most_hops * SECONDS_A_HOP
        seconds += max(load.values(), default=0) * num_bytes / self._topology.chip.link_bandwidth
        return seconds + (num_bytes / self._topology.chip.dcn_bandwidth if crosses else 0.0)
