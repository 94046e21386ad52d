"""How long transfers between chips take: bytes over the bandwidth of their links, and a time for each hop."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from rae_xla.topologies import Topology

SECONDS_A_HOP = 1e-6


@dataclass(frozen=True)
class _Span:
    """Of an axis, the positions that a group has there, bytes a second that each can get along it, and its length."""

    count: int
    speed: float
    hops: float


class Links:
    """The links of a slice, or of several; ``coordinates`` of each device, one slice after the other."""

    def __init__(self, topology: Topology, coordinates: list[list[int]]) -> None:
        self._topology = topology
        self._coordinates = coordinates

    def gather_seconds(self, num_bytes: int, group: list[int]) -> float:
        """Of an all-gather that makes so many bytes on each chip of a group, all groups at once.

        The axes that a group spans are used together; chips that lie ``n`` apart share their links with ``n`` groups.
        Between slices, each chip sends what its slice has of its part.
        """
        num_slices, spans = self._spans(group)
        size = len(group) // num_slices
        seconds = sum(span.hops for span in spans) * SECONDS_A_HOP
        if spans:
            seconds += num_bytes * (size - 1) / size / sum(span.speed for span in spans)
        return seconds + num_bytes * (num_slices - 1) / num_slices / size / self._topology.chip.dcn_bandwidth

    def exchange_seconds(self, num_bytes: int, group: list[int]) -> float:
        """Of an all-to-all of so many bytes on each chip of a group, all groups at once; one axis after the other.

        Half of what half the chips of a line have crosses its middle, each way; a ring has two middles.
        """
        num_slices, spans = self._spans(group)
        seconds = sum(span.hops * SECONDS_A_HOP + num_bytes * span.count / 4 / span.speed for span in spans)
        return seconds + num_bytes * (num_slices - 1) / num_slices / self._topology.chip.dcn_bandwidth

    def _spans(self, group: list[int]) -> tuple[int, list[_Span]]:
        """The slices that a group lies in, and the axes of one that it spans."""
        topology = self._topology
        slices = {device // topology.chips_per_slice for device in group}
        places = [self._coordinates[device] for device in group if device // topology.chips_per_slice == min(slices)]
        spans = []
        for axis, (side, wraps) in enumerate(zip(topology.shape, topology.wraps, strict=True)):
            positions = sorted({place[axis] for place in places})
            if len(positions) > 1:
                apart = (positions[-1] - positions[0]) / (len(positions) - 1)
                is_ring = wraps and apart * len(positions) == side
                speed = topology.chip.link_bandwidth * (2 if is_ring else 1) / apart
                spans.append(_Span(len(positions), speed, side / 2 if is_ring else positions[-1] - positions[0]))
        return len(slices), spans

    def permutation_seconds(self, num_bytes: int, pairs: list[list[int]]) -> float:
        """Of so many bytes from each sender to its receiver: the busiest link's load; one axis after the other."""
        topology = self._topology
        load: Counter[tuple[tuple[int, ...], int, int]] = Counter()
        most_hops, crosses = 0, False
        for sender, receiver in pairs:
            if sender // topology.chips_per_slice != receiver // topology.chips_per_slice:
                crosses = True
                continue
            place, target = list(self._coordinates[sender]), self._coordinates[receiver]
            hops = 0
            for axis, (side, wraps) in enumerate(zip(topology.shape, topology.wraps, strict=True)):
                ahead = target[axis] - place[axis]
                if wraps and abs(ahead) > side / 2:
                    ahead -= int(math.copysign(side, ahead))
                direction = 1 if ahead > 0 else -1
                for _ in range(abs(ahead)):
                    load[tuple(place), axis, direction] += 1
                    place[axis] = (place[axis] + direction) % side
                    hops += 1
            most_hops = max(most_hops, hops)
        seconds = most_hops * SECONDS_A_HOP + max(load.values(), default=0) * num_bytes / topology.chip.link_bandwidth
        return seconds + (num_bytes / topology.chip.dcn_bandwidth if crosses else 0.0)
