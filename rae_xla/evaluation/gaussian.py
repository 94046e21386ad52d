"""The Gaussian fitted to a set of features, which Fréchet distances compare; float64 on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gaussian:
    """``mean`` float64 [d], ``covariance`` float64 [d, d] over n - 1, and ``count``, n, if it is known."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None

    @staticmethod
    def of(features: np.ndarray) -> Gaussian:
        """Of the rows of [n, d], at least two."""
        rows = features.astype(np.float64)
        mean = rows.mean(axis=0)
        rows -= mean
        return Gaussian(mean, rows.T @ rows / (len(rows) - 1), len(rows))


@dataclass(frozen=True)
class Scatter:
    """Count, mean float64 [d], and the sum of outer products of what rows differ from it by, float64 [d, d].

    Of a set that is read once and does not fit into memory. Batches are merged as Chan, Golub and LeVeque do (1979), so
    that the answer does not depend on their sizes.
    """

    count: int
    mean: np.ndarray
    products: np.ndarray

    @staticmethod
    def none(width: int) -> Scatter:
        """Of no rows."""
        return Scatter(0, np.zeros(width), np.zeros((width, width)))

    def with_rows(self, features: np.ndarray) -> Scatter:
        """And of the rows of [n, d], at least one."""
        rows = features.astype(np.float64)
        mean = rows.mean(axis=0)
        rows -= mean
        return self.merge(Scatter(len(rows), mean, rows.T @ rows))

    def merge(self, other: Scatter) -> Scatter:
        """Of both sets of rows together."""
        count = self.count + other.count
        if not count:
            return self
        difference = other.mean - self.mean
        products = self.products + other.products
        products += np.outer(difference, difference) * (self.count * other.count / count)
        return Scatter(count, self.mean + difference * (other.count / count), products)

    def gaussian(self) -> Gaussian:
        """Of at least two rows."""
        return Gaussian(self.mean, self.products / (self.count - 1), self.count)
