"""Where images come from: random access to uint8 images and their labels.

A source is one entry in `SOURCES`. Images are [H, W, 3] uint8, labels int64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from rae_xla.config import Config

Split = Literal["train", "heldout"]
HELD_OUT_FRACTION = 0.2
SPLIT_SEED = 0


class DataConfig(Config):
    """``batch_size`` is global. ``random_shift_pixels``: images move by up to so many pixels, edges fill with black.

    ``num_images``: only the first so many of the training split, to overfit on; ``null`` takes all.
    """

    source: Literal["digits", "synthetic"]
    image_size: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    random_shift_pixels: int = Field(default=0, ge=0)
    num_images: int | None = Field(default=None, gt=0)


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A split held in memory: images uint8 [n, S, S, 3], labels int64 [n] in 0..num_classes - 1."""

    images: np.ndarray
    labels: np.ndarray
    num_classes: int

    def __len__(self) -> int:
        return len(self.images)


def open_source(config: DataConfig, split: Split) -> ImageSet:
    """A split of the source that the recipe names."""
    images = SOURCES[config.source].open(config.image_size, split)
    if split == "heldout" or config.num_images is None:
        return images
    few = slice(config.num_images)
    return replace(images, images=images.images[few], labels=images.labels[few])


def _digits(image_size: int, split: Split) -> ImageSet:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships (UCI, CC BY 4.0), enlarged bicubically.

    The split is fixed: the same 20% of every class are held out whatever the recipe's seed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        digits.images, digits.target, test_size=HELD_OUT_FRACTION, stratify=digits.target, random_state=SPLIT_SEED
    )
    train_images, heldout_images, train_labels, heldout_labels = parts
    images, labels = (train_images, train_labels) if split == "train" else (heldout_images, heldout_labels)
    grey = [Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)) for image in images]
    enlarged = np.stack(
        [np.asarray(image.resize((image_size, image_size), Image.Resampling.BICUBIC)) for image in grey]
    )
    return ImageSet(images=np.repeat(enlarged[..., None], 3, axis=3), labels=labels.astype(np.int64), num_classes=10)


def _synthetic(image_size: int, split: Split) -> ImageSet:
    """One image of noise, as often as ImageNet-1k has images, with its 1,000 labels: to measure all but the input."""
    num_images, num_classes = {"train": 1_281_167, "heldout": 50_000}[split], 1000
    noise = np.random.default_rng(SPLIT_SEED).integers(256, size=(image_size, image_size, 3), dtype=np.uint8)
    images = np.broadcast_to(noise, (num_images, *noise.shape))
    return ImageSet(images=images, labels=np.arange(num_images) % num_classes, num_classes=num_classes)


def num_classes_of(config: DataConfig) -> int:
    """The number of labels of the source, known without opening it."""
    return SOURCES[config.source].num_classes


@dataclass(frozen=True, kw_only=True)
class Source:
    """How a source is opened, ``(image_size, split)``, and how many labels it has."""

    open: Callable[[int, Split], ImageSet]
    num_classes: int


SOURCES = {
    "digits": Source(open=_digits, num_classes=10),
    "synthetic": Source(open=_synthetic, num_classes=1000),
}
