"""How a decoder's averaged weights do on held-out images while it trains: PSNR, SSIM, LPIPS, rFID, and pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rae_xla.config import Config
from rae_xla.data.loader import images_in_order
from rae_xla.data.sources import DataConfig, ImageSet, ShardedImages, open_heldout
from rae_xla.data.transforms import to_bytes, to_unit
from rae_xla.evaluation.batches import Columns, batch_size_for, gathered, own_rows, padded
from rae_xla.evaluation.distances import frechet_distance
from rae_xla.evaluation.features import Features, FeaturesConfig, load_extractor
from rae_xla.evaluation.files import contact_sheet
from rae_xla.evaluation.gaussian import Gaussian
from rae_xla.evaluation.measured import Viewing
from rae_xla.evaluation.scores import reconstruction_distance
from rae_xla.evaluation.similarity import SSIM_BORDER, psnr, ssim
from rae_xla.hosts import Hosts
from rae_xla.losses.perceptual import PerceptualDistance
from rae_xla.models.functional import InFloat32, call
from rae_xla.runtime import Runtime
from rae_xla.training.looks import Seen, counted

logger = logging.getLogger(__name__)

FEWEST_OF_A_SET = 4
FEATURES_KEY = "heldout.features.weights"


class HeldoutConfig(Config):
    """Scores on held-out images every so many steps and at the end.

    ``source``: a manifest; ``null`` takes the held-out split of a set in memory. ``num_images``: only the first so
    many, in the manifest's order. Images are cropped in the middle. ``num_shown`` of them are kept beside their
    reconstructions, as pictures. ``features``: a space to compare the sets in, such as ``{name: inception}`` for rFID
    against these very images; its scores are named after their number. Every host reads all and scores its share.
    """

    every_steps: int = Field(gt=0)
    source: str | None = None
    num_images: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=256, gt=0)
    num_shown: int = Field(default=8, ge=0)
    features: FeaturesConfig | None = None

    @model_validator(mode="after")
    def _enough(self) -> HeldoutConfig:
        if self.features is not None and self.num_images is not None and self.num_images < FEWEST_OF_A_SET:
            raise ValueError(f"num_images: {self.num_images} are too few with features; take {FEWEST_OF_A_SET} or more")
        return self


class HeldoutReconstruction:
    """A `Look` at the weights that a training's state holds, with what it has frozen on the devices.

    Scores are computed on the devices, and only their sums leave them. Every host takes its rows of each batch.
    """

    title = "held-out images"

    def __init__(
        self,
        config: HeldoutConfig,
        data: DataConfig,
        root: str,
        runtime: Runtime,
        encoder: nn.Module,
        decoder: nn.Module,
        perceptual: PerceptualDistance | None,
        num_steps: int,
    ) -> None:
        self._config, self._runtime, self._num_steps = config, runtime, num_steps
        self._encoder, self._decoder, self._perceptual = encoder, decoder, perceptual
        self._data = data
        self._images = open_heldout(data, config.source, root, "heldout.source")
        self._batch_size = batch_size_for(config.batch_size, runtime)
        self._own = slice(runtime.process_index, None, runtime.num_processes)
        self._program = runtime.compile(self._score, "heldout")
        self._has_ssim = data.image_size > 2 * SSIM_BORDER
        self._number = min(config.num_images or len(self._images), len(self._images))
        self._sets = None if config.features is None else _Sets(config.features, data, root, runtime, self._images)

    def is_due(self, step: int) -> bool:
        """See `Look`."""
        return step % self._config.every_steps == 0 or step == self._num_steps

    def prepare(self, state: Any, frozen: Any) -> None:
        """See `Look`."""
        blank = np.zeros((1, self._data.image_size, self._data.image_size, 3), np.uint8)
        placed = self._placed(blank)
        self._program.prepare({}, self._given(state, frozen), placed)
        if self._sets is not None:
            self._sets.prepare(placed["images"])

    def __call__(self, step: int, state: Any, frozen: Any, leaves: Callable[[], bool]) -> Seen | None:
        """See `Look`. Values are means over the images; the picture shows images, and their reconstructions below."""
        given = self._given(state, frozen)
        if self._sets is not None:
            self._sets.begin()
        sums: dict[str, float] = {}
        shown: list[np.ndarray] = []
        for begin, images in self._batches():
            if leaves():
                return None
            placed = self._placed(images)
            _, found = self._program({}, given, placed)
            made = found.pop("images")
            if self._sets is not None:
                self._sets.see(np.arange(begin, begin + len(images))[self._own], placed["images"], made)
            for name, value in self._runtime.to_host(found).items():
                sums[name] = sums.get(name, 0.0) + float(value)
            if not shown and self._config.num_shown:
                own = images[self._own]
                few = min(self._config.num_shown, len(own))
                shown = [own[:few], own_rows({"images": made}, self._runtime)["images"][:few]]
        number = int(sums.pop("number"))
        pictures = {"reconstructions": contact_sheet(np.concatenate(shown), len(shown[0]))} if len(shown) else {}
        values = {f"heldout_{name}": value / number for name, value in sums.items()}
        if self._sets is not None:
            values |= self._sets.score(number)
        return Seen(values, pictures)

    def _given(self, state: Any, frozen: Any) -> Any:
        kept = {part: frozen[part] for part in ("encoder", "perceptual") if part in frozen}
        return {**kept, "decoder": {**frozen["buffers"], **state["ema"]}}

    def _batches(self) -> Iterator[tuple[int, np.ndarray]]:
        """Numbers of their first images, and the images."""
        begin = 0
        for part in images_in_order(self._images, self._data)(self._batch_size):
            yield begin, part["images"][: self._number - begin]
            begin += len(part["images"])
            if begin >= self._number:
                return

    def _placed(self, images: np.ndarray) -> dict[str, Tensor]:
        """A batch on the devices, of which this host gives its rows."""
        batch = padded({"images": images}, self._batch_size)
        return self._runtime.place_batch({name: values[self._own] for name, values in batch.items()})

    def _score(self, state: Any, frozen: Any, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        with torch.no_grad():
            original, is_real = to_unit(batch["images"]), batch["is_real"].float()
            features = call(self._encoder, frozen["encoder"], self._runtime, original)
            made = call(self._decoder, frozen["decoder"], self._runtime, features)
            pixels = to_bytes(made)
            # As a file of the image would be seen.
            seen = to_unit(pixels)
            scores = {"psnr": psnr(seen, original), "number": torch.ones_like(is_real)}
            if self._has_ssim:
                scores["ssim"] = ssim(seen, original)
            if self._perceptual is not None:
                both = 2 * seen - 1, 2 * original - 1
                scores["lpips"] = call(self._perceptual, frozen["perceptual"], InFloat32(self._runtime.whole), *both)
            sums = {name: (values * is_real).sum() for name, values in scores.items()}
        return state, {**sums, "images": self._runtime.split_batch(pixels)}


class _Sets:
    """Reconstructions as a set beside the images as a set, in an extractor's features."""

    def __init__(
        self, config: Features, data: DataConfig, root: str, runtime: Runtime, images: ImageSet | ShardedImages
    ) -> None:
        self._hosts = Hosts(runtime)
        extractor = load_extractor(
            config, data.image_size, images.num_classes, root, FEATURES_KEY, runtime.process_index
        )
        self._features = Viewing(extractor, runtime)
        self._real: Gaussian | None = None
        self._seen: dict[str, list[tuple[np.ndarray, Columns]]] = {"real": [], "made": []}

    def prepare(self, images: Tensor) -> None:
        """Compile for batches like this one."""
        self._features.prepare(images)

    def begin(self) -> None:
        """Forget what an earlier look has left that had to go."""
        self._seen = {"real": [], "made": []}

    def see(self, indices: np.ndarray, real: Tensor, made: Tensor) -> None:
        """A batch of this host's images with these numbers, and what became of them."""
        sets = {"made": made} if self._real is not None else {"real": real, "made": made}
        for name, images in sets.items():
            self._seen[name].append((indices, {"features": self._features(images)["features"]}))

    def score(self, number: int) -> dict[str, float]:
        """Of all that was seen since `begin`."""
        found = {name: gathered(rows, number, self._hosts)["features"] for name, rows in self._seen.items() if rows}
        self._real = Gaussian.of(found["real"]) if "real" in found else self._real
        assert self._real is not None
        distance = frechet_distance(Gaussian.of(found["made"]), self._real)
        return {f"heldout_{reconstruction_distance(self._features.extractor.space)}_{counted(number)}": distance}
