"""Distances between sets of features, in float64 on the host."""

from __future__ import annotations

import numpy as np


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Wasserstein-2 distance between Gaussians fitted to the rows of two [n, d] arrays.

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)), covariances over n - 1. With S1 = A A', the last trace
    is that of the square root of the symmetric A' S2 A, which stays real where the covariances are singular.
    """
    first, second = first.astype(np.float64), second.astype(np.float64)
    difference = first.mean(axis=0) - second.mean(axis=0)
    covariance1, covariance2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    values, vectors = np.linalg.eigh(covariance1)
    root = vectors * np.sqrt(values.clip(min=0.0))
    mixed = np.linalg.eigvalsh(root.T @ covariance2 @ root).clip(min=0.0)
    trace = np.trace(covariance1) + np.trace(covariance2) - 2.0 * np.sqrt(mixed).sum()
    return float(difference @ difference + trace)


def nearest_neighbour_distances(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each image the root-mean-square distance in grey levels to the nearest other one of its class.

    uint8 [n, ...], int [n] -> float64 [n]; infinite for the only one of a class.
    """
    distances = np.full(len(images), np.inf)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rows = images[members].reshape(len(members), -1).astype(np.float64)
        norms = np.square(rows).sum(axis=1)
        squared = norms[:, None] + norms[None, :] - 2.0 * rows @ rows.T
        np.fill_diagonal(squared, np.inf)
        distances[members] = np.sqrt(squared.min(axis=1).clip(min=0.0) / rows.shape[1])
    return distances


def identical_images(images: np.ndarray) -> int:
    """How many of uint8 [n, ...] are an exact copy of an earlier one."""
    return len(images) - len({image.tobytes() for image in images})
