"""How fast shards become batches, beside torchvision's ImageFolder with the preparation that was released.

The images are parts of the two photographs that scikit-learn ships, as ImageNet's are: about 500 x 375, JPEG. Both
sides read them from this disk with equally many worker processes, and give batches of the same size, shuffled and
mirrored: ours as bytes, which the device turns into numbers, the other as floats, as released.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from rae_xla.data.indexing import Labelling, index, relative_to
from rae_xla.data.manifest import Manifest, Shard, write_manifest
from rae_xla.data.sources import DataConfig, ShardedImages, StreamConfig, open_source
from rae_xla.data.stream import StreamedBatches
from rae_xla.data.transforms import centre_crop, decoded, decoded_fast

IMAGE_SIZE, BATCH_SIZE = 256, 64
SIZE, QUALITY = (500, 375), 90
NUM_DIFFERENT, NUM_CLASSES, NUM_SHARDS = 128, 8, 4
WARM_UP_BATCHES = 8
STARTUP_SHARDS = 1024


def input_speed(num_images: int, num_workers: int) -> dict[str, Any]:
    """Images a second of both, in turns, and how far the fast crop is from the exact one.

    ``num_images`` are read by each side in each of three turns, after a warm-up; the best turn counts.
    """
    images = [_jpeg(number) for number in range(NUM_DIFFERENT)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _write(root, images, num_images)
        config = DataConfig(
            source=str(root / "shards" / "manifest.json"),
            image_size=IMAGE_SIZE,
            batch_size=BATCH_SIZE,
            flip=True,
            stream=StreamConfig(shuffle_images=1024, num_workers=num_workers),
        )
        ours, theirs = [], []
        for _ in range(3):
            ours.append(_rate(_our_batches(config), num_images))
            theirs.append(_rate(_their_batches(root / "folder", num_workers), num_images))
        startup = _startup_seconds(root / "many")
    differences = [
        np.abs(_cropped(image, "fast").astype(int) - released_crop(decoded(image), IMAGE_SIZE)) for image in images
    ]
    exact = all((_cropped(image, "exact") == released_crop(decoded(image), IMAGE_SIZE)).all() for image in images)
    return {
        "images_per_second_per_core": max(ours) / num_workers,
        "torchvision_images_per_second_per_core": max(theirs) / num_workers,
        "ratio": max(ours) / max(theirs),
        "workers": num_workers,
        "kilobytes_per_image": sum(map(len, images)) / len(images) / 1e3,
        "largest_difference": int(max(difference.max() for difference in differences)),
        "share_of_values_that_differ": float(np.mean([(difference > 0).mean() for difference in differences])),
        "exact_mode_is_exact": bool(exact),
        "startup_seconds": startup,
        "startup_shards": STARTUP_SHARDS,
    }


def _jpeg(number: int) -> bytes:
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    drawn = np.random.default_rng(number)
    width = int(drawn.integers(400, 640))
    height = width * 2 // 3
    left, top = int(drawn.integers(0, 641 - width)), int(drawn.integers(0, 428 - height))
    part = Image.fromarray(photographs[number % 2]).crop((left, top, left + width, top + height))
    content = io.BytesIO()
    part.resize(SIZE, Image.Resampling.LANCZOS).save(content, "JPEG", quality=QUALITY)
    return content.getvalue()


def _write(root: Path, images: list[bytes], count: int) -> None:
    """The same images as shards with a manifest, and as a folder for each class."""
    (root / "shards").mkdir()
    for shard in range(NUM_SHARDS):
        numbers = range(shard, count, NUM_SHARDS)
        columns = {
            "image": pa.array([images[number % len(images)] for number in numbers], pa.binary()),
            "label": pa.array([number % NUM_CLASSES for number in numbers], pa.int64()),
        }
        path = root / "shards" / f"{shard}.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=64, compression="none")
    manifest_path = str(root / "shards" / "manifest.json")
    manifest = index(str(root / "shards"), Labelling(), "train", NUM_SHARDS)
    write_manifest(manifest_path, relative_to(manifest_path, manifest))
    for number in range(count):
        path = root / "folder" / str(number % NUM_CLASSES) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images[number % len(images)])


def _rate(batches: Iterator[Any], num_images: int) -> float:
    """Images a second after the warm-up."""
    for _ in islice(batches, WARM_UP_BATCHES):
        pass
    start = time.perf_counter()
    num = sum(1 for _ in islice(batches, num_images // BATCH_SIZE))
    return num * BATCH_SIZE / (time.perf_counter() - start)


def _our_batches(config: DataConfig) -> Iterator[Any]:
    images = open_source(config, ".", "train")
    assert isinstance(images, ShardedImages)
    return StreamedBatches(images, config, 0, 0, 1).from_step(0)


def _their_batches(folder: Path, num_workers: int) -> Iterator[Any]:
    preparation = transforms.Compose([_ReleasedCrop(), transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    images = ImageFolder(str(folder), transform=preparation)
    loader = DataLoader(
        images,
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=num_workers,
        drop_last=True,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    while True:
        yield from loader


class _ReleasedCrop:
    def __call__(self, image: Image.Image) -> Image.Image:
        return Image.fromarray(released_crop(image, IMAGE_SIZE))


def released_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop (arXiv 2105.05233), as the releases prepare images for a diffusion model."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.array(image)[top : top + size, left : left + size]


def _cropped(image: bytes, resampling: Any) -> np.ndarray:
    return centre_crop(decoded_fast(image), IMAGE_SIZE, resampling)


def _startup_seconds(directory: Path) -> float:
    """From a manifest's path to the first plan, checks included, with as many shards as ImageNet has."""
    directory.mkdir()
    shards = []
    for number in range(STARTUP_SHARDS):
        path = directory / f"{number:05d}.parquet"
        path.write_bytes(b"1")
        shards.append(Shard(path=path.name, num_bytes=1, blocks=(64,) * 19 + (35,)))
    total = sum(shard.num_images for shard in shards)
    manifest = Manifest(
        container="parquet",
        num_images=total,
        num_classes=1000,
        image_column="i",
        label_column="l",
        shards=tuple(shards),
    )
    write_manifest(str(directory / "manifest.json"), manifest)
    config = DataConfig(source=str(directory / "manifest.json"), image_size=IMAGE_SIZE, batch_size=1024)
    start = time.perf_counter()
    images = open_source(config, ".", "train")
    assert isinstance(images, ShardedImages)
    batches = StreamedBatches(images, config, 0, 0, 8)
    seconds = time.perf_counter() - start
    assert batches
    return seconds
