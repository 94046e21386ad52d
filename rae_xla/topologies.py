"""Cloud TPU slices by their Cloud names, and what a chip of each generation can do.

Sources. Peak, HBM and network: Google's pages docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. Links, their wrapping
and the one microsecond a hop: "How to Scale Your Model" (jax-ml.github.io/scaling-book), chapter on TPUs; its links are
a tenth slower than the nominal ones, which it finds fits. Clock: the peak over the chip's multipliers, four arrays of
128x128 a core; the compiler's cycles of v6e fit this too. What a program may use of HBM: libtpu 0.0.21's own refusals.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rae_xla.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One generation.

    FLOP/s in bf16, Hz, GiB of HBM that a program may use, bytes/s of HBM, of a link one way, and of the data centre's
    network for one chip. ``cores``: that a Cloud name counts for a chip. ``torus_3d``: three axes, which wrap around if
    all are multiples of 4; else two, of which one wraps around if it has 16 chips.
    """

    platform: str
    peak_flops: float
    clock: float
    hbm_gib: float
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    cores: int
    torus_3d: bool
    chips_per_host: int
    chip_config: str | None = None
    """libtpu's name of it, where it takes a chip's cores for two devices otherwise."""


CHIPS = {
    "v4": Chip(
        platform="v4", peak_flops=275e12, clock=1.05e9, hbm_gib=30.75, hbm_bandwidth=1.2e12, link_bandwidth=4.5e10,
        dcn_bandwidth=6.25e9, cores=2, torus_3d=True, chips_per_host=4, chip_config="megacore",
    ),
    "v5litepod": Chip(
        platform="v5e", peak_flops=197e12, clock=1.5e9, hbm_gib=15.75, hbm_bandwidth=8.19e11, link_bandwidth=4.5e10,
        dcn_bandwidth=3.125e9, cores=1, torus_3d=False, chips_per_host=4,
    ),
    "v5p": Chip(
        platform="v5p", peak_flops=459e12, clock=1.75e9, hbm_gib=95.74, hbm_bandwidth=2.765e12, link_bandwidth=9e10,
        dcn_bandwidth=6.25e9, cores=2, torus_3d=True, chips_per_host=4,
    ),
    "v6e": Chip(
        platform="v6e", peak_flops=918e12, clock=1.75e9, hbm_gib=31.25, hbm_bandwidth=1.638e12, link_bandwidth=9e10,
        dcn_bandwidth=1.25e10, cores=1, torus_3d=False, chips_per_host=4,
    ),
}  # fmt: skip

_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBES = {
    chips: shape
    for shape in (
        (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 4, 12), (4, 8, 8), (8, 8, 8), (8, 8, 12),
        (8, 8, 16), (8, 16, 16), (16, 16, 16), (16, 16, 24),
    )
    for chips in [shape[0] * shape[1] * shape[2]]
}  # fmt: skip
LARGEST = {"v4": 2048, "v5p": 6144, "v5litepod": 256, "v6e": 256}
OTHER_NAMES = {"v5e": "v5litepod"}


@dataclass(frozen=True)
class Topology:
    """``num_slices`` slices of one shape. ``name`` as Cloud names one, with ``2x`` before it for two."""

    name: str
    generation: str
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def chip(self) -> Chip:
        """What each chip can do."""
        return CHIPS[self.generation]

    @property
    def chips_per_slice(self) -> int:
        """Chips that are linked directly."""
        size = 1
        for side in self.shape:
            size *= side
        return size

    @property
    def num_chips(self) -> int:
        """In all slices."""
        return self.chips_per_slice * self.num_slices

    @property
    def hosts_per_slice(self) -> int:
        """Machines, of which each runs the command: eight chips in a plane are one, else four are."""
        return 1 if self.chips_per_slice <= 8 and not self.chip.torus_3d else max(1, self.chips_per_slice // 4)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether the ends of each axis are linked."""
        if self.chip.torus_3d:
            return (all(side % 4 == 0 for side in self.shape),) * len(self.shape)
        return tuple(side == 16 for side in self.shape)

    @property
    def for_compiler(self) -> tuple[str, dict[str, object]]:
        """libtpu's name of it, and options: a part of a host has to say so."""
        options: dict[str, object] = {}
        if self.chip.chip_config is not None:
            options["chip_config_name"] = self.chip.chip_config
        if self.num_slices > 1:
            options["num_slices"] = self.num_slices
        if self.chips_per_slice < self.chip.chips_per_host or self.shape == (2, 2):
            options["chips_per_host_bounds"] = [*self.shape, *[1] * (3 - len(self.shape))]
        return f"{self.chip.platform}:{'x'.join(map(str, self.shape))}", options


def topology(name: str, key: str = "--topology") -> Topology:
    """By a name such as ``v6e-64``, ``v5p-128`` or, for four slices, ``4xv6e-256``; ``key`` is the argument to name.

    The number in ``v4-N`` and ``v5p-N`` counts cores, two a chip; in ``v5litepod-N`` and ``v6e-N`` it counts chips.

    Raises:
        UserError: Cloud has no such slice; names those it has.
    """
    found = re.fullmatch(r"(?:(\d+)x)?(v\w+)-(\d+)", name)
    generation = OTHER_NAMES.get(found[2], found[2]) if found else ""
    if found is None or generation not in CHIPS:
        raise UserError(f"{key}: {name!r} is not known; use a Cloud name such as v6e-64 ({', '.join(CHIPS)}; -N)")
    chip = CHIPS[generation]
    shapes = _CUBES if chip.torus_3d else _FLAT
    chips, rest = divmod(int(found[3]), chip.cores)
    if rest or chips not in shapes or chips > LARGEST[generation]:
        offered = [f"{generation}-{count * chip.cores}" for count in sorted(shapes) if count <= LARGEST[generation]]
        raise UserError(f"{key}: Cloud has no {name!r}; use {', '.join(offered)}")
    num_slices = int(found[1] or 1)
    if num_slices < 1:
        raise UserError(f"{key}: {name!r}: at least one slice")
    return Topology(name, generation, shapes[chips], num_slices)
