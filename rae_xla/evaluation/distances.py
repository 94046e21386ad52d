"""Scores of sets of features, on the host: Fréchet distance, Inception Score, precision and recall; and of images.

Source: ADM's evaluator, arXiv 2105.05233. Differences: distances between features are float32 where
ADM takes float16, and probabilities float64.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cholesky, eigh
from scipy.special import log_softmax

from rae_xla.evaluation.gaussian import Gaussian

# Of the manifold that precision and recall ask about.
NUM_NEIGHBOURS = 3
IMAGES_PER_SPLIT = 5000
ROWS_AT_A_TIME = 1000
# Of a class that nothing is taken for.
SMALLEST = np.finfo(np.float64).tiny


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Wasserstein-2 distance between two Gaussians.

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)). With S1 = A A', the last trace is that of the square root of
    the symmetric A' S2 A, which stays real where the covariances are singular.
    """
    difference = first.mean - second.mean
    root = _root(first.covariance)
    mixed = eigh(root.T @ second.covariance @ root, eigvals_only=True, driver="evd").clip(min=0.0)
    trace = np.trace(first.covariance) + np.trace(second.covariance) - 2.0 * np.sqrt(mixed).sum()
    return float(difference @ difference + trace)


def _root(covariance: np.ndarray) -> np.ndarray:
    """A with S = A A': triangular where S is of full rank, which is the sooner found."""
    try:
        return cholesky(covariance, lower=True)
    except np.linalg.LinAlgError:
        values, vectors = eigh(covariance, driver="evd")
        return vectors * np.sqrt(values.clip(min=0.0))


def inception_score(pool: np.ndarray, weight: np.ndarray) -> float:
    """exp of the mean divergence of predictions from their mean, itself a mean over splits of 5,000 in file order.

    ``pool``: float32 [n, 2048]. ``weight``: of the logits [1008, 2048]; their bias is left out, as ADM does.
    """
    scores = []
    for begin in range(0, len(pool), IMAGES_PER_SPLIT):
        logs = log_softmax(pool[begin : begin + IMAGES_PER_SPLIT].astype(np.float64) @ weight.T, axis=1)
        shares = np.exp(logs)
        divergences = (shares * (logs - np.log(shares.mean(axis=0).clip(min=SMALLEST)))).sum(axis=1)
        scores.append(np.exp(divergences.mean()))
    return float(np.mean(scores))


def precision_and_recall(reference: np.ndarray, samples: np.ndarray, k: int = NUM_NEIGHBOURS) -> tuple[float, float]:
    """Share of samples inside the manifold of the reference, and of the reference inside that of the samples.

    float32 [m, d] and [n, d], more than ``k`` rows each. A manifold is the union of balls around each row that reach to
    its k-th nearest other one (arXiv 1904.06991).
    """
    # Distances of features far from zero would lose digits.
    centre = reference.mean(axis=0, dtype=np.float64).astype(np.float32)
    reference, samples = reference.astype(np.float32) - centre, samples.astype(np.float32) - centre
    return (
        _share_inside(samples, reference, _radii(reference, k)),
        _share_inside(reference, samples, _radii(samples, k)),
    )


def _radii(rows: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each row to its k-th nearest other one, float32 [n]."""
    found = []
    for begin in range(0, len(rows), ROWS_AT_A_TIME):
        squared = _squared_distances(rows[begin : begin + ROWS_AT_A_TIME], rows)
        # A row is its own nearest; rounding is not to decide it.
        own = np.arange(len(squared))
        squared[own, begin + own] = 0.0
        found.append(np.partition(squared, k, axis=1)[:, k])
    return np.concatenate(found)


def _share_inside(rows: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
    inside = 0
    for begin in range(0, len(rows), ROWS_AT_A_TIME):
        squared = _squared_distances(rows[begin : begin + ROWS_AT_A_TIME], centres)
        inside += int((squared <= radii).any(axis=1).sum())
    return inside / len(rows)


def _squared_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    squared = np.square(first).sum(axis=1)[:, None] + np.square(second).sum(axis=1) - 2.0 * (first @ second.T)
    return squared.clip(min=0.0)


def nearest_of(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of ``others`` [m, d] is nearest to each of ``rows`` [n, d]: int [n]."""
    return _squared_distances(rows, others).argmin(axis=1)


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
