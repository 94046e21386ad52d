"""Threefry against its published test vectors, and what the numbers must be for training."""

from __future__ import annotations

import torch

from rae_xla.random import Purpose, normal, threefry2x32, uniform


def signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def test_known_answers_of_random123() -> None:
    ones, pi = 0xFFFFFFFF, (0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3)
    known = [
        ((0, 0, 0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ones, ones, ones, ones), (0x1CB996FC, 0xBB002BE7)),
        (pi, (0xC4923A9C, 0x483DF7A0)),
    ]
    for (key0, key1, counter0, counter1), expected in known:
        counters = [torch.tensor([signed(c)], dtype=torch.int32) for c in (counter0, counter1)]
        words = threefry2x32((signed(key0), signed(key1)), *counters)
        assert tuple(word.item() & 0xFFFFFFFF for word in words) == expected


def test_a_row_does_not_depend_on_its_batch() -> None:
    rows = torch.arange(64, dtype=torch.int32)
    whole = normal(3, Purpose.FLOW_NOISE, rows, (5, 3))
    torch.testing.assert_close(normal(3, Purpose.FLOW_NOISE, rows[40:48], (5, 3)), whole[40:48], rtol=0, atol=0)
    assert not torch.equal(normal(4, Purpose.FLOW_NOISE, rows, (5, 3)), whole)
    assert not torch.equal(normal(3, Purpose.INITIAL_NOISE, rows, (5, 3)), whole)


def test_moments() -> None:
    rows = torch.arange(2000, dtype=torch.int32)
    numbers = normal(0, Purpose.FLOW_NOISE, rows, (101,)).double()
    assert abs(numbers.mean()) < 0.01 and abs(numbers.var() - 1) < 0.01 and abs((numbers**4).mean() - 3) < 0.1
    assert abs((numbers[:, 1:] * numbers[:, :-1]).mean()) < 0.01
    fractions = uniform(0, Purpose.FLOW_TIME, rows, (101,)).double()
    assert fractions.min() >= 0 and fractions.max() < 1
    assert abs(fractions.mean() - 0.5) < 0.005 and abs(fractions.var() - 1 / 12) < 0.002
