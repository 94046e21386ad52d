"""Scores of features against independent code and by hand, and the usual mistakes; each would fail here."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from scipy import linalg

from rae_xla.errors import UserError
from rae_xla.evaluation import distances
from rae_xla.evaluation.batches import gathered
from rae_xla.evaluation.distances import frechet_distance, inception_score, precision_and_recall
from rae_xla.evaluation.gaussian import Gaussian, Scatter
from rae_xla.evaluation.scores import check_enough, warn_of_order
from rae_xla.evaluation.similarity import as_unit, psnr, ssim
from rae_xla.hosts import Hosts
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig


def rows(num: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) / np.sqrt(width)
    return (generator.normal(size=(num, width)) @ mixing + shift).astype(np.float32)


def exact_distance_of_few(first: np.ndarray, second: np.ndarray) -> float:
    """The mixed trace is a nuclear norm of centred rows; no covariance is made."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    mean1, mean2 = first.mean(axis=0), second.mean(axis=0)
    first, second = first - mean1, second - mean2
    degrees1, degrees2 = len(first) - 1, len(second) - 1
    traces = np.square(first).sum() / degrees1 + np.square(second).sum() / degrees2
    mixed = np.linalg.norm(first @ second.T, "nuc") / np.sqrt(degrees1 * degrees2)
    return float(np.square(mean1 - mean2).sum() + traces - 2 * mixed)


@pytest.mark.parametrize(("width", "first", "second"), [(64, 20, 30), (64, 40, 300), (700, 50, 60)])
def test_frechet_distance_of_few_images_is_exact(width: int, first: int, second: int) -> None:
    one, other = rows(first, width, 0), rows(second, width, 1, 0.3)
    found = frechet_distance(Gaussian.of(one), Gaussian.of(other))
    assert found == pytest.approx(frechet_distance(Gaussian.of(other), Gaussian.of(one)), rel=1e-5)
    assert found == pytest.approx(exact_distance_of_few(one, other), rel=1e-5)
    over_n = [Gaussian(g.mean, g.covariance * (g.count - 1) / g.count, g.count) for g in map(Gaussian.of, (one, other))]
    assert frechet_distance(*over_n) != pytest.approx(found, rel=1e-3), "covariances over n would be told"


def test_frechet_distance_is_scipys_on_full_rank() -> None:
    one, other = Gaussian.of(rows(900, 128, 0)), Gaussian.of(rows(1100, 128, 1, 0.1))
    root = linalg.sqrtm(one.covariance @ other.covariance).real
    difference = one.mean - other.mean
    expected = difference @ difference + np.trace(one.covariance + other.covariance - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_statistics_do_not_depend_on_the_batches() -> None:
    features = rows(500, 40, 0, 7.0)
    whole = Gaussian.of(features)
    np.testing.assert_allclose(whole.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)
    for size in (1, 7, 64, 500):
        scatter = Scatter.none(40)
        for begin in range(0, 500, size):
            scatter = scatter.with_rows(features[begin : begin + size])
        found = scatter.gaussian()
        assert found.count == 500
        np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(found.covariance, whole.covariance, rtol=1e-9, atol=1e-12)


def inception_score_by_hand(logits: np.ndarray, split: int) -> float:
    scores = []
    for begin in range(0, len(logits), split):
        part = logits[begin : begin + split]
        shares = np.exp(part) / np.exp(part).sum(axis=1, keepdims=True)
        marginal = shares.mean(axis=0)
        divergence = [sum(p * np.log(p / q) for p, q in zip(row, marginal, strict=True)) for row in shares]
        scores.append(np.exp(np.mean(divergence)))
    return float(np.mean(scores))


def test_inception_score_is_of_splits_in_file_order_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "IMAGES_PER_SPLIT", 50)
    generator = np.random.default_rng(0)
    pool, weight = generator.normal(size=(120, 32)), generator.normal(size=(10, 32))
    bias = 4 * generator.normal(size=10)
    # In the order of their classes, of which a split then has few.
    pool = pool[np.argsort((pool @ weight.T).argmax(axis=1), kind="stable")].astype(np.float32)
    found = inception_score(pool, weight)
    assert found == pytest.approx(inception_score_by_hand(pool.astype(np.float64) @ weight.T, 50), rel=1e-9)
    biased = inception_score(np.hstack([pool, np.ones((120, 1))]), np.hstack([weight, bias[:, None]]))
    assert biased != pytest.approx(found, rel=1e-2), "with the bias it would be another score"
    shuffled = inception_score(generator.permutation(pool), weight)
    assert shuffled > 1.2 * found, "and so it would be of shuffled splits"
    whole = inception_score_by_hand(pool.astype(np.float64) @ weight.T, 120)
    assert whole != pytest.approx(found, rel=1e-2), "or of one"


