"""The order of samples: each once an epoch, the same for any number of hosts, from any step."""

from __future__ import annotations

import random

import numpy as np
import pytest

from rae_xla.data.order import SampleOrder
from rae_xla.errors import UserError


def test_an_epoch_is_every_image_once_though_it_is_killed_and_goes_on_with_other_hosts() -> None:
    drawn = random.Random(0)
    for trial in range(20):
        sizes = [drawn.randint(1, 40) for _ in range(drawn.randint(20, 80))]
        order = SampleOrder(sizes, drawn.choice([8, 24, 64, 256]), drawn.choice([400, 5000]), trial)
        starts = np.cumsum([0, *sizes])
        seen: list[int] = []
        step = 0
        while len(seen) < 3 * order.num_images:
            hosts = drawn.choice([number for number in (1, 2, 4, 8) if order.num_streams % number == 0])
            steps = drawn.randint(1, 2 * order.num_images // order.batch_size + 2)
            parts = [
                [_taken(order, stream, step, steps, starts) for stream in order.streams_of(host, hosts)]
                for host in range(hosts)
            ]
            for number in range(steps):
                each = order.images_per_step
                seen += [i for host in parts for own in host for i in own[number * each : (number + 1) * each]]
            step += steps
        assert seen[: order.batch_size] == _uninterrupted(order, starts)
        for epoch in range(3):
            found = seen[epoch * order.num_images : (epoch + 1) * order.num_images]
            assert sorted(found) == list(range(order.num_images))
        assert seen[: order.num_images] != seen[order.num_images : 2 * order.num_images]


def _taken(order: SampleOrder, stream: int, step: int, steps: int, starts: np.ndarray) -> list[int]:
    """The images that a stream gives to so many steps, as its host reads them."""
    first, wanted, found = step * order.images_per_step, steps * order.images_per_step, list[int]()
    for window in order.windows(stream, step):
        rows = np.concatenate([np.arange(piece.first, piece.end) + starts[piece.block] for piece in window.pieces])
        found += rows[window.rows][max(first - window.position, 0) :].tolist()
        if len(found) >= wanted:
            return found[:wanted]
    raise AssertionError


def _uninterrupted(order: SampleOrder, starts: np.ndarray) -> list[int]:
    return [image for stream in range(order.num_streams) for image in _taken(order, stream, 0, 1, starts)]


def test_neighbours_are_far_apart_and_batches_hold_many_blocks() -> None:
    order = SampleOrder([100] * 12812, 1024, 16384, 0)
    assert order.num_streams == 128 and order.images_per_step == 8 and order.window_images == 128
    blocks = {next(order.windows(stream, 700)).pieces[0].block // 20 for stream in range(order.num_streams)}
    assert len(blocks) > 100, "of as many shards"


def test_hosts_must_share_the_streams() -> None:
    order = SampleOrder([1000] * 10, 64, 4000, 0)
    assert order.num_streams == 4
    with pytest.raises(UserError, match=r"data.stream.shuffle_images: .* 4 streams, which do not divide over 8 hosts"):
        order.streams_of(0, 8)
