"""Random numbers that are a pure function of (seed, purpose, row, element): Threefry-2x32 with 20 rounds.

Nothing here has a state. A row's numbers depend neither on the batch it is in, nor on how the batch is spread over
devices, nor on what was drawn before, so a resumed run, another mesh and the eager runtime draw the same ones, and the
arithmetic is elementwise: every device makes only its own rows. In training a row is a sample's position in the run; in
sampling it is the index of the sample.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_KEY_PARITY = 0x1BD11BDA


class Purpose(IntEnum):
    """What a number is drawn for; each has a stream of its own. Never renumber: runs replay by these values."""

    FLOW_TIME = 1
    FLOW_NOISE = 2
    LABEL_DROPOUT = 3
    LATENT_NOISE = 4
    LATENT_NOISE_SCALE = 5
    INITIAL_NOISE = 6
    IMAGE_SHIFT = 7
    IMAGE_FLIP = 8
    IMAGE_CROP = 9
    AUGMENT_REAL = 10
    AUGMENT_FAKE = 11
    AUGMENT_DECODED = 12
    SAMPLER_NOISE = 13
    SAMPLE_LABEL = 14


def uniform(seed: int, purpose: Purpose, rows: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Float32 [B, *shape], uniform on [0, 1) in steps of 2^-24; ``rows`` int32 [B]."""
    first, second = _words(seed, purpose, rows, _halves(shape))
    return _shaped(torch.cat([_unit(first), _unit(second)], dim=1), shape)


def normal(
    seed: int, purpose: Purpose, rows: Tensor, shape: tuple[int, ...] = (), draw: Tensor | None = None
) -> Tensor:
    """Float32 [B, *shape], standard normal by the Box-Muller transform; ``rows`` int32 [B].

    ``draw``: an int32 number, for rows that draw more than once for a purpose; as many as fit 2^31 elements. No value
    is larger than 5.77 in magnitude: the uniforms underneath have 24 bits.
    """
    first, second = _words(seed, purpose, rows, _halves(shape), draw)
    radius = (-2.0 * (1.0 - _unit(first)).log()).sqrt()
    angle = (2.0 * math.pi) * _unit(second)
    return _shaped(torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1), shape)


def _halves(shape: tuple[int, ...]) -> int:
    return (math.prod(shape) + 1) // 2


def _shaped(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat[:, : math.prod(shape)].reshape(flat.shape[0], *shape)


def _unit(words: Tensor) -> Tensor:
    return _shift_right(words, 8).float() * 2.0**-24


def _words(seed: int, purpose: Purpose, rows: Tensor, count: int, draw: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Two int32 [B, count] of random bits."""
    elements = torch.arange(count, dtype=torch.int32, device=rows.device)
    if draw is not None:
        elements = elements + draw * count
    key = (_as_int32(seed), _as_int32((seed >> 32) ^ int(purpose)))
    return threefry2x32(key, rows.to(torch.int32)[:, None].expand(-1, count), elements.expand(rows.shape[0], -1))


def threefry2x32(key: tuple[int, int], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The block cipher on two int32 tensors of equal shape, 20 rounds, arithmetic modulo 2^32."""
    keys = (key[0], key[1], _as_int32(_KEY_PARITY ^ key[0] ^ key[1]))
    first, second = first + keys[0], second + keys[1]
    for injection in range(5):
        for rotation in _ROTATIONS[injection % 2]:
            first = first + second
            second = _rotate_left(second, rotation) ^ first
        first = first + keys[(injection + 1) % 3]
        second = second + _as_int32(keys[(injection + 2) % 3] + injection + 1)
    return first, second


def _rotate_left(x: Tensor, bits: int) -> Tensor:
    return (x << bits) | _shift_right(x, 32 - bits)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # A shift without sign. `>>` of a negative number copies its sign in PyTorch, and in torch_xla 2.9 divides, rounding
    # towards zero; of the number without its sign bit both shift.
    sign = (x < 0).to(torch.int32) << (31 - bits)
    return ((x & 0x7FFFFFFF) >> bits) | sign


def _as_int32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31
