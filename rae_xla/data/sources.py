"""Where images come from: a set held in memory, or the shards that a manifest lists.

A set in memory is one entry in `SOURCES`. Images are [H, W, 3] uint8, labels int64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from rae_xla import storage
from rae_xla.config import Config
from rae_xla.data.manifest import Manifest, StoredLatents, check_shards, read_manifest
from rae_xla.data.transforms import Resampling
from rae_xla.errors import UserError

logger = logging.getLogger(__name__)

Split = Literal["train", "heldout"]
HELD_OUT_FRACTION = 0.2
SPLIT_SEED = 0


class StreamConfig(Config):
    """How shards are read; see `rae_xla.data.order` for ``shuffle_images``, which all hosts hold together.

    ``num_workers``: processes of each host that decode, at most as many as it has cores; 0 decodes in the training's
    own. A request is given up after ``timeout_seconds`` and tried again, waiting longer each time; after
    ``give_up_seconds`` the run saves and ends. An image that cannot be decoded is told and another takes its place;
    more than ``max_unreadable`` of a host since its start end the run.
    """

    shuffle_images: int = Field(default=16384, gt=0)
    num_workers: int = Field(default=8, ge=0)
    timeout_seconds: float = Field(default=60.0, gt=0)
    give_up_seconds: float = Field(default=600.0, gt=0)
    max_unreadable: int = Field(default=100, ge=0)


class DataConfig(Config):
    """``source``: a set by name, or the path of a manifest of ``tools/prepare_data.py``. ``batch_size`` is global.

    ``random_shift_pixels``: images move by up to so many pixels, edges fill with black; sets in memory only.
    ``num_images``: only the first so many of the training split, to overfit on; ``null`` takes all; in memory only.
    Of a manifest's images: ``crop`` takes the ``centre`` as ADM does, or a ``random`` part of the image with its short
    side scaled to ``short_side``; ``resampling`` see `rae_xla.data.transforms.centre_crop`. ``flip``: images are
    mirrored at random, every second one.
    """

    source: str
    image_size: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    random_shift_pixels: int = Field(default=0, ge=0)
    num_images: int | None = Field(default=None, gt=0)
    crop: Literal["centre", "random"] = "centre"
    short_side: int | None = Field(default=None, gt=0)
    flip: bool = False
    resampling: Resampling = "fast"
    stream: StreamConfig = StreamConfig()

    @model_validator(mode="after")
    def _fits(self) -> DataConfig:
        if self.source in SOURCES:
            if self.crop != "centre" or self.flip or self.short_side:
                raise ValueError(
                    f"source: {self.source} is not cropped or mirrored; leave out crop, short_side and flip"
                )
            return self
        if self.random_shift_pixels or self.num_images:
            key = "random_shift_pixels" if self.random_shift_pixels else "num_images"
            raise ValueError(
                f"{key}: for sets in memory ({', '.join(SOURCES)}); {self.source} is read as a manifest, so say "
                f"data.{key}={0 if self.random_shift_pixels else 'null'}"
            )
        if (self.crop == "random") != (self.short_side is not None):
            raise ValueError("short_side: goes with crop=random, and only with it")
        if self.short_side is not None and self.short_side < self.image_size:
            raise ValueError(f"short_side: {self.short_side} is below image_size, which is {self.image_size}")
        return self


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A split held in memory: images uint8 [n, S, S, 3], labels int64 [n] in 0..num_classes - 1."""

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    latents: None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, kw_only=True)
class ShardedImages:
    """A split in shards, read as it is needed."""

    manifest: Manifest
    path: str
    """Of the manifest."""

    @property
    def latents(self) -> StoredLatents | None:
        """What is in them if it is no images."""
        return self.manifest.latents

    @property
    def num_classes(self) -> int:
        """Labels are 0..num_classes - 1."""
        return self.manifest.num_classes

    def __len__(self) -> int:
        return self.manifest.num_images


def open_source(config: DataConfig, root: str, split: Split, key: str = "data.source") -> ImageSet | ShardedImages:
    """A split of the source that the recipe names; relative paths are inside ``root``. A manifest is one split.

    ``key`` is the one to name when it cannot be opened.

    Raises:
        UserError: no such manifest, or its shards are not as they were when it was made.
    """
    if config.source not in SOURCES:
        return _open_manifest(storage.resolve(root, config.source), key)
    images = SOURCES[config.source].open(config.image_size, split)
    if split == "heldout" or config.num_images is None:
        return images
    few = slice(config.num_images)
    return replace(images, images=images.images[few], labels=images.labels[few])