def test_classes_that_are_not_mixed_are_told(caplog: pytest.LogCaptureFixture) -> None:
    mixed, sorted_ = np.arange(12_000) % 100, np.sort(np.arange(12_000) % 100)
    warn_of_order(mixed)
    assert not caplog.records
    warn_of_order(sorted_)
    assert "the first 5000 have 42 of 100 classes" in caplog.text


def precision_and_recall_by_hand(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    def distance(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.square(one.astype(np.float64) - other.astype(np.float64)).sum())

    def share_inside(inner: np.ndarray, centres: np.ndarray) -> float:
        radii = [sorted(distance(c, other) for j, other in enumerate(centres) if j != i)[k - 1]
                 for i, c in enumerate(centres)]  # fmt: skip
        inside = [any(distance(row, c) <= radius for c, radius in zip(centres, radii, strict=True)) for row in inner]
        return float(np.mean(inside))

    return share_inside(samples, reference), share_inside(reference, samples)


def test_precision_and_recall_are_those_of_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "ROWS_AT_A_TIME", 16)
    reference = rows(60, 6, 0, 100.0)
    # In a corner of the reference: all are inside of it, and it is not inside of them.
    samples = 100.0 + 0.2 * (rows(45, 6, 1))
    found = precision_and_recall(reference, samples)
    assert found == precision_and_recall_by_hand(reference, samples, 3)
    assert found[0] > found[1] + 0.3, "the one for the other would be told"
    assert precision_and_recall(reference, samples, k=5) == precision_and_recall_by_hand(reference, samples, 5)
    # Copies are inside whatever the rounding, and a row's own distance is none of its neighbours'.
    assert precision_and_recall(reference, reference) == (1.0, 1.0)


def test_a_row_that_comes_twice_is_told() -> None:
    hosts = Hosts(create("eager", MeshConfig(), "fp32"))
    columns = {"features": np.arange(8.0)[:, None]}
    whole = [(np.arange(3, 5), {"features": np.array([[3.0], [4.0], [9.0]])}), (np.arange(3), columns)]
    np.testing.assert_array_equal(gathered(whole, 5, hosts)["features"][:, 0], np.arange(5.0))
    with pytest.raises(RuntimeError, match="8 rows came together where there are 7"):
        # The last batch filled up with the first rows, and not cut.
        gathered([(np.array([0, 1, 2, 3]), columns), (np.array([4, 5, 6, 0]), columns)], 7, hosts)


def test_too_few_images_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="samples: 3 images are too few for scores; 4 are the least"):
        check_enough(3, "samples")
    with caplog.at_level(logging.WARNING):
        check_enough(2048, "samples", 2048)
    assert "samples: 2048 images are too few for a covariance of 2048 features" in caplog.text


def test_psnr_and_ssim_are_those_of_libraries() -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    from torchmetrics.functional.image import peak_signal_noise_ratio as of_torchmetrics

    generator = np.random.default_rng(0)
    first = generator.integers(0, 256, (3, 48, 48, 3)).astype(np.uint8)
    second = (first * 0.8 + generator.normal(0, 12, first.shape)).clip(0, 255).astype(np.uint8)
    found = {"psnr": psnr(as_unit(second), as_unit(first)), "ssim": ssim(as_unit(second), as_unit(first))}
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        assert found["psnr"][index].item() == pytest.approx(peak_signal_noise_ratio(one, other), rel=1e-9)
        similarity = structural_similarity(
            one, other, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert found["ssim"][index].item() == pytest.approx(similarity, rel=1e-6)
        pair = torch.from_numpy(other[None] / 255.0), torch.from_numpy(one[None] / 255.0)
        assert found["psnr"][index].item() == pytest.approx(of_torchmetrics(*pair, data_range=1.0).item(), rel=1e-6)
