"""The Fréchet distance as it is computed here, and with scipy's square root of the product of both covariances."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from scipy.linalg import sqrtm

from rae_xla.evaluation.distances import frechet_distance
from rae_xla.evaluation.gaussian import Gaussian

WIDTH = 2048
# More than features, so that both covariances are of full rank.
NUM_IMAGES = 5000
NUM_PAIRS = 3


def frechet() -> dict[str, Any]:
    """Seconds of both, one after the other, three times; medians."""
    first, second = _gaussian(0, 0.0), _gaussian(1, 0.1)
    seconds: dict[str, list[float]] = {"seconds": [], "scipy_seconds": []}
    distances = {}
    for _ in range(NUM_PAIRS):
        for name, distance in (("seconds", frechet_distance), ("scipy_seconds", with_sqrtm)):
            start = time.perf_counter()
            distances[name] = distance(first, second)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    scipys = distances["scipy_seconds"]
    return {
        **medians,
        "ratio": medians["scipy_seconds"] / medians["seconds"],
        "relative_difference": abs(distances["seconds"] - scipys) / scipys,
        "width": WIDTH,
        "num_images": NUM_IMAGES,
        "pairs": NUM_PAIRS,
    }


def with_sqrtm(first: Gaussian, second: Gaussian) -> float:
    """The same, as it is usually written."""
    difference = first.mean - second.mean
    root = sqrtm(first.covariance @ second.covariance)
    return float(difference @ difference + np.trace(first.covariance + second.covariance) - 2 * np.trace(root).real)


def _gaussian(seed: int, shift: float) -> Gaussian:
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH)
    return Gaussian.of(generator.normal(size=(NUM_IMAGES, WIDTH)) @ mixing + shift)