def open_images(config: DataConfig, root: str, split: Split, key: str = "data.source") -> ImageSet | ShardedImages:
    """`open_source`, of what is no latents.

    Raises:
        UserError: it is latents.
    """
    images = open_source(config, root, split, key)
    if images.latents is not None:
        raise UserError(f"{key}: {config.source} holds latents, which only a diffusion model trains on")
    return images


def open_heldout(config: DataConfig, source: str | None, root: str, key: str) -> ImageSet | ShardedImages:
    """Held-out images of a training on ``config``: a set's own split, or the manifest ``source``, which ``key`` names.

    Raises:
        UserError: as `open_images`.
    """
    if source is None:
        return open_images(config, root, "heldout")
    return open_images(config.model_copy(update={"source": source}), root, "heldout", key)


def open_in_memory(config: DataConfig, split: Split) -> ImageSet:
    """A source that is a set in memory.

    Raises:
        UserError: it is a manifest.
    """
    images = open_source(config, ".", split) if config.source in SOURCES else None
    if not isinstance(images, ImageSet):
        raise UserError(f"data.source: {config.source} is read as shards; this task takes {' or '.join(SOURCES)}")
    return images


def _open_manifest(path: str, key: str) -> ShardedImages:
    manifest = read_manifest(path, key)
    check_shards(manifest, path, key)
    logger.info(
        "%s: %d images of %d classes in %d %s shards", path, manifest.num_images, manifest.num_classes,
        len(manifest.shards), manifest.container,
    )  # fmt: skip
    return ShardedImages(manifest=manifest, path=path)


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


def _photographs(image_size: int, split: Split) -> ImageSet:
    """The two photographs of 640x427 pixels that scikit-learn ships (CC BY 2.0), cut into squares that do not overlap.

    The label is the photograph. The split is fixed: the same 20% of the squares are held out whatever the seed.
    """
    from sklearn.datasets import load_sample_images
    from sklearn.model_selection import train_test_split

    squares, labels = [], []
    for label, photograph in enumerate(load_sample_images().images):
        height, width = [side // image_size * image_size for side in photograph.shape[:2]]
        grid = photograph[:height, :width].reshape(height // image_size, image_size, -1, image_size, 3)
        squares.append(grid.swapaxes(1, 2).reshape(-1, image_size, image_size, 3))
        labels += [label] * len(squares[-1])
    parts = train_test_split(
        np.concatenate(squares), np.array(labels), test_size=HELD_OUT_FRACTION, stratify=labels, random_state=SPLIT_SEED
    )
    train_images, heldout_images, train_labels, heldout_labels = parts
    images, labels = (train_images, train_labels) if split == "train" else (heldout_images, heldout_labels)
    return ImageSet(images=images, labels=labels.astype(np.int64), num_classes=2)


def _synthetic(image_size: int, split: Split) -> ImageSet:
    """One image of noise, as often as ImageNet-1k has images, with its 1,000 labels: to measure all but the input."""
    num_images, num_classes = {"train": 1_281_167, "heldout": 50_000}[split], 1000
    noise = np.random.default_rng(SPLIT_SEED).integers(256, size=(image_size, image_size, 3), dtype=np.uint8)
    images = np.broadcast_to(noise, (num_images, *noise.shape))
    return ImageSet(images=images, labels=np.arange(num_images) % num_classes, num_classes=num_classes)


def num_classes_of(config: DataConfig, root: str) -> int:
    """The number of labels of the source; no image is read for it."""
    if config.source in SOURCES:
        return SOURCES[config.source].num_classes
    return read_manifest(storage.resolve(root, config.source)).num_classes


@dataclass(frozen=True, kw_only=True)
class Source:
    """How a source is opened, ``(image_size, split)``, and how many labels it has."""

    open: Callable[[int, Split], ImageSet]
    num_classes: int


SOURCES = {
    "digits": Source(open=_digits, num_classes=10),
    "photographs": Source(open=_photographs, num_classes=2),
    "synthetic": Source(open=_synthetic, num_classes=1000),
}
